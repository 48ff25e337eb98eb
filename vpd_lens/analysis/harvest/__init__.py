"""The harvest: what every subcomponent responds to, gathered in one pass over data."""

from vpd_lens.analysis.harvest.collect import harvest
from vpd_lens.analysis.harvest.examples import Example
from vpd_lens.analysis.harvest.result import Harvest, Settings
from vpd_lens.analysis.harvest.statistics import Summary, TokenStatistic

__all__ = ["Example", "Harvest", "Settings", "Summary", "TokenStatistic", "harvest"]
