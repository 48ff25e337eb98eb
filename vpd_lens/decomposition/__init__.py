"""Subcomponents, causal importance, masks, and the handle that attaches them to a model."""

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.decomposition.divergence import Divergence
from vpd_lens.decomposition.handle import Decomposition
from vpd_lens.decomposition.masks import Layout, Masks
from vpd_lens.decomposition.subcomponents import Subcomponents

__all__ = [
    "CausalImportanceConfig",
    "Decomposition",
    "Divergence",
    "Layout",
    "Masks",
    "Subcomponents",
]
