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
largest information finds neither. Pads are no positions: they are counted nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from vpd_lens.analysis.harvest.examples import Firings
from vpd_lens.errors import InputError

ORDERS = ("information", "recall", "precision", "pmi")

# Tokens added at once: their masses stay in the cache, and the sums need little memory.
_BLOCK = 512


class Summary(NamedTuple):
    """How much one subcomponent is used.

    Attributes:
        index: Its number within its site.
        density: Share of positions where it fires.
        mean_importance: Mean causal importance over all positions.
        mean_activation: Mean of `|a| ||U_c||` over all positions, the size of what it writes.
        firing_activation: Mean of `a ||U_c||` where it fires, with the sign; NaN if nowhere. The
            sign of one subcomponent is a convention of its V and U together; signs of its
            activations can be compared with each other.
    """

    index: int
    density: float
    mean_importance: float
    mean_activation: float
    firing_activation: float


@dataclass
class Usage:
    """Sums over positions, by subcomponent.

    Attributes:
        firings: Number of positions where it fires.
        importance: Sum of importances.
        magnitude: Sum of absolute activations `|a| ||U_c||`.
        signed: Sum of activations `a ||U_c||` where it fires.
        n_positions: `[]`, all positions.
    """

    firings: Int64[Tensor, " C_total"]
    importance: Float[Tensor, " C_total"]
    magnitude: Float[Tensor, " C_total"]
    signed: Float[Tensor, " C_total"]
    n_positions: Int64[Tensor, ""]

    @classmethod
    def empty(cls, c_total: int, device: torch.device) -> Usage:
        """Sums over no positions."""
        sums = [torch.zeros(c_total, device=device, dtype=torch.float64) for _ in range(3)]
        firings = torch.zeros(c_total, device=device, dtype=torch.int64)
        return cls(firings, *sums, torch.zeros((), device=device, dtype=torch.int64))

    def add(self, firings: Firings) -> None:
        """Add one batch."""
        self.n_positions += len(firings.of_positions(firings.tokens))
        self.firings += firings.subcomponent.bincount(minlength=len(self.firings))
        self.importance += firings.importance.sum((0, 1), dtype=torch.float64)
        self.magnitude += firings.activation.abs().sum((0, 1), dtype=torch.float64)
        self.signed.index_add_(
            0, firings.subcomponent, firings.at(firings.activation).to(self.signed.dtype)
        )

    def summaries(self, columns: slice) -> list[Summary]:
        """The means of some subcomponents, those with the largest mean importance first."""
        per_position = [
            (total[columns].double() / self.n_positions).tolist()
            for total in (self.firings, self.importance, self.magnitude)
        ]
        where_it_fires = (self.signed[columns] / self.firings[columns]).tolist()
        rows = [
            Summary(index, *values)
            for index, values in enumerate(zip(*per_position, where_it_fires, strict=True))
        ]
        return sorted(rows, key=lambda row: (-row.mean_importance, row.index))


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
        """A table without any position; int32 to count, fp32 to add masses."""
        return cls(
            torch.zeros(c_total, vocabulary, device=device, dtype=dtype),
            torch.zeros(vocabulary, device=device, dtype=torch.float64),
        )

    def count(self, firings: Firings) -> None:
        """Count the tokens of a batch."""
        tokens = firings.tokens[firings.sequence, firings.position].long()
        one = self.at_firings.new_ones(())
        self.at_firings.index_put_((firings.subcomponent, tokens), one, accumulate=True)
        self.everywhere += (
            firings.of_positions(firings.tokens).long().bincount(minlength=len(self.everywhere))
        )

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

    def largest(
        self, row: int, n_firings: int, k: int = 10, by: str = "information", min_count: float = 0.0
    ) -> list[TokenStatistic]:
        """The tokens that go most with a subcomponent's firing; see `Harvest.tokens`."""
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


def token_strings(tokenizer: Any, vocabulary: int) -> list[str]:
    """The text of every token id, leading spaces included.

    A token that is part of a character only, which has no text of its own, is written as the
    tokenizer's vocabulary does; one without any text, or without a tokenizer, as its id in angle
    brackets. Models may have more ids than their tokenizer.
    """
    if tokenizer is None:
        return [f"<{token}>" for token in range(vocabulary)]
    ids = list(range(min(len(tokenizer), vocabulary)))
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    known = [_one(*parts) for parts in zip(ids, texts, pieces, strict=True)]
    return known + [f"<{token}>" for token in range(len(ids), vocabulary)]


def _one(token: int, text: str, piece: str | None) -> str:
    piece = piece or f"<{token}>"
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return piece
    # SentencePiece drops the space in front of the first token that it decodes.
    return " " + text if piece.startswith("▁") and not text.startswith(" ") else text
