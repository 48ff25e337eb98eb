"""Models whose mechanisms are known, to check a decomposition method against the truth."""

from vpd_lens.toys.models import TMS, TOYS, ResidualMLP, SparseFeatures, Toy

__all__ = ["TMS", "TOYS", "ResidualMLP", "SparseFeatures", "Toy"]
