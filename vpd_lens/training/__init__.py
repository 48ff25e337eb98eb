"""The training of a decomposition: losses, adversary, the step and its loop."""

from vpd_lens.config import VPDConfig
from vpd_lens.training.trainer import TrainingResult, train

__all__ = ["TrainingResult", "VPDConfig", "train"]
