"""Figures of a text and of a subcomponent: what is needed where, and which tokens it promotes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vpd_lens.plots.style import BESIDE, HALF, MAIN, heat, ink, muted, panel, plain

if TYPE_CHECKING:
    from vpd_lens.analysis.cards import Card
    from vpd_lens.analysis.explain import Explanation


def needs(explanation: Explanation, *, ax: Axes | None = None) -> Figure:
    """How many subcomponents of every matrix each token needs; larger dots for more."""
    counts = explanation.counts()
    names, table = list(counts), torch.stack(list(counts.values()))  # [site, pos]
    y, x = torch.ones_like(table).nonzero().T
    size = 2 + 0.38 * len(explanation.strings), 0.9 + 0.14 * len(names)
    with panel("Subcomponents in use, tokens by matrices", size, ax) as (figure, axes):
        dots = 90 * table.flatten() / table.max().clamp(min=1)
        axes.scatter(x, y, s=dots.tolist(), color=MAIN, linewidths=0)
        _token_axis(axes, explanation.strings)
        axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=6.5)
        axes.set_title(
            f"subcomponents in use: {int(table.min())} to {int(table.max())} of a matrix at a "
            "token", loc="left", color=muted(),
        )  # fmt: skip
        blocks = [name.split(".")[:2] for name in names]
        for row in range(1, len(blocks)):
            if blocks[row] != blocks[row - 1]:
                axes.axhline(row - 0.5, color=muted(), linewidth=0.5)
    return figure


def importances(
    explanation: Explanation,
    names: Sequence[str] | None = None,
    k: int = 20,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Causal importances on a text, subcomponents by tokens.

    Args:
        explanation: What `explain` found.
        names: The subcomponents; by default those of the largest effects anywhere.
        k: How many of these.
        ax: Where to draw.

    Raises:
        InputError: If there is no subcomponent of that name.
    """
    if names is None:
        largest = explanation.effect.abs().where(
            explanation.importance > explanation.threshold, 0
        )  # [pos, C_total]
        columns = largest.amax(0).topk(min(k, largest.shape[1])).indices.sort().values.tolist()
        names = [explanation.name(column) for column in columns]
    else:
        columns = [explanation.column(name) for name in names]
    values = explanation.importance[:, columns].T.clamp(0, 1)
    size = 2.4 + 0.38 * len(explanation.strings), 0.9 + 0.17 * len(names)
    with panel("Causal importances, subcomponents by tokens", size, ax) as (figure, axes):
        image = heat(axes, values.numpy(), signed=False, limit=1.0)
        _token_axis(axes, explanation.strings)
        axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=6.5)
        figure.colorbar(image, ax=axes, pad=0.02, label="causal importance").outline.set_visible(
            False
        )
    return figure


def logit_effects(card: Card, *, ax: Axes | None = None) -> Figure:
    """The tokens whose logits a subcomponent raises and lowers most, directly.

    Of one unit of its activation, less the mean over tokens; empty where it writes no residual
    stream.
    """
    rows = [*card.promotes, *reversed(card.suppresses)]
    size = HALF[0], 0.9 + 0.19 * len(rows)
    with panel(f"Tokens that {card.name} promotes and suppresses", size, ax) as (figure, axes):
        effects = [row.value for row in rows]
        colours = [MAIN if effect > 0 else BESIDE for effect in effects]
        bars = axes.barh(range(len(rows)), effects, 0.75, color=colours)
        axes.bar_label(bars, fmt="{:+.2f}", fontsize=7, color=muted(), padding=2)
        axes.set_yticks(range(len(rows)), [plain(repr(row.token)) for row in rows])
        axes.tick_params(axis="y", labelcolor=ink(), labelfontfamily="monospace")
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.axvline(0, color=muted(), linewidth=0.6)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="effect on the logit of one unit of activation")
        axes.set_title(card.name, loc="left")
    return figure


def _token_axis(axes: Axes, strings: Sequence[str]) -> None:
    axes.set_xticks(range(len(strings)), [plain(s) for s in strings], family="monospace")
    axes.tick_params(axis="x", length=0, labelcolor=ink())


def _short(name: str) -> str:
    return name.removeprefix("blocks.")
