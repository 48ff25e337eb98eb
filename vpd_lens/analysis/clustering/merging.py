"""Groups of subcomponents, what merging any two of them costs, and their merging.

At every position, say which groups are active, `log2 k` bits for each of `k` groups, and for each
say what it does, `alpha` bits for each subcomponent in it. With `s_i` the positions where any of
the `r_i` subcomponents of group i is active, that takes

    L = sum_i s_i (log2 k + alpha r_i)

bits. Merging i and j, which are active together at `n_ij` positions, changes it by

    log2((k - 1) / k) sum_i s_i  -  gain_ij
    gain_ij = n_ij log2(k - 1) + alpha (n_ij (r_i + r_j) - s_i r_j - s_j r_i)

exactly. The first part is the same for all pairs. The second falls with k, so that the largest
gain of a row of the table of pairs, once computed, stays a bound on it, and only the rows whose
bounds are largest are computed anew. Counts are whole numbers and never approximated:
`n_(i or j),m = n_im + n_jm - n_ijm`, and the last is counted where i and j are both active.

Source: VPD, clustering; the merging of bounds is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log2
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vpd_lens.analysis.clustering.bits import Bits, coactive, counts_within

_OR_AND = np.bitwise_or, np.bitwise_and


class Pair(NamedTuple):
    """Two groups and what merging them gains."""

    gain: float
    first: int
    second: int


class Groups:
    """Groups of the columns of a binary matrix, at first each column for itself.

    A group has the number of its first column. Merging changes this object.

    Attributes:
        active: Where each group is, as bits.
        counts: Positions where each group is active.
        ranks: Columns in each.
        together: Positions where both of a pair are active; of groups that exist.
        exists: Which numbers are still those of a group.
        n: How many groups there are.
    """

    def __init__(self, active: Bits, alpha: float, n_positions: int) -> None:
        n = active.shape[1]
        self.alpha, self.n, self.n_positions = alpha, n, n_positions
        self.active = active.copy()
        self.together = coactive(active)
        self.counts: Int[np.ndarray, " n"] = self.together.diagonal().astype(np.int64)
        self.ranks = np.ones(n, np.int64)
        self.exists: Bool[np.ndarray, " n"] = np.ones(n, bool)
        self._gone = np.zeros(n)  # infinity for numbers that are no group's
        self._bounds = np.full(n, np.inf)
        self._computed = np.full(n, -1)  # the number of groups when a bound was computed

    def length(self) -> float:
        """Bits of the description of all positions."""
        s, r = self.counts[self.exists], self.ranks[self.exists]
        return float(s.sum() * log2(self.n) + self.alpha * (s @ r))

    def cost(self, gain: float) -> float:
        """By how many bits the description grows, of all positions, if a pair is merged."""
        return float(self.counts[self.exists].sum() * log2((self.n - 1) / self.n) - gain)

    def gains(self, row: int) -> Float[np.ndarray, " later"]:
        """What merging a group with each of a larger number gains; -inf if that is none."""
        return self._gains(row, slice(row + 1, None))

    def _gains(self, row: int, others: slice) -> Float[np.ndarray, " others"]:
        weights = log2(self.n - 1) + self.alpha * (self.ranks[others] + self.ranks[row])
        lost = self.counts[row] * self.ranks[others] + self.counts[others] * self.ranks[row]
        return self.together[row, others] * weights - self.alpha * lost - self._gone[others]

    @property
    def n_pairs(self) -> int:
        """How many pairs could be merged."""
        return self.n * (self.n - 1) // 2

    def best(self, m: int) -> list[Pair]:
        """The `m` pairs of the largest gains; of equal ones those of the smallest numbers.

        A pair among the first m is in one of the m rows whose own first pairs come first.
        """
        while True:
            rows = self._leading(m)
            stale = rows[self._computed[rows] != self.n]
            if not len(stale):
                break
            for row in stale.tolist():
                self._bounds[row] = self.gains(row).max(initial=-np.inf)
                self._computed[row] = self.n
        gains, starts = self._table(rows)
        least = np.partition(gains, -m)[-m] if m < len(gains) else -np.inf
        places = np.flatnonzero((gains >= least) & (gains > -np.inf))
        places = places[np.argsort(-gains[places], kind="stable")][:m]
        return [self._pair(rows, gains, starts, place) for place in places.tolist()]

    def all(self) -> tuple[Float[np.ndarray, " pairs"], Callable[[int], Pair]]:
        """The gains of all pairs, in the order of their numbers, and the pair at each place."""
        rows = np.flatnonzero(self.exists)
        gains, starts = self._table(rows)
        return gains, partial(self._pair, rows, gains, starts)

    def _table(self, rows: Int[np.ndarray, " rows"]) -> tuple[np.ndarray, np.ndarray]:
        """The gains of some rows, one after the other, and where each begins."""
        parts = [self.gains(row) for row in rows.tolist()]
        return np.concatenate(parts), np.cumsum([0, *map(len, parts)])

    def _pair(self, rows: np.ndarray, gains: np.ndarray, starts: np.ndarray, place: int) -> Pair:
        at = int(np.searchsorted(starts, place, side="right")) - 1
        first = int(rows[at])
        return Pair(float(gains[place]), first, first + 1 + place - int(starts[at]))

    def _leading(self, m: int) -> Int[np.ndarray, " rows"]:
        """The `m` rows of the largest bounds, in their order, without those that are empty."""
        bounds = self._bounds
        if m == 1:
            return np.array([bounds.argmax()])
        rows = np.arange(len(bounds))
        if m < len(bounds):
            least = np.partition(bounds, -m)[-m]
            above, equal = np.flatnonzero(bounds > least), np.flatnonzero(bounds == least)
            rows = np.sort(np.concatenate([above, equal[: m - len(above)]]))
        return rows[bounds[rows] > -np.inf]

    def merge(self, first: int, second: int) -> None:
        """Make one group of two, which has the smaller number."""
        i, j = sorted((first, second))
        either, both = (f(self.active[:, i], self.active[:, j]) for f in _OR_AND)
        overlaps = self.together[i] + self.together[j] - counts_within(self.active, both)
        self.counts[i] += self.counts[j] - self.together[i, j]
        self.ranks[i] += self.ranks[j]
        self.active[:, i], self.active[:, j] = either, 0
        self.together[i], self.together[:, i] = overlaps, overlaps
        self.exists[j], self._gone[j], self.counts[j] = False, np.inf, 0
        self.n -= 1
        if self.n > 1:
            # Bounds of other rows stay; the gain with the new group may exceed them.
            self._bounds[i], self._bounds[j] = np.inf, -np.inf
            np.maximum(self._bounds[:i], self._gains(i, slice(i)), out=self._bounds[:i])
