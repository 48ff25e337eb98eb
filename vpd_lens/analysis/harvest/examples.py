"""Examples: for every subcomponent the `n` firings with the largest keys, and their text.

Both kinds of examples are "the `n` largest of a stream", which differ in the key only:

- *top*: the importance, then the absolute activation. The bits of non-negative floats are
  ordered as the floats are, so the two in one 64-bit integer compare exactly.
- *random*: an independent random number for every firing. The firings with the `n` largest are a
  uniform sample without replacement, however long the stream: reservoir sampling by random sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from vpd_lens.analysis.harvest.firings import Firings

EMPTY = -1


class Example(NamedTuple):
    """The text around one firing.

    Attributes:
        tokens: Token ids, at most `context` on either side of the firing.
        importance: Causal importance of the subcomponent at each.
        activation: Its activation `a ||U_c||` at each, with the sign.
        focus: Where in these lists the firing is.
    """

    tokens: list[int]
    importance: list[float]
    activation: list[float]
    focus: int


@dataclass
class Examples:
    """Up to `n` examples of every subcomponent; `W = 2 context + 1`.

    Attributes:
        keys: Their keys, in no order; -1 marks an empty slot.
        tokens: Their text, -1 beyond the ends of the sequence.
        importance: The subcomponent's importance on it.
        activation: Its activation on it.
    """

    keys: Int64[Tensor, "C_total n"]
    tokens: Int32[Tensor, "C_total n W"]
    importance: Float[Tensor, "C_total n W"]
    activation: Float[Tensor, "C_total n W"]

    @classmethod
    def empty(cls, c_total: int, n: int, context: int, device: torch.device) -> Examples:
        """No examples yet.

        Args:
            c_total: Number of subcomponents.
            n: Examples of each.
            context: Tokens on either side.
            device: Where the buffers live.
        """
        shape = (c_total, n, 2 * context + 1)
        return cls(
            torch.full(shape[:2], EMPTY, device=device),
            torch.full(shape, EMPTY, device=device, dtype=torch.int32),
            torch.zeros(shape, device=device),
            torch.zeros(shape, device=device),
        )

    def offer(
        self, firings: Firings, keys: Int64[Tensor, " n_firings"], one_per_sequence: bool = False
    ) -> None:
        """Keep those firings whose keys are among the `n` largest so far.

        Args:
            firings: The firings of one batch.
            keys: Their keys, at least 0.
            one_per_sequence: Consider only the largest of every sequence.
        """
        worst, slots = self.keys.sort(dim=1)  # [C_total, n], ascending
        which = (keys > worst[firings.subcomponent, 0]).nonzero().squeeze(1)
        if one_per_sequence:
            n_rows = len(self.keys)
            group = firings.sequence[which] * n_rows + firings.subcomponent[which]
            which = which[_ranks(group, keys[which]) == 0]
        row = firings.subcomponent[which]
        rank = _ranks(row, keys[which])
        # The best newcomer replaces the worst if it is better, the second best the second worst...
        # Ranks of n and beyond never enter; clamped, they may still be compared.
        last = self.keys.shape[1] - 1
        enters = (rank <= last) & (keys[which] > worst[row, rank.clamp(max=last)])
        which, row, rank = which[enters], row[enters], rank[enters]
        slot = slots[row, rank]
        windows = firings.windows(which, self.tokens.shape[2] // 2)
        self.keys[row, slot] = keys[which]
        self.tokens[row, slot] = windows.tokens
        self.importance[row, slot] = windows.importance
        self.activation[row, slot] = windows.activation

    def of(self, row: int) -> list[Example]:
        """Examples of one subcomponent, those with the largest keys first."""
        order = self.keys[row].argsort(descending=True)
        order = order[self.keys[row, order] != EMPTY]
        parts = [x[row, order] for x in (self.tokens, self.importance, self.activation)]
        inside = parts[0] != EMPTY  # [n, W]: one run of tokens in every window
        context = inside.shape[1] // 2
        before = inside[:, :context].sum(1).tolist()
        after = inside[:, context:].sum(1).tolist()
        rows = zip(*(part.tolist() for part in parts), before, after, strict=True)
        return [
            Example(*(values[context - n : context + m] for values in lists), n)
            for *lists, n, m in rows
        ]


def top_keys(firings: Firings) -> Int64[Tensor, " n_firings"]:
    """Keys that order firings by importance, then by absolute activation."""
    importance = firings.at(firings.importance).float().view(torch.int32).long()
    magnitude = firings.at(firings.activation).float().abs().view(torch.int32).long()
    return (importance << 32) | magnitude


def random_keys(firings: Firings, seed: int, batch: int) -> Int64[Tensor, " n_firings"]:
    """Independent random keys, the same for the same seed and number of the batch.

    They come from numpy, so that they are independent of data that a torch generator of the same
    seed makes, and the same on every device.

    Args:
        firings: The firings of one batch.
        seed: The harvest's seed.
        batch: Number of the batch.
    """
    largest = np.iinfo(np.int64).max
    keys = np.random.default_rng([seed, batch]).integers(largest, size=len(firings))
    return torch.from_numpy(keys).to(firings.subcomponent.device)


def _ranks(group: Int[Tensor, " m"], key: Int64[Tensor, " m"]) -> Int64[Tensor, " m"]:
    """Rank of every key among those of its group, the largest being 0."""
    order = key.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    group = group[order]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(group, group)
    return rank
