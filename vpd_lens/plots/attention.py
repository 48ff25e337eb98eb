"""Figures of attention.

Source: the paper's figures of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vpd_lens.plots.style import (
    BESIDE,
    FULL,
    HALF,
    PALETTE,
    canvas,
    heat,
    ink,
    legend_above,
    muted,
    panel,
    plain,
)

if TYPE_CHECKING:
    from vpd_lens.analysis.attention.data import PatternChange, Together
    from vpd_lens.analysis.attention.heads import HeadSpread, Overlap
    from vpd_lens.analysis.attention.interactions import Interaction, Interactions


def qk_offsets(
    interactions: Interactions, pairs: Sequence[Interaction], columns: int = 4
) -> Figure:
    """One panel per head: every pair by the distance back from the query.

    Of static interactions or of mean contributions; `pairs` such as `interactions.top(5)`.
    """
    with canvas("Pairs of q and k subcomponents by distance and head", FULL) as figure:
        n = len(interactions.values)
        rows = -(-n // columns)
        panels = figure.subplots(rows, min(n, columns), sharex=True, sharey=True, squeeze=False)
        for head, axes in enumerate(panels.flat):
            if head >= n:
                axes.set_visible(False)
                continue
            axes.axhline(0, color=muted(), linewidth=0.6)
            for pair, colour in zip(pairs, PALETTE, strict=False):
                values = interactions.of(pair.first, pair.second)[head].tolist()
                axes.plot(interactions.offsets, values, "o-", color=colour, markersize=2.5,
                          label=_pair_name(pair.first, pair.second))  # fmt: skip
            axes.set_title(f"head {head}")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.supxlabel("positions back from the query", fontsize=8.5, color=muted())
        panels[0, 0].set_ylabel(interactions.kind, fontsize=7.5)
        handles = panels[0, 0].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def qk_pair(
    interactions: Interactions, first: str, second: str, *, ax: Axes | None = None
) -> Figure:
    """Heads by distances, of one pair."""
    with panel("One pair of subcomponents by head and distance", HALF, ax) as (figure, axes):
        values = interactions.of(first, second).numpy()
        image = heat(axes, values, signed=True)
        figure.colorbar(image, ax=axes, pad=0.02).outline.set_visible(False)
        axes.set(xlabel="positions back from the query", ylabel="head")
        axes.set_xticks(range(len(interactions.offsets)), [str(o) for o in interactions.offsets])
        axes.set_yticks(range(len(values)))
        name = _pair_name(first, second)
        axes.set_title(f"{name}, {interactions.kind}", loc="left")
    return figure


def qk_matrix(interactions: Interactions, offset: int, n: int = 24) -> Figure:
    """Every pair of the `n` largest of either matrix, at one distance, head by head."""
    with canvas("Pairs of subcomponents, q by k, in every head", (10.2, 3.0)) as figure:
        values = interactions.values[:, interactions.offsets.index(offset)]
        sizes = [values.abs().amax((0, axis)) for axis in (2, 1)]
        rows, columns = (s.topk(min(n, len(s))).indices.sort().values for s in sizes)
        chosen = values[:, rows][:, :, columns].numpy()
        panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
        limit = float(np.abs(chosen).max())
        for head, axes in enumerate(panels):
            image = heat(axes, chosen[head], signed=True, limit=limit)
            names = (interactions.columns[i].rpartition(":")[2] for i in columns.tolist())
            axes.set_xticks(range(len(columns)), [n.split(".")[-1] for n in names], rotation=90)
            axes.tick_params(labelsize=5)
            axes.set_title(f"head {head}")
        names = (interactions.rows[i].rpartition(":")[2] for i in rows.tolist())
        panels[0].set_yticks(range(len(rows)), [n.split(".")[-1] for n in names])
        first, second = (
            site.rpartition(".")[2] for site in (interactions.first, interactions.second)
        )
        panels[0].set_ylabel(first)
        panels[0].set_xlabel(second)
        bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01)
        bar.outline.set_visible(False)
        figure.suptitle(f"{interactions.kind}, {offset} back", fontsize=8, color=muted())
    return figure


def attention_patterns(
    patterns: Sequence[tuple[str, Float[Tensor, "query key"]]],
    strings: Sequence[str],
) -> Figure:
    """Patterns of one head side by side, under their titles, with the prompt's tokens."""
    with canvas("Attention patterns with and without subcomponents", (10.2, 3.3)) as figure:
        panels = figure.subplots(1, len(patterns), sharey=True, squeeze=False)[0]
        shown = [plain(string) for string in strings]
        for axes, (title, pattern) in zip(panels, patterns, strict=True):
            image = heat(axes, pattern.float().numpy(), signed=False, limit=1.0)
            axes.set_xticks(range(len(shown)), shown, rotation=90)
            axes.tick_params(labelsize=6, labelfontfamily="monospace")
            axes.set_title(title, loc="left")
            axes.set_xlabel("key")
        panels[0].set_yticks(range(len(shown)), shown)
        panels[0].set_ylabel("query")
        figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01).outline.set_visible(False)
    return figure


