"""Configurations: validated, frozen, in YAML; no torch is imported here."""

from vpd_lens.config.base import Config, InvalidConfig, parse_yaml, read_yaml, set_path
from vpd_lens.config.run_file import (
    EvaluationSection,
    ModelClass,
    ModelSection,
    Processing,
    RunFile,
    apply_override,
    read_run_file,
    template,
)
from vpd_lens.config.sections import (
    AdversaryConfig,
    CausalImportanceConfig,
    CompactionConfig,
    FaithfulnessConfig,
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
    "EvaluationSection",
    "FaithfulnessConfig",
    "InvalidConfig",
    "MinimalityConfig",
    "ModelClass",
    "ModelSection",
    "OptimiserConfig",
    "Processing",
    "RunFile",
    "StochasticConfig",
    "VPDConfig",
    "apply_override",
    "parse_yaml",
    "read_run_file",
    "read_yaml",
    "set_path",
    "template",
]
