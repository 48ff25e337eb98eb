"""Dataset attributions: which subcomponents act on which, summed over data."""

from vpd_lens.analysis.dataset_attribution.accumulate import dataset_attributions
from vpd_lens.analysis.dataset_attribution.result import DatasetAttributions, Settings

__all__ = ["DatasetAttributions", "Settings", "dataset_attributions"]
