"""Analyses of trained decompositions."""

from vpd_lens.analysis.comparison import (
    Comparison,
    Similarity,
    alive_subcomponents,
    compare,
    directions,
    multiple_match_share,
    random_baseline,
)

__all__ = [
    "Comparison",
    "Similarity",
    "alive_subcomponents",
    "compare",
    "directions",
    "multiple_match_share",
    "random_baseline",
]
