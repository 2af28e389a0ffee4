"""One training and its test: its identity, its record and its return from disk."""

from recbole_simdiff import compat

compat.apply()
