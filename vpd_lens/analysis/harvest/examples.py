"""Where subcomponents fire, and examples of the text there.

Few subcomponents are needed at any position, so what comes after the forward pass works on the list
of firings. Examples of either kind are those with the `n` largest keys of a stream:

- *top*: the importance, then the absolute activation. The bits of non-negative floats are
  ordered as the floats are, so the two in one 64-bit integer compare exactly.
- *random*: an independent random number for every firing, which makes them a uniform sample without
  replacement, however long the stream (reservoir sampling by random sort).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped
from torch import Tensor

EMPTY = -1


class Firings:
    """One batch, and the places where an importance exceeds the threshold.

    Nothing fires at pads, where `real` is False; tokens are -1 there, importances and activations
    `a ||U_c||` 0. Firings are ordered by `sequence`, `position` and `subcomponent`.
    """

    def __init__(
        self,
        tokens: Int[Tensor, "batch pos"],
        importance: Float[Tensor, "batch pos C_total"],
        activation: Float[Tensor, "batch pos C_total"],
        threshold: float,
        real: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        if real is not None:
            tokens = tokens.masked_fill(~real, EMPTY)
            importance = importance.masked_fill(~real[..., None], 0)
            activation = activation.masked_fill(~real[..., None], 0)
        self.tokens, self.real = tokens, real
        self.importance, self.activation = importance, activation
        fires = importance > threshold
        self.sequence, self.position, self.subcomponent = fires.nonzero(as_tuple=True)

    def __len__(self) -> int:
        return len(self.subcomponent)

    def at(self, values: Float[Tensor, "batch pos C_total"]) -> Float[Tensor, " n_firings"]:
        """What `values` are where subcomponents fire."""
        return values[self.sequence, self.position, self.subcomponent]

    def of_positions(self, values: Shaped[Tensor, "batch pos *of"]) -> Shaped[Tensor, "n *of"]:
        """`values` at all positions that are no pads."""
        return values.flatten(0, 1) if self.real is None else values[self.real]

    def windows(
        self, which: Int[Tensor, " m"], context: int
    ) -> tuple[Int32[Tensor, "m W"], Float[Tensor, "m W"], Float[Tensor, "m W"]]:
        """Tokens around some firings, and importance and activation of what fires there.

        `W = 2 context + 1`; -1 and 0 at pads and beyond the ends of the sequence.
        """
        sequence, subcomponent = self.sequence[which, None], self.subcomponent[which, None]
        position = self.position[which, None]
        position = position + torch.arange(-context, context + 1, device=which.device)
        inside = position.clamp(0, self.tokens.shape[1] - 1)
        beyond = position != inside
        return (
            self.tokens[sequence, inside].masked_fill(beyond, EMPTY).int(),
            self.importance[sequence, inside, subcomponent].masked_fill(beyond, 0),
            self.activation[sequence, inside, subcomponent].masked_fill(beyond, 0),
        )


class Example(NamedTuple):
    """The text around one firing, which is at the place `focus` of the lists.

    Token ids, at most `context` on either side of the firing, and the subcomponent's causal
    importance and signed activation `a ||U_c||` at each.
    """

    tokens: list[int]
    importance: list[float]
    activation: list[float]
    focus: int


@dataclass
class Examples:
    """Up to `n` examples of every subcomponent: their keys, in no order, and windows of text.

    A key of -1 marks an empty slot, a token of -1 what is no part of the text.
    """

    keys: Int64[Tensor, "C_total n"]
    tokens: Int32[Tensor, "C_total n W"]
    importance: Float[Tensor, "C_total n W"]
    activation: Float[Tensor, "C_total n W"]

    @classmethod
    def empty(cls, c_total: int, n: int, context: int) -> Examples:
        """No examples yet of `c_total` subcomponents, with room for `n` of each."""
        shape = (c_total, n, 2 * context + 1)
        tokens = torch.full(shape, EMPTY, dtype=torch.int32)
        return cls(torch.full(shape[:2], EMPTY), tokens, torch.zeros(shape), torch.zeros(shape))

    def offer(
        self, firings: Firings, keys: Int64[Tensor, " n_firings"], one_per_sequence: bool = False
    ) -> None:
        """Keep those firings whose keys, at least 0, are among the `n` largest so far.

        With `one_per_sequence`, only the largest of every sequence is considered.
        """
        worst, slots = self.keys.sort(dim=1)  # [C_total, n], ascending
        which = (keys > worst[firings.subcomponent, 0]).nonzero().squeeze(1)
        if one_per_sequence:
            group = firings.sequence[which] * len(self.keys) + firings.subcomponent[which]
            which = which[_ranks(group, keys[which]) == 0]
        row = firings.subcomponent[which]
        rank = _ranks(row, keys[which])
        # The best newcomer replaces the worst if it is better, the second best the second worst...
        # Ranks of n and beyond never enter; clamped, they may still be compared.
        last = self.keys.shape[1] - 1
        enters = (rank <= last) & (keys[which] > worst[row, rank.clamp(max=last)])
        which, row, slot = which[enters], row[enters], slots[row, rank.clamp(max=last)][enters]
        self.keys[row, slot] = keys[which]
        windows = firings.windows(which, self.tokens.shape[2] // 2)
        self.tokens[row, slot], self.importance[row, slot], self.activation[row, slot] = windows

    def of(self, row: int) -> list[Example]:
        """Examples of one subcomponent, those with the largest keys first."""
        order = self.keys[row].argsort(descending=True)
        order = order[self.keys[row, order] != EMPTY].tolist()
        windows, centre = (self.tokens, self.importance, self.activation), self.tokens.shape[2] // 2
        examples = []
        for slot in order:
            inside = self.tokens[row, slot] != EMPTY
            text = (window[row, slot][inside].tolist() for window in windows)
            examples.append(Example(*text, focus=int(inside[:centre].sum())))
        return examples


def top_keys(firings: Firings) -> Int64[Tensor, " n_firings"]:
    """Keys that order firings by importance, then by absolute activation."""
    both = firings.importance, firings.activation.abs()
    importance, size = (firings.at(x).float().view(torch.int32).long() for x in both)
    return (importance << 32) | size


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
