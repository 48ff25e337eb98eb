"""Claim: without the adversarial loss, some choice of masks destroys the output.

Training without it keeps fewer subcomponents in use at the same coefficient, and a run that calls
more of the model important is easier to defend. So a second run without it has a coefficient that
brings its L0 to that of the run with it, or above.
"""

from __future__ import annotations

from claims.laboratory import WITHOUT, WITHOUT_GENTLER, Laboratory
from recorded.figures import figures
from recorded.section import Figure, Section
from vpd_lens import plots

GENTLER = 0.3


def section(laboratory: Laboratory) -> Section:
    """The same run with and without the adversarial loss, under ever longer attacks."""
    without = laboratory.base.without_adversary()
    coefficient = without.minimality.coefficient * GENTLER
    gentler = without.replaced({"minimality.coefficient": coefficient})
    runs = {
        "with the adversary": laboratory.run(),
        "without it": laboratory.run(WITHOUT, without),
        f"without it, coefficient {coefficient:g}": laboratory.run(WITHOUT_GENTLER, gentler),
    }
    rows = []
    for name, record in runs.items():
        row = {"training": name, **figures(record)}
        curve = {f"PGD-{step}": value["mean"] for step, value in record.report.pgd.items()}
        kept = ("training", "L0", "alive", "unmasked", "stochastic", "ci", "zero")
        rows.append({key: row[key] for key in kept} | curve)
    reports = {name: record.report for name, record in runs.items()}
    return Section(
        name="adversary",
        title="The adversary in training",
        question="The paper: training without the adversary leaves masks that destroy the output; "
        "training with it leaves far fewer. Its KL after 20, 40, 80, 160 and 320 steps of the "
        "evaluation's adversary: 0.83, 1.35, 3.84, 25.3, 40.2, against 67.2 with everything "
        "ablated.",
        rows=rows,
        reading="PGD: mean over the adversary's starts, by its steps. Compare at similar L0: a run "
        "that calls more of the model important is easier to defend.",
        figures=[
            Figure(
                "Adversarial ablation",
                plots.as_svg(plots.adversary(reports)),
                "Mean over starts as a line, up to the worst as shading. The claim holds where the "
                "run with the adversary lies below the other.",
                wide=False,
            )
        ],
        records=[record.name for record in runs.values()],
    )
