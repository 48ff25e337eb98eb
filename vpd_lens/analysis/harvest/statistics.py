"""How much every subcomponent is used, and which tokens go with its firing.

A `TokenTable` holds a weight for every firing and token: for input tokens 1 for the token at the
firing position, for output tokens the probabilities that the target model gives there. With the
weights `n(c, t)` of a subcomponent's firings, those `n(t)` of all positions, `n(c)` firings and
`n` positions:

- recall `P(t | c fires) = n(c, t) / n(c)`
- precision `P(c fires | t) = n(c, t) / n(t)`
- pointwise mutual information `log(n(c, t) n / (n(c) n(t)))`, in nats
- information `recall * PMI`, the token's share of the divergence of the tokens at firings from
  those at all positions, `KL(P(t | c fires) || P(t))`

The largest recall finds tokens that are frequent anyhow, the largest PMI tokens seen once; the
largest information finds neither. Pads count nowhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from vpd_lens.analysis.harvest.examples import Firings
from vpd_lens.errors import InputError

# Tokens added at once: their masses stay in the cache, and the sums need little memory.
_BLOCK = 512


class Summary(NamedTuple):
    """How much one subcomponent is used.

    Its number in its site, the share of positions where it fires, the means over all positions of
    causal importance and of `|a| ||U_c||`, the size of what it writes, and that of `a ||U_c||`
    where it fires, NaN if nowhere. The sign of one subcomponent is a convention of its V and U
    together; signs of its activations can be compared with each other.
    """

    index: int
    density: float
    mean_importance: float
    mean_activation: float
    firing_activation: float


@dataclass
class Usage:
    """Sums over positions, by subcomponent; activations are `a ||U_c||`."""

    firings: Int64[Tensor, " C_total"]
    importance: Float[Tensor, " C_total"]
    magnitude: Float[Tensor, " C_total"]  # of absolute activations
    signed: Float[Tensor, " C_total"]  # of activations where it fires
    n_positions: Int64[Tensor, ""]

    @classmethod
    def empty(cls, c_total: int) -> Usage:
        """Sums over no positions."""
        sums = [torch.zeros(c_total, dtype=torch.float64) for _ in range(3)]
        return cls(torch.zeros(c_total, dtype=torch.int64), *sums, torch.tensor(0))

    def add(self, firings: Firings) -> None:
        """Add one batch."""
        self.n_positions += len(firings.of_positions(firings.tokens))
        self.firings += firings.subcomponent.bincount(minlength=len(self.firings))
        self.importance += firings.importance.sum((0, 1), dtype=torch.float64)
        self.magnitude += firings.activation.abs().sum((0, 1), dtype=torch.float64)
        self.signed.index_add_(0, firings.subcomponent, firings.at(firings.activation).double())

    def summaries(self, columns: slice) -> list[Summary]:
        """The means of some subcomponents, those with the largest mean importance first."""
        sums = (self.firings, self.importance, self.magnitude)
        means = [(total[columns].double() / self.n_positions).tolist() for total in sums]
        where_it_fires = (self.signed[columns] / self.firings[columns]).tolist()
        rows = map(Summary, range(len(where_it_fires)), *means, where_it_fires)
        return sorted(rows, key=lambda row: -row.mean_importance)


class TokenStatistic(NamedTuple):
    """How one token goes with the firing of one subcomponent.

    Its id and weight `count` at the firings, recall `P(token | fires)`, precision
    `P(fires | token)`, and pointwise mutual information in nats.
    """

    token: int
    count: float
    recall: float
    precision: float
    pmi: float


@dataclass
class TokenTable:
    """Weights of tokens at the firings of every subcomponent, and at all positions."""

    at_firings: Shaped[Tensor, "C_total vocab"]  # n(c, t); int32 counts or fp32 masses
    everywhere: Float[Tensor, " vocab"]  # n(t)

    @classmethod
    def empty(cls, c_total: int, vocabulary: int, dtype: torch.dtype) -> TokenTable:
        """A table without any position; int32 to count, fp32 to add masses."""
        everywhere = torch.zeros(vocabulary, dtype=torch.float64)
        return cls(torch.zeros(c_total, vocabulary, dtype=dtype), everywhere)

    def count(self, firings: Firings) -> None:
        """Count the tokens of a batch."""
        tokens = firings.tokens[firings.sequence, firings.position].long()
        one = self.at_firings.new_ones(())
        self.at_firings.index_put_((firings.subcomponent, tokens), one, accumulate=True)
        everywhere = firings.of_positions(firings.tokens)
        self.everywhere += everywhere.bincount(minlength=len(self.everywhere))

    def add_mass(self, firings: Firings, mass: Float[Tensor, "batch pos vocab"]) -> None:
        """Add the masses of all tokens at the positions of a batch."""
        self.everywhere += firings.of_positions(mass).sum(0, dtype=torch.float64)
        by_row = firings.subcomponent.argsort(stable=True)
        rows, counts = firings.subcomponent[by_row].unique_consecutive(return_counts=True)
        places = (firings.sequence * mass.shape[1] + firings.position)[by_row]
        bags = counts.cumsum(0) - counts
        tables = self.at_firings.split(_BLOCK, dim=1)
        for table, block in zip(tables, mass.flatten(0, 1).split(_BLOCK, dim=1), strict=True):
            # One bag per subcomponent: the sum of the rows of `mass` where it fires.
            sums = F.embedding_bag(places, block.contiguous(), bags, mode="sum")
            table.index_add_(0, rows, sums)

    def trimmed(self, firings: Int64[Tensor, " C_total"], k: int) -> TokenTable:
        """The same with 0 for all but the `k` tokens of most information of each subcomponent."""
        recall, pmi = self._recall_and_pmi(self.at_firings.double(), firings.clamp(min=1)[:, None])
        information = torch.where(self.at_firings > 0, recall * pmi, -math.inf)
        best = information.topk(min(k, len(self.everywhere)), dim=1).indices
        kept = torch.zeros_like(self.at_firings)
        return replace(self, at_firings=kept.scatter(1, best, self.at_firings.gather(1, best)))

    def _recall_and_pmi(
        self,
        count: Float64[Tensor, "*rows token"],
        firings: int | Int64[Tensor, "C_total 1"],
        tokens: slice | Int64[Tensor, " token"] = slice(None),
    ) -> tuple[Float64[Tensor, "*rows token"], Float64[Tensor, "*rows token"]]:
        """Of tokens that weigh `count` at so many firings."""
        recall = count / firings
        # The weights of a position add up to 1, for output tokens up to rounding.
        return recall, (recall * self.everywhere.sum().round() / self.everywhere[tokens]).log()

    def of_token(
        self, token: int, firings: Int64[Tensor, " C_total"], least: float
    ) -> Float64[Tensor, " C_total"]:
        """Every subcomponent's mutual information with a token, -inf at a recall below `least`."""
        count, fired = self.at_firings[:, [token]].double(), firings.clamp(min=1)[:, None]
        recall, pmi = self._recall_and_pmi(count, fired, torch.tensor([token]))
        return torch.where(recall >= max(least, 1e-12), pmi, -math.inf)[:, 0]

    def largest(
        self, row: int, n_firings: int, k: int = 10, by: str = "information", min_count: float = 0.0
    ) -> list[TokenStatistic]:
        """The tokens that go most with a subcomponent's firing; see `Harvest.tokens`."""
        weights = self.at_firings[row]
        seen = ((weights > 0) & (weights >= min_count)).nonzero().squeeze(1)
        count = weights[seen].double()
        recall, pmi = self._recall_and_pmi(count, n_firings, seen)
        precision = count / self.everywhere[seen]
        orders = {"information": recall * pmi, "recall": recall, "precision": precision, "pmi": pmi}
        if by not in orders:
            raise InputError(f"by={by!r} is not one of {', '.join(orders)}.")
        best = orders[by].topk(min(k, len(seen))).indices
        columns = (seen, count, recall, precision, pmi)
        return list(map(TokenStatistic, *(column[best].tolist() for column in columns)))
