"""Sites along an axis: grouped by layer, coloured by the kind of matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from vpd_lens.evaluation.svg import MUTED

PALETTE = ("#4c86d9", "#2fa39a", "#67a33f", "#c99a1e", "#d9703f", "#c2568f", "#8b6fd0")
_KINDS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.in", "mlp.gate", "mlp.out")
_KIND_COLOURS = dict(zip(_KINDS, PALETTE, strict=True))
_FEW_SITES = 26
_MAX_LABELS = 16


def layer_of(name: str) -> str:
    """`"0"` of `blocks.0.attn.q`; empty for a site in no block."""
    match = re.match(r"blocks\.(\d+)\.", name)
    return match[1] if match else ""


def kind_of(name: str) -> str:
    """`"attn.q"` of `blocks.0.attn.q`; the whole name for a site in no block."""
    return re.sub(r"^blocks\.\d+\.", "", name)


def kind_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for every kind, legible on light and dark; the same for a kind on every page."""
    kinds = dict.fromkeys(kind_of(name) for name in names)
    return {
        kind: _KIND_COLOURS.get(kind, PALETTE[index % len(PALETTE)])
        for index, kind in enumerate(kinds)
    }


def site_positions(names: Sequence[str]) -> np.ndarray:
    """One place per site, with a gap between layers, `[n_sites]`."""
    gaps, before = [], layer_of(names[0])
    for name in names:
        gaps.append(0.9 if layer_of(name) != before else 0.0)
        before = layer_of(name)
    return np.arange(len(names)) + np.cumsum(gaps)


def site_bars(axes: Axes, names: Sequence[str], values: Sequence[float]) -> np.ndarray:
    """One bar per site; returns their places, `[n_sites]`."""
    positions = site_positions(names)
    colours = kind_colours(names)
    axes.bar(positions, values, 0.8, color=[colours[kind_of(name)] for name in names])
    axes.set_xlim(positions[0] - 0.8, positions[-1] + 0.8)
    _label_layers(axes, names, positions)
    return positions


def _label_layers(axes: Axes, names: Sequence[str], positions: np.ndarray) -> None:
    places, labels = [], []
    for layer, group in groupby(zip(names, positions, strict=True), lambda pair: layer_of(pair[0])):
        members = list(group)
        if layer:
            places.append(float(np.mean([position for _, position in members])))
            labels.append(f"layer {layer}")
        else:
            places += [float(position) for _, position in members]
            labels += [kind_of(name) for name, _ in members]
    every = -(-len(places) // _MAX_LABELS)
    axes.set_xticks(places[::every], labels[::every])
    axes.tick_params(axis="x", length=0)


def print_values(
    axes: Axes,
    positions: np.ndarray,
    heights: Sequence[float],
    form: str,
    values: Sequence[float] | None = None,
) -> None:
    """Write values over bars, unless there are too many.

    Args:
        axes: Where.
        positions: Places of the bars, `[n_sites]`.
        heights: Their heights.
        form: Format string of a value.
        values: What to write; by default the heights.
    """
    if len(positions) > _FEW_SITES:
        return
    for x, height, value in zip(positions, heights, values or heights, strict=True):
        axes.annotate(
            form.format(value),
            (x, height),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=MUTED,
        )
    axes.margins(y=0.12)


def kind_handles(names: Sequence[str]) -> list[Patch]:
    """Legend entries for the kinds of these sites."""
    return [Patch(color=colour, label=kind) for kind, colour in kind_colours(names).items()]
