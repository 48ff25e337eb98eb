"""Toy models whose mechanisms are known, to check a decomposition method against the truth."""

from vpd_lens.toys.experiment import ToyRecord, run_seed, run_seeds, table
from vpd_lens.toys.measure import SiteFigures, measure
from vpd_lens.toys.presets import METHODS, preset
from vpd_lens.toys.targets import TOYS, Toy

__all__ = [
    "METHODS",
    "TOYS",
    "SiteFigures",
    "Toy",
    "ToyRecord",
    "measure",
    "preset",
    "run_seed",
    "run_seeds",
    "table",
]
