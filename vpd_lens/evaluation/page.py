"""An evaluation report as one self-contained HTML page, or its main plots as pictures."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from markupsafe import Markup

from vpd_lens.evaluation import audit_plots, plots
from vpd_lens.evaluation.report import EvalReport
from vpd_lens.evaluation.verdict import findings
from vpd_lens.viz.html import render_template
from vpd_lens.viz.svg import write_png

_MODES = {
    "target": "the original model, for comparison",
    "unmasked": "every subcomponent on, delta off",
    "stochastic": "random masks between importance and 1, at every site",
    "stochastic_subset": "the same at a random subset of the sites, as in training",
    "ci": "the importances themselves as masks",
    "random": "uniform masks that ignore the importances",
    "zero": "every decomposed matrix off",
}
UNITS = {"kl": "KL", "mse": "MSE", "custom": "divergence"}


def render(
    report: EvalReport, title: str, beside: EvalReport | None = None, beside_name: str = "beside"
) -> str:
    """One HTML page that needs no network; `beside` is another report, shown next to the first."""
    unit = UNITS[report.divergence]
    named = [("this run", report)] + ([(beside_name, beside)] if beside else [])
    svg = {
        "histogram": plots.histogram_plot(named),
        "l0": plots.l0_plot(named),
        "alive": plots.alive_plot(report),
        "mean_ci": plots.mean_importance_plot(report),
        "delta": plots.delta_plot(report),
        "hidden": plots.hidden_plot(report),
    }
    if report.pgd:
        svg["pgd"] = plots.pgd_plot(named, unit)
    if report.audit is not None:
        svg["aggregation"] = audit_plots.aggregation_plot(report, unit)
        svg["levels"] = audit_plots.levels_plot(report, unit)
        svg["layers"] = audit_plots.layers_plot(report, unit)
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
        svg={name: Markup(text) for name, text in svg.items()},
    )


def pictures(report: EvalReport, folder: Path) -> dict[str, str]:
    """Write the main plots into a folder; the name of each file, with what it shows."""
    unit, named, to = UNITS[report.divergence], [("", report)], partial(write_png, folder)
    drawn = [plots.l0_plot(named, to=to), plots.mean_importance_plot(report, to=to)]
    if report.pgd:
        drawn.append(plots.pgd_plot(named, unit, to=to))
    if report.audit is not None:
        shown = (audit_plots.aggregation_plot, audit_plots.levels_plot, audit_plots.layers_plot)
        drawn += [plot(report, unit, to=to) for plot in shown]
    return dict(drawn)


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


def headline_attack(report: EvalReport) -> str | None:
    """20 steps, the paper's headline, or the strongest attack there is."""
    return "20" if "20" in report.pgd else max(report.pgd, key=int, default=None)


def number(value: float | None, form: str = "") -> str:
    """A figure as `form` says, or with about three digits, in exponents only if it is tiny."""
    if value is None or math.isnan(value):
        return "n/a"
    if form:
        return form.format(value)
    if abs(value) < 1e-4:
        return f"{value:.1e}" if value else "0"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:,.2f}"
