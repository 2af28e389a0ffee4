"""One paper a file; ``registry`` finds them by name."""

from recbole_simdiff import compat

compat.apply()