def attention_ablation(changes: Sequence[PatternChange], layer: int) -> Figure:
    """Mean attention by distance, one panel per head: with all, and without each set."""
    with canvas("Mean attention by distance with and without subcomponents", FULL) as figure:
        before = changes[0].before[layer]
        panels = figure.subplots(1, len(before.attention), sharey=True, squeeze=False)[0]
        for head, axes in enumerate(panels):
            curves = [("all", before, ink())]
            for change, colour in zip(changes, (BESIDE, *PALETTE[1::2]), strict=False):
                curves.append((f"without {_short(change.ablated)}", change.after[layer], colour))
            for label, profile, colour in curves:
                values = profile.attention[head].tolist()
                axes.plot(profile.offsets, values, "o-", color=colour, markersize=2.5, label=label)
            axes.set_title(f"head {head}")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panels[0].set_ylim(bottom=0)  # of all, when all are drawn
        panels[0].set_ylabel("mean attention")
        figure.supxlabel("positions back from the query", fontsize=8.5, color=muted())
        handles = panels[0].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def head_spread(spread: HeadSpread, n: int = 12, *, ax: Axes | None = None) -> Figure:
    """The `n` largest subcomponents of a matrix, their norm in every head stacked."""
    with panel("Norm of subcomponents by head", HALF, ax) as (figure, axes):
        top = spread.top(n)
        names = [name.rpartition(":")[2] for name, _ in top]
        bottom = np.zeros(len(top))
        for head in range(spread.norms.shape[1]):
            heights = np.array([norms[head] for _, norms in top])
            colour = PALETTE[head % len(PALETTE)]
            axes.bar(names, heights, 0.8, bottom=bottom, color=colour, label=f"head {head}")
            bottom += heights
        axes.set(xlabel=f"subcomponents of {spread.site}", ylabel="norm by head, stacked")
        legend_above(axes)
    return figure


def head_overlap(overlap: Overlap) -> Figure:
    """Cosines of all pairs of heads, above what random heads have."""
    with canvas("Overlap of heads in what they read and write", HALF) as figure:
        panels = figure.subplots(1, len(overlap.cosines), squeeze=False)[0]
        for axes, (kind, cosines) in zip(panels, overlap.cosines.items(), strict=True):
            values = cosines.numpy().copy()
            np.fill_diagonal(values, np.nan)
            heat(axes, values, signed=True, limit=max(0.3, float(np.nanmax(np.abs(values)))))
            for (i, j), value in np.ndenumerate(values):
                if i != j and len(values) <= 8:
                    axes.text(
                        j, i, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=ink()
                    )
            axes.set_title(f"{kind}; random {overlap.random[kind][0]:.2f}", fontsize=7.5)
            axes.set_xticks(range(len(values)))
            axes.set_yticks(range(len(values)))
        panels[0].set_ylabel("head")
    return figure


def used_together(together: Together, n: int = 30) -> Figure:
    """P(k | v), left, and P(v | k), right, of the `n` most used of either matrix."""
    with canvas("P(k important given v important)", (10.2, 3.4)) as figure:
        counts = together.n_keys, together.n_values
        keys, values = (c.topk(min(n, int((c > 0).sum()))).indices for c in counts)
        panels = figure.subplots(1, 2, sharey=True)
        both = ("P(k | v)", together.k_given_v), ("P(v | k)", together.v_given_k)
        for axes, (title, table) in zip(panels, both, strict=True):
            image = heat(axes, table[keys][:, values].numpy(), signed=False, limit=1.0)
            axes.set_xticks(range(len(values)), [str(i) for i in values.tolist()], rotation=90)
            axes.tick_params(labelsize=5.5)
            axes.set(title=title, xlabel=together.values)
        panels[0].set_yticks(range(len(keys)), [str(i) for i in keys.tolist()])
        panels[0].set_ylabel(together.keys)
        figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01).outline.set_visible(False)
    return figure


def _pair_name(first: str, second: str) -> str:
    """`q:48`, a multiplication sign and `k:55`; `q.bias` of a bias."""
    first, second = (name.split(".attn.")[-1] for name in (first, second))
    return f"{first} \N{MULTIPLICATION SIGN} {second}"


def _short(names: Sequence[str]) -> str:
    shown = ", ".join(name.split(".attn.")[-1] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
