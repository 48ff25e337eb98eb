"""Change a model by its parts: bake edits into weights, fit them, and measure what else changes."""

from vpd_lens.editing.bake import bake, baked

__all__ = ["bake", "baked"]
