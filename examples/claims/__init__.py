"""The paper's claims in small, one module each: a function from a laboratory to a section."""

from collections.abc import Callable

from claims import (
    adversary,
    controls,
    generations,
    pareto,
    seeds,
    splitting,
)
from claims.laboratory import Laboratory
from recorded.section import Section

CLAIMS: dict[str, Callable[[Laboratory], Section]] = {
    "adversary": adversary.section,
    "pareto": pareto.section,
    "splitting": splitting.section,
    "seeds": seeds.section,
    "controls": controls.section,
    "generations": generations.section,
}

__all__ = ["CLAIMS"]
