"""How the graph viewers number what `vpd_lens` names: layers, features, node ids.

The viewers of circuit-tracer and Neuronpedia know layers, each with numbered features. A layer is
a matrix here (`axis="site"`) or a block (`axis="block"`); the matrices of one block then share its
feature numbers in turn, so that `layer`, feature and position stay unique.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from vpd_lens.errors import InputError

Axis = Literal["site", "block"]

EMBEDDED = "E"
# Nodes that are no features have numbers below 0, distinct within a layer: the viewers merge
# nodes of the same layer, number and position, and may drop them as too common.
_UNNUMBERED = ("error", "delta", "bias", "position")
_MATRIX = re.compile(r".+\.attn\.[qkvo]|.+\.mlp\.(in|gate|out)|unembed")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class Numbering:
    """Numbers of layers and features.

    Attributes:
        layer: Layer of each place between the embedding and the outputs.
        rank: Which of its layer's places it is, the matrices first.
        width: How many matrices each layer has.
    """

    layer: dict[str, int]
    rank: dict[str, int]
    width: dict[int, int]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return max(self.layer.values(), default=-1) + 1

    def layer_of(self, place: str) -> str:
        """The viewers' name of a place's layer: a number, or `E` for the embedding."""
        return str(self.layer[place]) if place in self.layer else EMBEDDED

    def number(self, kind: str, place: str, index: int) -> int:
        """Number of a node of a place, unique in its layer and position.

        Args:
            kind: One of the kinds of nodes but not `output` or `embedding`.
            place: Where it is.
            index: Which subcomponent.
        """
        rank = self.rank.get(place, 0)
        if kind == "subcomponent":
            return index * self.width[self.layer[place]] + rank
        return -1 - (rank * len(_UNNUMBERED) + _UNNUMBERED.index(kind))

    def feature(self, place: str, index: int) -> int:
        """Number of a subcomponent among those of all layers."""
        return cantor_pair(self.layer[place], self.number("subcomponent", place, index))


def numbering(places: tuple[str, ...], axis: Axis) -> Numbering:
    """How the places of a graph are numbered, which depends on the model and the axis only.

    Args:
        places: `Nodes.places`, in the order of the forward pass.
        axis: What a layer is: `"site"` (each matrix) or `"block"`.

    Raises:
        InputError: If the axis is neither.
    """
    if axis not in ("site", "block"):
        raise InputError(f"axis={axis!r}; expected 'site' or 'block'.")
    inner = [place for place in places if place not in ("embed", "output")]
    layer = _by_block(inner) if axis == "block" else _by_matrix(inner)
    rank: dict[str, int] = {}
    seen: Counter[int] = Counter()
    width: dict[int, int] = {}
    for is_matrix in (True, False):
        for place in inner:
            if bool(_MATRIX.fullmatch(place)) == is_matrix:
                rank[place] = seen[layer[place]]
                seen[layer[place]] += 1
        if is_matrix:
            width = dict(seen)
    return Numbering(layer, rank, width)


def _by_block(places: list[str]) -> dict[str, int]:
    """Places outside of blocks, such as the last norm, belong to the block before them."""
    layer, block = {}, 0
    for place in places:
        match = _BLOCK.match(place)
        block = int(match[1]) if match else block
        layer[place] = block
    return layer


def _by_matrix(places: list[str]) -> dict[str, int]:
    """Norms and activation functions belong to the matrix that reads them."""
    matrices = [place for place in places if _MATRIX.fullmatch(place)]
    layer, count = {}, 0
    for place in places:
        layer[place] = min(count, max(len(matrices) - 1, 0))
        count += place in matrices
    return layer


def cantor_pair(x: int, y: int) -> int:
    """The Cantor pairing of two natural numbers: one number for each pair."""
    return (x + y) * (x + y + 1) // 2 + y
