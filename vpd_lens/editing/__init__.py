"""Change a model by its parts: bake edits into weights, fit them, and measure what else changes."""

from vpd_lens.analysis.circuits.weight_edits import Rescale, Rewrite, Swap
from vpd_lens.editing.bake import bake, baked
from vpd_lens.editing.directions import toward
from vpd_lens.editing.effects import SideEffects, side_effects
from vpd_lens.editing.find import Found, find_subcomponents
from vpd_lens.editing.fit import Fit, fit_edit

__all__ = [
    "Fit",
    "Found",
    "Rescale",
    "Rewrite",
    "SideEffects",
    "Swap",
    "bake",
    "baked",
    "find_subcomponents",
    "fit_edit",
    "side_effects",
    "toward",
]
