"""Attribution graphs whose nodes are subcomponents."""

from vpd_lens.analysis.attribution.attention_pairs import AttentionScores, attention_pairs
from vpd_lens.analysis.attribution.attribute import attribute
from vpd_lens.analysis.attribution.graph import AttributionGraph
from vpd_lens.analysis.attribution.nodes import Nodes
from vpd_lens.analysis.attribution.pairs_record import AttentionPair
from vpd_lens.analysis.targets import Direction, LogitDifference, Token, TopTokens

__all__ = [
    "AttentionPair",
    "AttentionScores",
    "AttributionGraph",
    "Direction",
    "LogitDifference",
    "Nodes",
    "Token",
    "TopTokens",
    "attention_pairs",
    "attribute",
]
