"""Subcomponents that are active together, grouped so that a description gets shortest."""

from vpd_lens.analysis.clustering.activity import Activity, Coactivity, activity
from vpd_lens.analysis.clustering.cluster import cluster, merge
from vpd_lens.analysis.clustering.clusters import Cluster, Clusters
from vpd_lens.analysis.clustering.samplers import Best, Boltzmann, Range, Rank, Sampler
from vpd_lens.analysis.clustering.sweep import Sweep, distance, sweep

__all__ = [
    "Activity",
    "Best",
    "Boltzmann",
    "Cluster",
    "Clusters",
    "Coactivity",
    "Range",
    "Rank",
    "Sampler",
    "Sweep",
    "activity",
    "cluster",
    "distance",
    "merge",
    "sweep",
]
