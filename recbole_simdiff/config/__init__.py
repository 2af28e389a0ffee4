"""Configuration: layers of files and values, and their checks."""
