"""Recommendations from a checkpoint."""

from recbole_simdiff import compat

compat.apply()
