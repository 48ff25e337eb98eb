"""Claim: L0 far below the dense count at a small loss; SPD on the same axes."""

from __future__ import annotations

from claims.laboratory import BASE, Laboratory
from recorded.figures import figures
from recorded.record import RunRecord
from recorded.section import Figure, Section
from vpd_lens import plots
from vpd_lens.training import VPDConfig

COEFFICIENTS = (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3)
# SPD's layer-wise loss takes one forward pass per site, so it gets fewer points.
SPD_COEFFICIENTS = (5e-5, 5e-4, 5e-3)


def section(laboratory: Laboratory) -> Section:
    """Importance coefficients over two decades, by VPD and by SPD."""
    runs = [("VPD", c, _run(laboratory, laboratory.base, c, BASE)) for c in COEFFICIENTS]
    spd = as_spd(laboratory.base)
    runs += [("SPD", c, _run(laboratory, spd, c, "spd")) for c in SPD_COEFFICIENTS]
    series = {
        name: {f"{c:g}": record.report for method, c, record in runs if method == name}
        for name in ("VPD", "SPD")
    }
    return Section(
        name="pareto",
        title="Sparsity against reconstruction",
        question="The paper: a whole transformer, attention included, is decomposed with few "
        "subcomponents in use per position (205 of 9,972 alive ones).",
        rows=[
            {"method": method, "coefficient": f"{c:g}", **figures(record)}
            for method, c, record in runs
        ],
        reading="The coefficient is that of importance minimality, the first thing to tune. SPD is "
        "the predecessor: no adversary, no frequency term.",
        figures=[
            Figure(
                "Two decades of the importance coefficient",
                plots.as_svg(plots.pareto(*series.values(), names=list(series))),
                "Points are labelled with the coefficient; lower left is better. An SPD run may "
                "look as good under random masks (right) and be worse under the adversary (left).",
            )
        ],
        records=[record.name for _, _, record in runs],
    )


def as_spd(config: VPDConfig) -> VPDConfig:
    """The losses of the SPD preset in a run that is otherwise `config`."""
    spd = VPDConfig.spd()
    return config.replaced(
        {
            "stochastic": spd.stochastic.model_dump(),
            "adversary": spd.adversary.model_dump(),
            "minimality.frequency": spd.minimality.frequency,
            # Every site masked alone would be a graph of its own.
            "compile": False,
        }
    )


def _run(laboratory: Laboratory, config: VPDConfig, coefficient: float, name: str) -> RunRecord:
    changed = config.replaced({"minimality.coefficient": coefficient})
    if changed == laboratory.base:
        return laboratory.run()
    return laboratory.run(f"{name},coefficient={coefficient:g}", changed)
