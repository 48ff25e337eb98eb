"""Interventions on subcomponents."""

from vpd_lens.analysis.interventions.edits import Ablate, Patch, Scale, edited
from vpd_lens.analysis.interventions.intervene import InterventionResult, intervene

__all__ = ["Ablate", "InterventionResult", "Patch", "Scale", "edited", "intervene"]
