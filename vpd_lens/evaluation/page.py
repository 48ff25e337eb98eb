"""An evaluation report as one self-contained HTML page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from vpd_lens.evaluation import plots
from vpd_lens.viz.html import render_template

if TYPE_CHECKING:
    from vpd_lens.evaluation.report import EvalReport

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
    report: EvalReport,
    title: str,
    beside: EvalReport | None = None,
    beside_name: str = "beside",
    name: str = "this run",
) -> str:
    """One HTML page that needs no network: figures, tables, plots and what they mean.

    Args:
        report: What was measured.
        title: Heading of the page.
        beside: Another report, shown next to the first.
        beside_name: What to call it, for example `"without the adversary"`.
        name: What to call the first report in legends.

    Returns:
        The page's HTML; light and dark follow the reader's system.
    """
    unit = UNITS[report.divergence]
    return render_template(
        "vpd_lens.evaluation",
        "page.html.j2",
        title=title,
        report=report,
        beside=beside,
        beside_name=beside_name,
        unit=unit,
        threshold=next(iter(report.l0)),
        cards=_cards(report, beside, unit),
        modes=_mode_rows(report, beside),
        attacks=_attack_rows(report, beside),
        sites=_site_rows(report),
        svg=_svgs([(name, report)] + ([(beside_name, beside)] if beside else []), unit),
    )


def _svgs(reports: plots.Named, unit: str) -> dict[str, Markup]:
    report = reports[0][1]
    drawn = {
        "histogram": plots.histogram_plot(reports),
        "l0": plots.l0_plot(reports),
        "alive": plots.alive_plot(report),
        "mean_ci": plots.mean_importance_plot(report),
        "delta": plots.delta_plot(report),
        "hidden": plots.hidden_plot(report),
    }
    if report.pgd:
        drawn["pgd"] = plots.pgd_plot(reports, unit)
    return {key: Markup(svg) for key, svg in drawn.items()}


def _cards(report: EvalReport, beside: EvalReport | None, unit: str) -> list[dict[str, str]]:
    """The headline figures: label, value, what it is, and the other report's."""
    total = f"{sum(report.n_subcomponents.values()):,}"
    threshold = next(iter(report.l0))
    attack = headline_attack(report)
    rows: list[tuple[str, str, Any]] = [
        (f"Unmasked {unit}", "every subcomponent on", lambda r: r.modes["unmasked"]["kl"]),
        (f"Stochastic {unit}", "under random ablation", lambda r: r.modes["stochastic"]["kl"]),
        ("L0", f"of {total} active", lambda r: r.l0.get(threshold, {}).get("total")),
        ("Alive", f"of {total} in use", lambda r: r.alive["total"]),
        ("Delta", "of the weights left over", lambda r: r.delta["total"]["relative"]),
    ]
    if attack:
        robust = lambda r: r.pgd.get(attack, {}).get("mean")  # noqa: E731
        rows.insert(2, (f"PGD-{attack} {unit}", "under adversarial ablation", robust))
    return [
        {
            "label": label,
            "value": _figure(label, value(report)),
            "hint": hint,
            "beside": _figure(label, value(beside)) if beside else "",
        }
        for label, hint, value in rows
    ]


def headline_attack(report: EvalReport) -> str | None:
    """20 steps, the paper's headline, or the strongest attack there is."""
    if "20" in report.pgd:
        return "20"
    return max(report.pgd, key=int, default=None)


def _figure(label: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "n/a"
    if label == "Delta":
        return f"{value:.1%}"
    if label == "Alive":
        return f"{value:,.0f}"
    if label == "L0":
        return f"{value:,.1f}"
    return number(value)


def number(value: float | None) -> str:
    """A figure with about three digits, never in exponents unless it is tiny."""
    if value is None or math.isnan(value):
        return "n/a"
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:,.2f}"


def _mode_rows(report: EvalReport, beside: EvalReport | None) -> list[dict[str, Any]]:
    worst = max(row["kl"] for row in report.modes.values()) or 1.0
    rows = []
    for mode, row in report.modes.items():
        recovered = row.get("ce_recovered", math.nan)
        rows.append(
            {
                "name": mode,
                "about": _MODES.get(mode)
                or f"on where importance exceeds {mode.partition('>')[2]}",
                "kl": number(row["kl"]),
                "share": round(100 * min(max(row["kl"] / worst, 0), 1), 1),
                "ce": number(row["ce"]) if "ce" in row else None,
                "recovered": "n/a" if math.isnan(recovered) else f"{recovered:.1%}",
                "beside": number(beside.modes.get(mode, {}).get("kl")) if beside else "",
            }
        )
    return rows


def _attack_rows(report: EvalReport, beside: EvalReport | None) -> list[dict[str, str]]:
    return [
        {
            "steps": steps,
            "mean": number(value["mean"]),
            "max": number(value["max"]),
            "beside": number(beside.pgd.get(steps, {}).get("mean")) if beside else "",
        }
        for steps, value in report.pgd.items()
    ]


def _site_rows(report: EvalReport) -> list[dict[str, str]]:
    threshold = next(iter(report.l0))
    return [
        {
            "name": site,
            "l0": f"{report.l0[threshold][site]:,.1f}",
            "alive": f"{report.alive[site]:,.0f}",
            "count": f"{count:,}",
            "delta": f"{report.delta[site]['relative']:.2%}",
            "ci": number(report.hidden_error["ci"][site]),
            "stochastic": number(report.hidden_error["stochastic"][site]),
        }
        for site, count in report.n_subcomponents.items()
    ]
