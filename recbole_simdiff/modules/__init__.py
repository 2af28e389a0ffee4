"""Bricks that models are built of: torch and RecBole's layers only."""

from recbole_simdiff import compat

compat.apply()
