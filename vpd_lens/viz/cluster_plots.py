"""The figures of clusters and of interactions, each a function that returns an inline SVG.

Colours follow the page around them (see `vpd_lens.viz.svg`); `to=write_png` with a folder writes a
file instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vpd_lens.analysis.clustering import Clusters
from vpd_lens.analysis.interactions import NeuronInteractions, SecondDifferences
from vpd_lens.evaluation.plots import FULL, HALF, MAIN, svg
from vpd_lens.viz.attention_plots import POSITIVE
from vpd_lens.viz.svg import MUTED, PALETTE, legend_above


@svg("cluster-lengths", "Length of the description by the number of groups", HALF)
def lengths_plot(figure: Figure, runs: Sequence[Clusters]) -> None:
    """Length of the description by the number of groups, and with a dot the one that is kept."""
    axes = figure.subplots()
    for run, colour in zip(runs, PALETTE, strict=False):
        n = len(run.names)
        groups = np.arange(n, n - len(run.lengths), -1)
        axes.plot(groups, run.lengths.numpy(), color=colour, label=f"alpha {run.alpha:g}")
        axes.plot([run.n_groups], [run.length], "o", color=colour, markersize=5)
    axes.set(xlabel="groups", ylabel="bits per position", xscale="log", yscale="log")
    legend_above(axes)


@svg("cluster-sizes", "Size of groups, and how far their members are active together", HALF)
def sizes_plot(figure: Figure, clusters: Clusters) -> None:
    """Every group of more than one: its size, and the mean share of it that its members have."""
    axes = figure.subplots()
    larger = [cluster for cluster in clusters if len(cluster) > 1]
    sizes = np.array([len(cluster) for cluster in larger])
    together = np.array([cluster.together for cluster in larger])
    density = np.array([cluster.density for cluster in larger])
    axes.scatter(sizes, together, s=4 + 60 * density, color=MAIN, alpha=0.4, linewidths=0)
    grid = np.geomspace(2, max(sizes.max(initial=2), 3), 50)
    axes.plot(grid, 1 / grid, ":", color=MUTED, linewidth=1, label="never together")
    axes.set(xlabel="members", ylabel="together", xscale="log", ylim=(0, 1.02))
    legend_above(axes)


@svg("interactions", "Interactions of subcomponents in neurons", FULL)
def interactions_plot(
    figure: Figure, found: NeuronInteractions, measured: SecondDifferences | None = None
) -> None:
    """The table, in its order, the histogram of its values, and what was measured of them."""
    panels = figure.subplots(1, 2 + (measured is not None))
    image = panels[0].imshow(
        np.log10(found.values.numpy().clip(1e-3, 1)), cmap=POSITIVE, aspect="equal",
        interpolation="nearest", vmin=-3, vmax=0,
    )  # fmt: skip
    panels[0].grid(False)
    panels[0].set(xlabel="with", ylabel="subcomponent", title=f"{found.site}, log10")
    figure.colorbar(image, ax=panels[0], shrink=0.8, pad=0.02).outline.set_visible(False)
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
