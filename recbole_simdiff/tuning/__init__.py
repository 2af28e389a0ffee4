"""Searches for the best setting of a model."""

from recbole_simdiff import compat

compat.apply()
