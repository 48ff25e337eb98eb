"""Pruning to a behaviour: the subcomponents that it needs."""

from vpd_lens.analysis.pruning.config import PruneConfig
from vpd_lens.analysis.pruning.optimise import Circuit, prune
from vpd_lens.analysis.pruning.report import CircuitReport

__all__ = ["Circuit", "CircuitReport", "PruneConfig", "prune"]
