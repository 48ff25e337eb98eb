"""The training of a decomposition: configuration, losses, adversary, the step and its loop."""

from vpd_lens.config import (
    AdversaryConfig,
    CompactionConfig,
    FaithfulnessConfig,
    MinimalityConfig,
    OptimiserConfig,
    StochasticConfig,
    VPDConfig,
)
from vpd_lens.training.trainer import TrainingResult, train

__all__ = [
    "AdversaryConfig",
    "CompactionConfig",
    "FaithfulnessConfig",
    "MinimalityConfig",
    "OptimiserConfig",
    "StochasticConfig",
    "TrainingResult",
    "VPDConfig",
    "train",
]
