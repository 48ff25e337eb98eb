"""An evaluation report as one self-contained HTML page, or its main plots as pictures."""

from __future__ import annotations

import math
from pathlib import Path

from markupsafe import Markup

from vpd_lens import plots
from vpd_lens.evaluation.report import UNITS, EvalReport, headline_attack
from vpd_lens.evaluation.verdict import findings
from vpd_lens.plots.style import as_svg
from vpd_lens.viz.html import render_template

_MODES = {
    "target": "the original model, for comparison",
    "unmasked": "every subcomponent on, delta off",
    "stochastic": "random masks between importance and 1, at every site",
    "stochastic_subset": "the same at a random subset of the sites, as in training",
    "ci": "the importances themselves as masks",
    "random": "uniform masks that ignore the importances",
    "zero": "every decomposed matrix off",
}


def render(
    report: EvalReport, title: str, beside: EvalReport | None = None, beside_name: str = "beside"
) -> str:
    """One HTML page that needs no network; `beside` is another report, shown next to the first."""
    unit = UNITS[report.divergence]
    runs = {"this run": report} | ({beside_name: beside} if beside else {})
    figures = {
        "histogram": plots.importance_histogram(runs),
        "l0": plots.l0(runs),
        "alive": plots.alive(report),
        "mean_ci": plots.mean_importance(report),
        "delta": plots.delta(report),
        "hidden": plots.hidden_error(report),
    }
    if report.pgd:
        figures["pgd"] = plots.adversary(runs)
    if report.audit is not None:
        figures["aggregation"] = plots.donors(report)
        figures["levels"] = plots.levels(report)
        figures["layers"] = plots.layers(report)
    return render_template(
        "vpd_lens.evaluation",
        "page.html.j2",
        title=title,
        report=report,
        beside=beside,
        beside_name=beside_name,
        unit=unit,
        threshold=next(iter(report.l0)),
        findings=findings(report),
        cards=_cards(report, report, unit),
        other_cards=_cards(beside, report, unit) if beside else {},
        about=_MODES,
        worst=max(row["kl"] for row in report.modes.values()) or 1.0,
        number=number,
        svg={name: Markup(as_svg(figure)) for name, figure in figures.items()},
    )


def pictures(report: EvalReport, folder: Path) -> dict[str, str]:
    """Write the main plots into a folder; the name of each file, with what it shows."""
    figures = {"l0": plots.l0(report), "mean-ci": plots.mean_importance(report)}
    if report.pgd:
        figures["pgd"] = plots.adversary(report)
    if report.audit is not None:
        figures["aggregation"] = plots.donors(report)
        figures |= {"levels": plots.levels(report), "layers": plots.layers(report)}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=160)
    return {f"{name}.png": str(figure.get_label()) for name, figure in figures.items()}


def _cards(report: EvalReport, of: EvalReport, unit: str) -> dict[str, tuple[str, str]]:
    """What the headline figures of a page on `of` are called, what they say, and `report`'s."""
    attack, threshold = headline_attack(of), next(iter(of.l0))
    total = f"of {sum(of.n_subcomponents.values()):,}"
    l0, pgd = report.l0.get(threshold, {}), report.pgd.get(attack or "", {})
    idle = of.idle()
    useful = "" if math.isnan(idle) else f", {1 - idle:.0%} of them contributing"
    cards = {
        f"Unmasked {unit}": ("every subcomponent on", number(report.modes["unmasked"]["kl"])),
        f"Stochastic {unit}": ("under random ablation", number(report.modes["stochastic"]["kl"])),
    }
    if attack:
        cards[f"PGD-{attack} {unit}"] = ("under adversarial ablation", number(pgd.get("mean")))
    return cards | {
        "L0": (f"{total} active{useful}", number(l0.get("total"), "{:,.1f}")),
        "Alive": (f"{total} in use", number(report.alive["total"], "{:,.0f}")),
        "Delta": ("of the weights left over", number(report.delta["total"]["relative"], "{:.1%}")),
    }


def number(value: float | None, form: str = "") -> str:
    """A figure as `form` says, or with about three digits, in exponents only if it is tiny."""
    if value is None or math.isnan(value):
        return "n/a"
    if form:
        return form.format(value)
    if abs(value) < 1e-4:
        return f"{value:.1e}" if value else "0"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:,.2f}"
