"""Metrics of a trained model under each protocol."""

from recbole_simdiff import compat

compat.apply()
