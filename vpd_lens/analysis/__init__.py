"""Analyses of trained decompositions."""

from vpd_lens.analysis.comparison import (
    Comparison,
    Similarity,
    compare,
    directions,
    multiple_match_share,
    random_baseline,
)
from vpd_lens.analysis.usage import alive_subcomponents, head_shares

__all__ = [
    "Comparison",
    "Similarity",
    "alive_subcomponents",
    "compare",
    "directions",
    "head_shares",
    "multiple_match_share",
    "random_baseline",
]
