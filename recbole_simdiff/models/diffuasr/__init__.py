"""DiffuASR's generator and its comparators."""
