"""Data sets, loaders, and raw files on their way to them."""

from recbole_simdiff import compat

compat.apply()
