"""Methods that are several runs."""

from recbole_simdiff import compat

compat.apply()
