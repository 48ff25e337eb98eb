"""Configurations: validated, frozen, in YAML; no torch is imported here."""

from vpd_lens.config.base import Config, InvalidConfig, parse_yaml
from vpd_lens.config.run_file import ModelClass, Processing, RunFile, read_run_file, template
from vpd_lens.config.sections import (
    AdversaryConfig,
    CausalImportanceConfig,
    CompactionConfig,
    ElsewhereConfig,
    FaithfulnessConfig,
    LocalityConfig,
    MinimalityConfig,
    OptimiserConfig,
    StochasticConfig,
)
from vpd_lens.config.vpd import VPDConfig

__all__ = [
    "AdversaryConfig",
    "CausalImportanceConfig",
    "CompactionConfig",
    "Config",
    "ElsewhereConfig",
    "FaithfulnessConfig",
    "InvalidConfig",
    "LocalityConfig",
    "MinimalityConfig",
    "ModelClass",
    "OptimiserConfig",
    "Processing",
    "RunFile",
    "StochasticConfig",
    "VPDConfig",
    "parse_yaml",
    "read_run_file",
    "template",
]
