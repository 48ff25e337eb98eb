"""Measure a decomposition and report what was measured."""

from vpd_lens.evaluation.evaluate import evaluate
from vpd_lens.evaluation.redundancy import Redundancy, redundancy
from vpd_lens.evaluation.report import EvalReport

__all__ = ["EvalReport", "Redundancy", "evaluate", "redundancy"]
