"""The paper's claims in small, one module each: a function from a laboratory to a section."""

from collections.abc import Callable

from vpd_lens.experiments.claims import (
    adversary,
    controls,
    generations,
    pareto,
    seeds,
    splitting,
)
from vpd_lens.experiments.laboratory import Laboratory
from vpd_lens.experiments.section import Section

CLAIMS: dict[str, Callable[[Laboratory], Section]] = {
    "adversary": adversary.section,
    "pareto": pareto.section,
    "splitting": splitting.section,
    "seeds": seeds.section,
    "controls": controls.section,
    "generations": generations.section,
}

__all__ = ["CLAIMS"]
