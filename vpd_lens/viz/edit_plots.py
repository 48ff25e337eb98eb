"""Figures of edits: side effects by regime, edits beside adapters, and doses of one scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from vpd_lens.editing.effects import SideEffects
from vpd_lens.viz.svg import INK, MUTED, PALETTE, draw, legend_above

REGIMES = {"around": "around it", "elsewhere": "everywhere else"}


def side_effects_plot(result: SideEffects) -> str:
    """KL from the unedited model by regime, with two standard errors, as an inline SVG."""

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        names = [name for name, measured in result.kl.items() if measured.n]
        means = [result.kl[name].mean for name in names]
        errors = [2 * result.kl[name].error for name in names]
        places = range(len(names))
        axes.barh(places, means, xerr=errors, color=PALETTE[0], height=0.6, ecolor=INK)
        axes.set_yticks(places, [f"KL {name}" for name in names])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("nats per position, with two standard errors")
        if result.target:
            before, after = (result.target[when].mean for when in ("before", "after"))
            axes.set_title(f"P({result.token!r}) {before:.3f} to {after:.3f}", loc="left")

    return draw("side-effects", "KL from the unedited model by regime", (6.0, 2.2), fill)


def fill_pareto(figure: Figure, record: Mapping[str, Any]) -> None:
    """Probability of the intended token against the KL around and elsewhere, by series."""
    series: dict[str, list[Any]] = defaultdict(list)
    for point in record["points"]:
        series[point["series"]].append(point)
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
    figure.legend(handles, labels, loc="outside right center", fontsize=7, labelcolor=MUTED)


def fill_dose(figure: Figure, doses: Sequence[Mapping[str, Any]]) -> None:
    """Rise of the cross-entropy by kind of text, against the factor of one subcomponent."""
    axes = figure.subplots()
    factors = [dose["factor"] for dose in doses]
    kinds = [kind for kind in doses[0] if kind != "factor"]
    for kind, colour in zip(kinds, (PALETTE[4], PALETTE[0]), strict=False):
        means = [dose[kind][0] for dose in doses]
        errors = [2 * dose[kind][1] for dose in doses]
        axes.errorbar(factors, means, errors, marker="o", markersize=4, color=colour, label=kind)
    axes.set(xlabel="factor of the subcomponent", ylabel="rise of the loss, nats")
    legend_above(axes)
