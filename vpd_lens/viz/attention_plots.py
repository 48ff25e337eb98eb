"""The figures of attention, each a function that returns an inline SVG.

Colours follow the page around them (see `vpd_lens.viz.svg`); `to=write_png` with a folder writes a
file instead.

Source: the paper's figures of attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vpd_lens.analysis.attention.data import PatternChange, Together
from vpd_lens.analysis.attention.heads import HeadSpread, Overlap
from vpd_lens.analysis.attention.interactions import Interaction, Interactions
from vpd_lens.evaluation.plots import BESIDE, FULL, HALF, MAIN, svg
from vpd_lens.viz.svg import INK, MUTED, PALETTE, legend_above

# Zero is transparent, and so of the page's own colour, light or dark.
_CLEAR = [*to_rgba(MAIN)[:3], 0.0], [*to_rgba(BESIDE)[:3], 0.0]
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0, MAIN), (0.5, _CLEAR[0]), (0.5, _CLEAR[1]), (1, BESIDE)]
)
POSITIVE = LinearSegmentedColormap.from_list("positive", [_CLEAR[0], MAIN])


@svg("attention-offsets", "Pairs of q and k subcomponents by distance and head", FULL)
def offsets_plot(
    figure: Figure, interactions: Interactions, pairs: Sequence[Interaction], columns: int = 4
) -> None:
    """One panel per head: every pair by the distance back from the query.

    Of static interactions or of mean contributions; `pairs` such as `interactions.top(5)`.
    """
    n = len(interactions.values)
    rows = -(-n // columns)
    panels = figure.subplots(rows, min(n, columns), sharex=True, sharey=True, squeeze=False)
    for head, axes in enumerate(panels.flat):
        if head >= n:
            axes.set_visible(False)
            continue
        axes.axhline(0, color=MUTED, linewidth=0.6)
        for pair, colour in zip(pairs, PALETTE, strict=False):
            values = interactions.of(pair.first, pair.second)[head].tolist()
            axes.plot(interactions.offsets, values, "o-", color=colour, markersize=2.5,
                      label=_pair_name(pair))  # fmt: skip
        axes.set_title(f"head {head}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.supxlabel("positions back from the query", fontsize=8.5, color=MUTED)
    panels[0, 0].set_ylabel(interactions.kind, fontsize=7.5)
    handles = panels[0, 0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


@svg("attention-pair", "One pair of subcomponents by head and distance", HALF)
def pair_plot(figure: Figure, interactions: Interactions, first: str, second: str) -> None:
    """Heads by distances, of one pair."""
    values = interactions.of(first, second).numpy()
    axes = figure.subplots()
    _heat(figure, axes, values, signed=True)
    axes.set(xlabel="positions back from the query", ylabel="head")
    axes.set_xticks(range(len(interactions.offsets)), [str(o) for o in interactions.offsets])
    axes.set_yticks(range(len(values)))
    name = _pair_name(Interaction(first, second, 0, 0, 0.0))
    axes.set_title(f"{name}, {interactions.kind}", loc="left")


@svg("attention-matrix", "Pairs of subcomponents, q by k, in every head", (10.2, 3.0))
def matrix_plot(figure: Figure, interactions: Interactions, offset: int, n: int = 24) -> None:
    """Every pair of the `n` largest of either matrix, at one distance, head by head."""
    values = interactions.values[:, interactions.offsets.index(offset)]
    sizes = [values.abs().amax((0, axis)) for axis in (2, 1)]
    rows, columns = (s.topk(min(n, len(s))).indices.sort().values for s in sizes)
    chosen = values[:, rows][:, :, columns].numpy()
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    limit = float(np.abs(chosen).max())
    for head, axes in enumerate(panels):
        image = _heat(None, axes, chosen[head], signed=True, limit=limit)
        names = (interactions.columns[i].rpartition(":")[2] for i in columns.tolist())
        axes.set_xticks(range(len(columns)), [n.split(".")[-1] for n in names], rotation=90)
        axes.tick_params(labelsize=5)
        axes.set_title(f"head {head}")
    names = (interactions.rows[i].rpartition(":")[2] for i in rows.tolist())
    panels[0].set_yticks(range(len(rows)), [n.split(".")[-1] for n in names])
    first, second = (site.rpartition(".")[2] for site in (interactions.first, interactions.second))
    panels[0].set_ylabel(first)
    panels[0].set_xlabel(second)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01)
    bar.outline.set_visible(False)
    figure.suptitle(f"{interactions.kind}, {offset} back", fontsize=8, color=MUTED)


@svg("attention-pattern", "Attention patterns with and without subcomponents", (10.2, 3.3))
def patterns_plot(
    figure: Figure,
    patterns: Sequence[tuple[str, Float[Tensor, "query key"]]],
    strings: Sequence[str],
) -> None:
    """Patterns of one head side by side, under their titles, with the prompt's tokens."""
    panels = figure.subplots(1, len(patterns), sharey=True, squeeze=False)[0]
    shown = [string.replace("\n", "⏎").replace("$", r"\$") for string in strings]
    for axes, (title, pattern) in zip(panels, patterns, strict=True):
        image = _heat(None, axes, pattern.float().numpy(), signed=False, limit=1.0)
        axes.set_xticks(range(len(shown)), shown, rotation=90)
        axes.tick_params(labelsize=6, labelfontfamily="monospace")
        axes.set_title(title, loc="left")
        axes.set_xlabel("key")
    panels[0].set_yticks(range(len(shown)), shown)
    panels[0].set_ylabel("query")
    figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01).outline.set_visible(False)


