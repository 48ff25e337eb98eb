"""Question: do runs that differ in nothing but the seed find the same subcomponents?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from statistics import fmean

from claims.laboratory import BASE, Laboratory
from recorded.plots import bar_panels
from recorded.record import RunRecord
from recorded.section import Cell, Figure, Section
from vpd_lens.analysis.comparison import Comparison, Similarity, compare, random_baseline

N_SEEDS = 3
QUANTITIES = {"V": "v", "U": "u", "rank-1": "rank_one"}
PAPER = {"V": (0.52, 0.13), "U": (0.48, 0.13), "rank-1": (0.28, 0.01)}


def section(laboratory: Laboratory) -> Section:
    """Mean max cosine similarity over all ordered pairs of three seeds, and that of chance.

    Where the configuration's seeds share a start, three seeds with random starts come second.
    """
    starts = dict.fromkeys([laboratory.base.initialisation, "random"])
    rows, bars, records = [], {}, []
    for start in starts:
        found = _seeds(laboratory, start)
        records += found
        between, chance = _compared(laboratory, found)
        rows.append(_row(start, "all sites", between, chance, lambda c: c.overall))
        rows += [
            _row(start, site, between, chance, lambda c, site=site: c.sites[site])
            for site in between[0].sites
        ]
        bars |= {f"{start} start": between, f"chance ({start})": chance}
    panels = {
        f"{name} (paper: {PAPER[name][0]}, random {PAPER[name][1]})": {
            bar: _mean(pairs, field, lambda c: c.overall) for bar, pairs in bars.items()
        }
        for name, field in QUANTITIES.items()
    }
    return Section(
        name="seeds",
        title="Consistency over seeds",
        question="The paper: the mean max cosine similarity between seeds is 0.52 for V, 0.48 for "
        "U and 0.28 for the rank-1 matrices; random initialisations give 0.13, 0.13 and 0.01.",
        rows=rows,
        reading=f"Means over all ordered pairs of {N_SEEDS} seeds and over the alive subcomponents "
        "of the first of a pair. Chance: Gaussian directions of the same shapes and numbers. In a "
        "narrow model chance alone gives large cosines, so look at the distance from it. Seeds "
        "with an aligned start all begin along the same neurons and head dimensions, as in the "
        "preset for small models; the paper's experiment is the one with random starts.",
        figures=[
            Figure(
                "All sites",
                bar_panels("Similarity between seeds, and by chance", panels),
                "1: everything that one seed finds, another finds too.",
            )
        ],
        records=[record.name for record in records],
    )


def _seeds(laboratory: Laboratory, start: str) -> list[RunRecord]:
    """Runs of `N_SEEDS` seeds with a start, the base's among them."""
    base = laboratory.base
    name = BASE if start == base.initialisation else f"{BASE},start={start}"
    return [
        laboratory.run(
            name if seed == base.seed else f"{name},seed={seed}",
            base.replaced({"seed": seed, "initialisation": start}),
        )
        for seed in range(base.seed, base.seed + N_SEEDS)
    ]


def _compared(
    laboratory: Laboratory, records: list[RunRecord]
) -> tuple[list[Comparison], list[Comparison]]:
    """All ordered pairs of runs, and random directions in their place."""
    found = [laboratory.alive_directions(record) for record in records]
    between, chance = [], []
    for index, ((a, a_alive), (b, b_alive)) in enumerate(permutations(found, 2)):
        between.append(compare(a, b, (a_alive, b_alive)))
        chance.append(random_baseline(a, b, (a_alive, b_alive), seed=index))
    return between, chance


Part = Callable[[Comparison], Similarity]


def _row(
    start: str, site: str, between: list[Comparison], chance: list[Comparison], part: Part
) -> dict[str, Cell]:
    row: dict[str, Cell] = {
        "start": start,
        "site": site,
        "alive": round(fmean(part(c).n_reference for c in between)),
    }
    for quantity, field in QUANTITIES.items():
        row[quantity] = _mean(between, field, part)
        row[f"{quantity}, chance"] = _mean(chance, field, part)
    return row


def _mean(comparisons: list[Comparison], field: str, part: Part) -> float:
    return fmean(getattr(part(comparison), field) for comparison in comparisons)
