"""The harvest: what every subcomponent responds to, gathered in one pass over data."""

from vpd_lens.analysis.harvest.collect import harvest
from vpd_lens.analysis.harvest.examples import Example
from vpd_lens.analysis.harvest.result import Harvest, Settings
from vpd_lens.analysis.harvest.token_statistics import TokenStatistic
from vpd_lens.analysis.harvest.usage import Summary

__all__ = ["Example", "Harvest", "Settings", "Summary", "TokenStatistic", "harvest"]
