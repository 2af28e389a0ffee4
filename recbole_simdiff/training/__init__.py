"""The training loop, what listens to it and what stops it."""

from recbole_simdiff import compat

compat.apply()
