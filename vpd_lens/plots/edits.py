"""Figures of edits: side effects by regime, edits beside adapters, and doses of one scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vpd_lens.plots.style import HALF, PALETTE, canvas, ink, legend_above, muted, panel

if TYPE_CHECKING:
    from vpd_lens.editing.effects import SideEffects

REGIMES = {"around": "around it", "elsewhere": "everywhere else"}


def side_effects(result: SideEffects, *, ax: Axes | None = None) -> Figure:
    """KL from the unedited model by regime, with two standard errors."""
    names = [name for name, measured in result.kl.items() if measured.n]
    means = [result.kl[name].mean for name in names]
    errors = [2 * result.kl[name].error for name in names]
    places = range(len(names))
    with panel("KL from the unedited model by regime", (6.0, 2.2), ax) as (figure, axes):
        axes.barh(places, means, xerr=errors, color=PALETTE[0], height=0.6, ecolor=ink())
        axes.set_yticks(places, [f"KL {name}" for name in names])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("nats per position, with two standard errors")
        if result.target:
            before, after = (result.target[when].mean for when in ("before", "after"))
            axes.set_title(f"P({result.token!r}) {before:.3f} to {after:.3f}", loc="left")
    return figure


def edits_pareto(record: Mapping[str, Any]) -> Figure:
    """Probability of the intended token against the KL around and elsewhere, by series.

    Of a record that `examples/edits.py` wrote.
    """
    series: dict[str, list[Any]] = defaultdict(list)
    for point in record["points"]:
        series[point["series"]].append(point)
    with canvas("Edits and adapters: what they change, and what else", (9.6, 3.0)) as figure:
        panels = figure.subplots(1, len(REGIMES), sharey=True)
        for axes, (regime, label) in zip(panels, REGIMES.items(), strict=True):
            for number, (name, points) in enumerate(series.items()):
                ours = not name.startswith("LoRA")
                few = " 10 " in name
                axes.plot(
                    [point[regime][0] for point in points],
                    [point["after"][0] for point in points],
                    "o-" if ours else "^--",
                    color=PALETTE[number % len(PALETTE)] if ours else PALETTE[(2 + number) % 7],
                    markersize=4 if few or name == "no data" else 5.5,
                    markerfacecolor="none" if few else None,
                    linewidth=1.2,
                    label=name,
                )
            axes.set(xscale="log", xlabel=f"KL {label}, nats")
        panels[0].set_ylabel(f"P({record['behaviour']['after']!r}) where it acts")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=7, labelcolor=muted())
    return figure


def doses(found: Sequence[Mapping[str, Any]], *, ax: Axes | None = None) -> Figure:
    """Rise of the cross-entropy by kind of text, against the factor of one subcomponent."""
    factors = [dose["factor"] for dose in found]
    kinds = [kind for kind in found[0] if kind != "factor"]
    with panel("Rise of the loss by the factor of one subcomponent", HALF, ax) as (figure, axes):
        for kind, colour in zip(kinds, (PALETTE[4], PALETTE[0]), strict=False):
            means = [dose[kind][0] for dose in found]
            errors = [2 * dose[kind][1] for dose in found]
            how = {"marker": "o", "markersize": 4, "color": colour, "label": kind}
            axes.errorbar(factors, means, errors, **how)
        axes.set(xlabel="factor of the subcomponent", ylabel="rise of the loss, nats")
        legend_above(axes)
    return figure