@svg("attention-ablation", "Mean attention by distance with and without subcomponents", FULL)
def ablation_plot(figure: Figure, changes: Sequence[PatternChange], layer: int) -> None:
    """Mean attention by distance, one panel per head: with all, and without each set."""
    before = changes[0].before[layer]
    panels = figure.subplots(1, len(before.attention), sharey=True, squeeze=False)[0]
    for head, axes in enumerate(panels):
        curves = [("all", before, INK)]
        for change, colour in zip(changes, (BESIDE, *PALETTE[1::2]), strict=False):
            curves.append((f"without {_short(change.ablated)}", change.after[layer], colour))
        for label, profile, colour in curves:
            values = profile.attention[head].tolist()
            axes.plot(profile.offsets, values, "o-", color=colour, markersize=2.5, label=label)
        axes.set_title(f"head {head}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].set_ylim(bottom=0)  # of all, when all are drawn
    panels[0].set_ylabel("mean attention")
    figure.supxlabel("positions back from the query", fontsize=8.5, color=MUTED)
    handles = panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


@svg("attention-spread", "Norm of subcomponents by head", HALF)
def spread_plot(figure: Figure, spread: HeadSpread, n: int = 12) -> None:
    """The `n` largest subcomponents of a matrix, their norm in every head stacked."""
    axes, top = figure.subplots(), spread.top(n)
    names = [name.rpartition(":")[2] for name, _ in top]
    bottom = np.zeros(len(top))
    for head in range(spread.norms.shape[1]):
        heights = np.array([norms[head] for _, norms in top])
        colour = PALETTE[head % len(PALETTE)]
        axes.bar(names, heights, 0.8, bottom=bottom, color=colour, label=f"head {head}")
        bottom += heights
    axes.set(xlabel=f"subcomponents of {spread.site}", ylabel="norm by head, stacked")
    legend_above(axes)


@svg("attention-overlap", "Overlap of heads in what they read and write", HALF)
def overlap_plot(figure: Figure, overlap: Overlap) -> None:
    """Cosines of all pairs of heads, above what random heads have."""
    panels = figure.subplots(1, len(overlap.cosines), squeeze=False)[0]
    for axes, (kind, cosines) in zip(panels, overlap.cosines.items(), strict=True):
        values = cosines.numpy().copy()
        np.fill_diagonal(values, np.nan)
        _heat(None, axes, values, signed=True, limit=max(0.3, float(np.nanmax(np.abs(values)))))
        for (i, j), value in np.ndenumerate(values):
            if i != j and len(values) <= 8:
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=INK)
        axes.set_title(f"{kind}; random {overlap.random[kind][0]:.2f}", fontsize=7.5)
        axes.set_xticks(range(len(values)))
        axes.set_yticks(range(len(values)))
    panels[0].set_ylabel("head")


@svg("attention-together", "P(k important given v important)", (10.2, 3.4))
def together_plot(figure: Figure, together: Together, n: int = 30) -> None:
    """P(k | v), left, and P(v | k), right, of the `n` most used of either matrix."""
    counts = together.n_keys, together.n_values
    keys, values = (c.topk(min(n, int((c > 0).sum()))).indices for c in counts)
    panels = figure.subplots(1, 2, sharey=True)
    both = ("P(k | v)", together.k_given_v), ("P(v | k)", together.v_given_k)
    for axes, (title, table) in zip(panels, both, strict=True):
        image = _heat(None, axes, table[keys][:, values].numpy(), signed=False, limit=1.0)
        axes.set_xticks(range(len(values)), [str(i) for i in values.tolist()], rotation=90)
        axes.tick_params(labelsize=5.5)
        axes.set(title=title, xlabel=together.values)
    panels[0].set_yticks(range(len(keys)), [str(i) for i in keys.tolist()])
    panels[0].set_ylabel(together.keys)
    figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01).outline.set_visible(False)


def _heat(
    figure: Figure | None,
    axes: Axes,
    values: np.ndarray,
    signed: bool,
    limit: float | None = None,
) -> object:
    """A matrix in colours, with a bar for them if it is alone in its figure."""
    limit = float(np.nanmax(np.abs(values))) if limit is None else limit
    limits = {"vmin": -limit if signed else 0.0, "vmax": max(limit, 1e-12)}
    cmap = _SIGNED if signed else POSITIVE
    image = axes.imshow(values, cmap=cmap, aspect="auto", interpolation="nearest", **limits)
    axes.grid(False)
    if figure is not None:
        figure.colorbar(image, ax=axes, pad=0.02).outline.set_visible(False)
    return image


def _pair_name(pair: Interaction) -> str:
    """`q:48`, a multiplication sign and `k:55`; `q.bias` of a bias."""
    first, second = (name.split(".attn.")[-1] for name in (pair.first, pair.second))
    return f"{first} \N{MULTIPLICATION SIGN} {second}"


def _short(names: Sequence[str]) -> str:
    shown = ", ".join(name.split(".attn.")[-1] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
