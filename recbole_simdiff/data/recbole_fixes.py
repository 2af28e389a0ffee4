"""RecBole's data set with its faults fixed."""

from recbole_simdiff.data.features import FeatureFixes
from recbole_simdiff.data.filters import FilterFixes


class RecBoleFixes(FilterFixes, FeatureFixes):
    """Overrides for faults of RecBole's ``Dataset`` on today's pandas; one method per fault."""
