"""Claim: more capacity does not mean more subcomponents in use (no feature splitting)."""

from __future__ import annotations

import re

from claims.laboratory import BASE, Laboratory
from recorded.figures import figures, l0
from recorded.plots import line_panels
from recorded.record import RunRecord
from recorded.section import Figure, Section
from vpd_lens.analysis.comparison import MATCH, multiple_match_share
from vpd_lens.decomposition.subcomponents import resolve_counts
from vpd_lens.sites import find_sites
from vpd_lens.training import VPDConfig

CAPACITIES = (0.5, 1.0, 2.0, 4.0)


def section(laboratory: Laboratory) -> Section:
    """Half, once, twice and four times the subcomponents at every site."""
    runs = {capacity: _run(laboratory, capacity) for capacity in CAPACITIES}
    reference, reference_alive = laboratory.alive_directions(runs[1.0])
    shares = {}
    for capacity, record in runs.items():
        if capacity > 1:
            larger, alive = laboratory.alive_directions(record)
            shares[capacity] = multiple_match_share(reference, larger, (reference_alive, alive))
    panels = {
        "alive": [record.report.alive["total"] for record in runs.values()],
        "L0": [l0(record.report) for record in runs.values()],
    }
    return Section(
        name="splitting",
        title="Capacity and feature splitting",
        question="The paper: from half to four times the capacity the number of alive "
        "subcomponents stays at 6,500 to 7,000, and only 2.7 % of them have more than one match in "
        "a larger run.",
        rows=[
            {"capacity": f"{c:g}", **figures(record), "multiple matches": shares.get(c)}
            for c, record in runs.items()
        ],
        reading="Multiple matches: share of the alive subcomponents of the run of capacity 1 whose "
        f"write direction has an absolute cosine above {MATCH:g} with more than one alive "
        "subcomponent at the same site of the larger run. At half the capacity some matrices have "
        "fewer subcomponents than their rank and cannot be written exactly.",
        figures=[
            Figure(
                "What more capacity is used for",
                line_panels(
                    "Alive subcomponents and L0 against capacity",
                    "capacity, relative",
                    CAPACITIES,
                    panels,
                ),
                "The claim holds where the lines are flat from some capacity on.",
            )
        ],
        records=[record.name for record in runs.values()],
    )


def _run(laboratory: Laboratory, capacity: float) -> RunRecord:
    if capacity == 1:
        return laboratory.run()
    return laboratory.run(f"{BASE},capacity={capacity:g}", _scaled(laboratory, capacity))


def _scaled(laboratory: Laboratory, capacity: float) -> VPDConfig:
    sites = find_sites(laboratory.target.load())
    counts = resolve_counts(sites, laboratory.base.n_subcomponents)
    scaled = {
        f"^{re.escape(site.name)}$": max(1, round(capacity * count))
        for site, count in zip(sites, counts, strict=True)
    }
    return laboratory.base.replaced({"n_subcomponents": scaled})
