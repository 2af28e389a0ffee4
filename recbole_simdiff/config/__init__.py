"""Configuration: layers of files and values, and their checks."""

from recbole_simdiff import compat

compat.apply()
