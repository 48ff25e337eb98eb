"""Names of nodes: `blocks.0.mlp.in:31`, `embed:17`, `output: self`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING
from vpd_lens.errors import InputError


class Node(NamedTuple):
    """A node's place, and its row there: among the alive subcomponents, or a token id."""

    place: str
    row: int


def node_name(place: str, row: int, alive: Mapping[str, Tensor]) -> str:
    """The name of a node.

    Args:
        place: A site, `embed` or `output`.
        row: Among the alive subcomponents, or a token id.
        alive: Alive subcomponents by site.
    """
    return f"{place}:{int(alive[place][row]) if place in alive else row}"


def find_node(
    name: str, alive: Mapping[str, Tensor], strings: Sequence[str], n_tokens: int, readout: Tensor
) -> Node:
    """The node of a name.

    Args:
        name: As `node_name` gives it; tokens also as text.
        alive: Alive subcomponents by site.
        strings: Text of every token id.
        n_tokens: Number of tokens of `embed`.
        readout: Its columns are the tokens of `output`.

    Raises:
        InputError: If there is no such node.
    """
    place, colon, rest = name.partition(":")
    if place in (EMBEDDING, "output") and colon:
        size = n_tokens if place == EMBEDDING else readout.shape[1]
        return Node(place, _token(rest, strings, size))
    if place not in alive or not rest.isdecimal():
        raise InputError(
            f"no node named {name!r}; names are like 'blocks.0.mlp.in:31' (site:subcomponent), "
            f"'embed:17' and 'output:17' (token id) or 'output: self' (its text). Sites: "
            f"{list(alive)}."
        )
    found = (alive[place] == int(rest)).nonzero()
    if not len(found):
        raise InputError(
            f"{name!r} is not among the {len(alive[place])} alive subcomponents of its site; "
            f"alive[{place!r}] lists them. Lower alive_threshold to include more."
        )
    return Node(place, int(found[0, 0]))


def _token(text: str, strings: Sequence[str], size: int) -> int:
    if text.isdecimal():
        if int(text) >= size:
            raise InputError(f"token {text} is not in the vocabulary of {size}.")
        return int(text)
    found = [token for token, string in enumerate(strings[:size]) if string == text]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} tokens are written {text!r}; name one by its id, and mind the leading "
            "space."
        )
    return found[0]
