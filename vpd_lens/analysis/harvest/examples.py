"""Where subcomponents fire, and examples of the text there.

Few subcomponents are needed at any position, so everything after the forward pass works on the
list of firings instead of on every pair of position and subcomponent.

Both kinds of examples are "the `n` largest of a stream", which differ in the key only:

- *top*: the importance, then the absolute activation. The bits of non-negative floats are
  ordered as the floats are, so the two in one 64-bit integer compare exactly.
- *random*: an independent random number for every firing. The firings with the `n` largest are a
  uniform sample without replacement, however long the stream: reservoir sampling by random sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped
from torch import Tensor

EMPTY = -1


@dataclass(frozen=True)
class Firings:
    """One batch, and the places where an importance exceeds the threshold.

    Attributes:
        tokens: The batch; -1 at pads.
        importance: Causal importances `g`; 0 at pads.
        activation: Activations `a ||U_c||`, with their sign; 0 at pads.
        sequence: Row of every firing.
        position: Position of every firing.
        subcomponent: Which subcomponent fires there.
        real: False at pads; `None`: there are none.
    """

    tokens: Int[Tensor, "batch pos"]
    importance: Float[Tensor, "batch pos C_total"]
    activation: Float[Tensor, "batch pos C_total"]
    sequence: Int[Tensor, " n_firings"]
    position: Int[Tensor, " n_firings"]
    subcomponent: Int[Tensor, " n_firings"]
    real: Bool[Tensor, "batch pos"] | None = None

    @classmethod
    def of(
        cls,
        tokens: Int[Tensor, "batch pos"],
        importance: Float[Tensor, "batch pos C_total"],
        activation: Float[Tensor, "batch pos C_total"],
        threshold: float,
        real: Bool[Tensor, "batch pos"] | None = None,
    ) -> Firings:
        """Find the firings of a batch, ordered by sequence, position and subcomponent.

        Args:
            tokens: The batch.
            importance: Causal importances on it.
            activation: Activations on it.
            threshold: A subcomponent fires where its importance exceeds this.
            real: False at pads, where nothing fires; `None`: there are none.
        """
        if real is not None:
            tokens = tokens.masked_fill(~real, EMPTY)
            importance, activation = (
                values.masked_fill(~real[..., None], 0) for values in (importance, activation)
            )
        where = (importance > threshold).nonzero(as_tuple=True)
        return cls(tokens, importance, activation, *where, real)

    def __len__(self) -> int:
        return len(self.subcomponent)

    def at(self, values: Float[Tensor, "batch pos C_total"]) -> Float[Tensor, " n_firings"]:
        """What `values` are where subcomponents fire."""
        return values[self.sequence, self.position, self.subcomponent]

    def of_positions(self, values: Shaped[Tensor, "batch pos *of"]) -> Shaped[Tensor, "n *of"]:
        """`values` at all positions that are no pads."""
        return values.flatten(0, 1) if self.real is None else values[self.real]

    def windows(self, which: Int[Tensor, " m"], context: int) -> tuple[Tensor, Tensor, Tensor]:
        """The text around some firings.

        Args:
            which: Which firings.
            context: Tokens on either side.

        Returns:
            Tokens, and the importance and the activation of the subcomponent that fires, each
            `[m, 2 context + 1]`; -1 and 0 at pads and beyond the ends of the sequence.
        """
        sequence = self.sequence[which, None]
        subcomponent = self.subcomponent[which, None]
        offsets = torch.arange(-context, context + 1, device=which.device)
        position = self.position[which, None] + offsets  # [m, W]
        beyond = (position < 0) | (position >= self.tokens.shape[1])
        position = position.clamp(0, self.tokens.shape[1] - 1)
        return (
            self.tokens[sequence, position].masked_fill(beyond, EMPTY).int(),
            self.importance[sequence, position, subcomponent].masked_fill(beyond, 0),
            self.activation[sequence, position, subcomponent].masked_fill(beyond, 0),
        )


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
        tokens: Their text; -1 at pads and beyond the ends of the sequence.
        importance: The subcomponent's importance on it.
        activation: Its activation on it.
    """

    keys: Int64[Tensor, "C_total n"]
    tokens: Int32[Tensor, "C_total n W"]
    importance: Float[Tensor, "C_total n W"]
    activation: Float[Tensor, "C_total n W"]

    @classmethod
    def empty(cls, c_total: int, n: int, context: int, device: torch.device) -> Examples:
        """No examples yet of `c_total` subcomponents, with room for `n` of each."""
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
        self.keys[row, slot] = keys[which]
        windows = firings.windows(which, self.tokens.shape[2] // 2)
        for buffer, window in zip(
            (self.tokens, self.importance, self.activation), windows, strict=True
        ):
            buffer[row, slot] = window

    def of(self, row: int) -> list[Example]:
        """Examples of one subcomponent, those with the largest keys first."""
        order = self.keys[row].argsort(descending=True)
        order = order[self.keys[row, order] != EMPTY]
        parts = [x[row, order] for x in (self.tokens, self.importance, self.activation)]
        inside = parts[0] != EMPTY  # [n, W]
        focus = inside[:, : inside.shape[1] // 2].sum(1).tolist()
        rows = zip(*(part.tolist() for part in parts), inside.tolist(), focus, strict=True)
        return [
            Example(*(list(compress(values, kept)) for values in lists), n)
            for *lists, kept, n in rows
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
