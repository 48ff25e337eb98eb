"""Which pair is merged next. Every sampler turns one uniform number into a pair, exactly.

| | the pair | work per merge |
|---|---|---|
| `Best` | of the least cost | a few rows |
| `Rank` | the J-th in order of cost, `P(J) ~ exp(-gamma J)`, J = 0, 1, ... | a few rows |
| `Range` | any of a cost in the lowest share of the range of costs, uniformly | all pairs |
| `Boltzmann` | any, `P ~ exp(-cost / temperature)` | all pairs |

Source: VPD, clustering (`Rank`), and the authors' code (the others).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import expm1, log1p
from typing import NamedTuple

import numpy as np

from vpd_lens.analysis.clustering.merging import Groups, Pair
from vpd_lens.errors import InputError


class Choice(NamedTuple):
    """A pair to be merged, what it costs, and what the cheapest would, in bits per position."""

    first: int
    second: int
    cost: float
    best: float


class Sampler(ABC):
    """How to choose among pairs."""

    def choose(self, groups: Groups, uniform: float) -> Choice:
        """The pair that a number, uniform in [0, 1), stands for."""
        pair, best = self.drawn(groups, uniform)
        costs = (groups.cost(gain) / groups.n_positions for gain in (pair.gain, best))
        return Choice(pair.first, pair.second, *costs)

    @abstractmethod
    def drawn(self, groups: Groups, uniform: float) -> tuple[Pair, float]:
        """A pair, and the largest gain of any."""


@dataclass(frozen=True)
class Best(Sampler):
    """Always the pair of the least cost."""

    def drawn(self, groups: Groups, uniform: float) -> tuple[Pair, float]:
        """See `Sampler`."""
        (pair,) = groups.best(1)
        return pair, pair.gain


@dataclass(frozen=True)
class Rank(Sampler):
    """The pair of rank J in the order of costs, with a probability that falls by `exp(-gamma)`.

    Raises:
        InputError: If `gamma` is not above 0.
    """

    gamma: float = 0.2

    def __post_init__(self) -> None:
        _require("gamma", self.gamma, 0 < self.gamma < float("inf"), "a number above 0")

    def drawn(self, groups: Groups, uniform: float) -> tuple[Pair, float]:
        """See `Sampler`."""
        rank = self.rank(uniform, groups.n_pairs)
        pairs = groups.best(rank + 1)
        return pairs[rank], pairs[0].gain

    def rank(self, uniform: float, n_pairs: int) -> int:
        """The inverse of the distribution of ranks below `n_pairs`."""
        all_of_them = -expm1(-self.gamma * n_pairs)
        return min(int(-log1p(-uniform * all_of_them) / self.gamma), n_pairs - 1)


@dataclass(frozen=True)
class Range(Sampler):
    """Any pair whose cost is among the lowest `share` of the range of costs, uniformly.

    Raises:
        InputError: If `share` is not in [0, 1].
    """

    share: float = 0.05

    def __post_init__(self) -> None:
        _require("share", self.share, 0 <= self.share <= 1, "a number in [0, 1]")

    def drawn(self, groups: Groups, uniform: float) -> tuple[Pair, float]:
        """See `Sampler`."""
        gains, pair = groups.all()
        best = gains.max()
        lowest = gains.min(where=gains > -np.inf, initial=best)
        among = np.flatnonzero(gains >= best - self.share * (best - lowest))
        return pair(int(among[int(uniform * len(among))])), float(best)


@dataclass(frozen=True)
class Boltzmann(Sampler):
    """Any pair, with a weight of `exp(-cost / temperature)`; costs are in bits per position.

    Raises:
        InputError: If `temperature` is not above 0.
    """

    temperature: float = 1e-3

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, self.temperature > 0, "a number above 0")

    def drawn(self, groups: Groups, uniform: float) -> tuple[Pair, float]:
        """See `Sampler`."""
        gains, pair = groups.all()
        best = gains.max()
        mass = np.exp((gains - best) / (self.temperature * groups.n_positions)).cumsum()
        return pair(int(np.searchsorted(mass, uniform * mass[-1], side="right"))), float(best)


def _require(name: str, value: float, fits: bool, expected: str) -> None:
    if not fits:
        raise InputError(f"{name}={value}; expected {expected}.")
