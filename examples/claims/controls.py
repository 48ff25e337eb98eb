"""Controls: a target that has learned nothing, and a run without the frequency term."""

from __future__ import annotations

from claims.laboratory import BASE, Laboratory
from recorded.figures import figures, l0
from recorded.plots import bar_panels
from recorded.section import Figure, Section


def section(laboratory: Laboratory) -> Section:
    """The base run beside two that should look different."""
    frequency_off = laboratory.base.replaced({"minimality.frequency": 0.0})
    runs = {
        "trained target": laboratory.run(),
        "random weights": laboratory.run(f"{BASE},random-weights", target=laboratory.untrained),
        "no frequency term": laboratory.run(f"{BASE},frequency=0", frequency_off),
    }
    modes = {name: record.report.modes for name, record in runs.items()}
    panels = {
        "L0": {name: l0(record.report) for name, record in runs.items()},
        "alive": {name: record.report.alive["total"] for name, record in runs.items()},
        "stochastic KL / KL of ablating everything": {
            name: mode["stochastic"]["kl"] / mode["zero"]["kl"] for name, mode in modes.items()
        },
    }
    return Section(
        name="controls",
        title="Controls",
        question="Not claims but checks: does the method find structure where there is none, and "
        "what does the frequency term do?",
        rows=[{"run": name, **figures(record)} for name, record in runs.items()],
        reading="Random weights: the same architecture before its training, on the same text. Its "
        "divergences can be compared with the others' only relative to ablating everything. The "
        "frequency term makes a subcomponent dearer the more often it is important.",
        figures=[
            Figure(
                "The controls beside the run",
                bar_panels("L0, alive and relative divergence of the controls", panels),
                "Right: 1 is as bad as ablating every matrix.",
            )
        ],
        records=[record.name for record in runs.values()],
    )
