"""Which tokens go with the firing of a subcomponent.

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
largest information finds neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from vpd_lens.analysis.harvest.firings import Firings
from vpd_lens.errors import InputError

ORDERS = ("information", "recall", "precision", "pmi")

# Tokens added at once: their masses stay in the cache, and the sums need little memory.
_BLOCK = 512


class TokenStatistic(NamedTuple):
    """How one token goes with the firing of one subcomponent.

    Attributes:
        token: Token id.
        count: Its weight at the firings.
        recall: `P(token | fires)`.
        precision: `P(fires | token)`.
        pmi: Pointwise mutual information in nats.
    """

    token: int
    count: float
    recall: float
    precision: float
    pmi: float


@dataclass
class TokenTable:
    """Weights of tokens at the firings of every subcomponent, and at all positions.

    Attributes:
        at_firings: `n(c, t)`: int32 counts of input tokens, or fp32 masses of output tokens.
        everywhere: `n(t)`.
    """

    at_firings: Shaped[Tensor, "C_total vocab"]
    everywhere: Float[Tensor, " vocab"]

    @classmethod
    def empty(
        cls, c_total: int, vocabulary: int, dtype: torch.dtype, device: torch.device
    ) -> TokenTable:
        """A table without any position.

        Args:
            c_total: Number of subcomponents.
            vocabulary: Number of tokens.
            dtype: int32 to count, fp32 to add masses.
            device: Where it lives.
        """
        return cls(
            torch.zeros(c_total, vocabulary, device=device, dtype=dtype),
            torch.zeros(vocabulary, device=device, dtype=torch.float64),
        )

    def count(self, firings: Firings) -> None:
        """Count the tokens of a batch."""
        tokens = firings.tokens[firings.sequence, firings.position].long()
        one = self.at_firings.new_ones(())
        self.at_firings.index_put_((firings.subcomponent, tokens), one, accumulate=True)
        self.everywhere += firings.tokens.flatten().long().bincount(minlength=len(self.everywhere))

    def add_mass(self, firings: Firings, mass: Float[Tensor, "batch pos vocab"]) -> None:
        """Add the masses of all tokens at the positions of a batch.

        Args:
            firings: The batch' firings.
            mass: Weights of all tokens at every position; probabilities add up to 1.
        """
        self.everywhere += mass.flatten(0, 1).sum(0, dtype=torch.float64)
        by_row = firings.subcomponent.argsort(stable=True)
        rows, counts = firings.subcomponent[by_row].unique_consecutive(return_counts=True)
        places = (firings.sequence * mass.shape[1] + firings.position)[by_row]
        bags = counts.cumsum(0) - counts
        tables = self.at_firings.split(_BLOCK, dim=1)
        for table, block in zip(tables, mass.flatten(0, 1).split(_BLOCK, dim=1), strict=True):
            # One bag per subcomponent: the sum of the rows of `mass` where it fires.
            sums = F.embedding_bag(places, block.contiguous(), bags, mode="sum")
            table.index_add_(0, rows, sums)

    def largest(
        self, row: int, n_firings: int, k: int = 10, by: str = "information", min_count: float = 0.0
    ) -> list[TokenStatistic]:
        """The tokens that go most with the firing of one subcomponent.

        Args:
            row: Which subcomponent.
            n_firings: How often it fired, at least once.
            k: Number of tokens; fewer if it was seen with fewer.
            by: `"information"`, `"recall"`, `"precision"` or `"pmi"`.
            min_count: Leave out tokens with less weight at the firings, which make precision and
                PMI noisy.

        Raises:
            InputError: If `by` is none of these.
        """
        if by not in ORDERS:
            raise InputError(f"by={by!r} is not one of {', '.join(ORDERS)}.")
        weights = self.at_firings[row]
        seen = ((weights > 0) & (weights >= min_count)).nonzero().squeeze(1)
        columns = _statistics(weights[seen], self.everywhere[seen], n_firings, self._n_positions())
        best = columns[by].topk(min(k, len(seen))).indices
        chosen = (columns[name][best].tolist() for name in ("count", "recall", "precision", "pmi"))
        return [
            TokenStatistic(*values) for values in zip(seen[best].tolist(), *chosen, strict=True)
        ]

    def _n_positions(self) -> Tensor:
        # The weights of a position add up to 1, for output tokens up to rounding.
        return self.everywhere.sum().round()


def _statistics(
    weights: Shaped[Tensor, " seen"],
    everywhere: Float[Tensor, " seen"],
    n_firings: int,
    n_positions: Float[Tensor, ""],
) -> dict[str, Tensor]:
    count = weights.double()
    recall = count / n_firings
    pmi = (recall * n_positions / everywhere).log()
    return {
        "count": count,
        "recall": recall,
        "precision": count / everywhere,
        "pmi": pmi,
        "information": recall * pmi,
    }
