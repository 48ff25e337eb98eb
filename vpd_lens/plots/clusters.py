"""Figures of clusters, and of interactions in neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vpd_lens.plots.style import (
    FULL,
    HALF,
    MAIN,
    PALETTE,
    canvas,
    heat,
    legend_above,
    muted,
    panel,
)

if TYPE_CHECKING:
    from vpd_lens.analysis.clustering import Clusters
    from vpd_lens.analysis.interactions import NeuronInteractions, SecondDifferences


def cluster_lengths(runs: Sequence[Clusters], *, ax: Axes | None = None) -> Figure:
    """Length of the description by the number of groups, and with a dot the one that is kept."""
    label = "Length of the description by the number of groups"
    with panel(label, HALF, ax) as (figure, axes):
        for run, colour in zip(runs, PALETTE, strict=False):
            n = len(run.names)
            groups = np.arange(n, n - len(run.lengths), -1)
            axes.plot(groups, run.lengths.numpy(), color=colour, label=f"alpha {run.alpha:g}")
            axes.plot([run.n_groups], [run.length], "o", color=colour, markersize=5)
        axes.set(xlabel="groups", ylabel="bits per position", xscale="log", yscale="log")
        legend_above(axes)
    return figure


def cluster_sizes(clusters: Clusters, *, ax: Axes | None = None) -> Figure:
    """Every group of more than one: its size, and the mean share of it that its members have."""
    label = "Size of groups, and how far their members are active together"
    larger = [cluster for cluster in clusters if len(cluster) > 1]
    sizes = np.array([len(cluster) for cluster in larger])
    together = np.array([cluster.together for cluster in larger])
    density = np.array([cluster.density for cluster in larger])
    with panel(label, HALF, ax) as (figure, axes):
        axes.scatter(sizes, together, s=4 + 60 * density, color=MAIN, alpha=0.4, linewidths=0)
        grid = np.geomspace(2, max(sizes.max(initial=2), 3), 50)
        axes.plot(grid, 1 / grid, ":", color=muted(), linewidth=1, label="never together")
        axes.set(xlabel="members", ylabel="together", xscale="log", ylim=(0, 1.02))
        legend_above(axes)
    return figure


def interactions(found: NeuronInteractions, measured: SecondDifferences | None = None) -> Figure:
    """The table, in its order, the histogram of its values, and what was measured of them."""
    with canvas("Interactions of subcomponents in neurons", FULL) as figure:
        panels = figure.subplots(1, 2 + (measured is not None))
        shown = 3 + np.log10(found.values.numpy().clip(1e-3, 1))
        image = heat(panels[0], shown, signed=False, limit=3.0)
        panels[0].set(xlabel="with", ylabel="subcomponent", title=found.site, aspect="equal")
        bar = figure.colorbar(image, ax=panels[0], shrink=0.8, pad=0.02, ticks=range(4))
        bar.set_ticklabels(["0.001", "0.01", "0.1", "1"])
        bar.outline.set_visible(False)
        values = found.others().numpy()
        panels[1].hist(np.log10(values[values > 0].clip(1e-6)), bins=60, color=MAIN)
        panels[1].set(xlabel="log10 of the interaction", ylabel="ordered pairs")
        if measured is not None:
            seen = (measured.predicted > 0) & (measured.measured > 0)
            points = (x[seen].numpy() for x in (measured.predicted, measured.measured))
            panels[2].plot(*points, "o", color=MAIN, markersize=2, alpha=0.5, markeredgewidth=0)
            title = f"rank correlation {measured.rank_correlation:.2f}"
            panels[2].set(xscale="log", yscale="log", xlabel="interaction", title=title,
                          ylabel="second difference")  # fmt: skip
    return figure
