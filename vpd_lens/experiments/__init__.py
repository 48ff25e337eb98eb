"""Named runs that are recorded and can be repeated: sweeps, and the paper's claims in small."""

from vpd_lens.experiments.record import Machine, RunRecord
from vpd_lens.experiments.reproduce import reproduce
from vpd_lens.experiments.run import Run, Target, load_decomposed, perform
from vpd_lens.experiments.sweep import SweepResult, sweep

__all__ = [
    "Machine",
    "Run",
    "RunRecord",
    "SweepResult",
    "Target",
    "load_decomposed",
    "perform",
    "reproduce",
    "sweep",
]
