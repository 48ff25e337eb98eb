"""Circuits of a prompt: attribution graphs of subcomponents, pruning, interventions."""

from vpd_lens.analysis.circuits.attribute import attribute
from vpd_lens.analysis.circuits.behaviour import PruneConfig
from vpd_lens.analysis.circuits.edits import Ablate, Edit, Patch, Scale, edited
from vpd_lens.analysis.circuits.graph import AttributionGraph
from vpd_lens.analysis.circuits.intervene import InterventionResult, intervene
from vpd_lens.analysis.circuits.prune import Circuit, CircuitReport, prune
from vpd_lens.analysis.circuits.tables import AttentionPair, Edges, Nodes
from vpd_lens.analysis.circuits.targets import Direction, LogitDifference, Token, TopTokens
from vpd_lens.analysis.circuits.weight_edits import Rescale, Rewrite, Swap

__all__ = [
    "Ablate",
    "AttentionPair",
    "AttributionGraph",
    "Circuit",
    "CircuitReport",
    "Direction",
    "Edges",
    "Edit",
    "InterventionResult",
    "LogitDifference",
    "Nodes",
    "Patch",
    "PruneConfig",
    "Rescale",
    "Rewrite",
    "Scale",
    "Swap",
    "Token",
    "TopTokens",
    "attribute",
    "edited",
    "intervene",
    "prune",
]
