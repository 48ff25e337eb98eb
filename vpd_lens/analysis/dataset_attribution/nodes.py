"""Nodes by name (`blocks.0.mlp.in:31`, `embed:17`, `output: self`), ranked and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Literal, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING
from vpd_lens.errors import InputError

OUTPUT = "output"

Sign = Literal["both", "positive", "negative"]


class Node(NamedTuple):
    """A node's place, and its row there: among the alive subcomponents, or a token id."""

    place: str
    row: int


def node_name(place: str, row: int, alive: Mapping[str, Tensor]) -> str:
    """The name of a node: row among the alive subcomponents of its site, or token id."""
    return f"{place}:{int(alive[place][row]) if place in alive else row}"


def find_node(
    name: str, alive: Mapping[str, Tensor], strings: Sequence[str], n_tokens: int, readout: Tensor
) -> Node:
    """The node of a name, as `node_name` gives it; tokens also as text."""
    place, colon, rest = name.partition(":")
    if place in (EMBEDDING, OUTPUT) and colon:
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


def ranked(
    found: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    top: int | None,
    sign: Sign,
    place: str | None,
) -> list[tuple[str, float]]:
    """Names and values, the strongest first; what is 0 is left out."""
    if sign not in ("both", "positive", "negative"):
        raise InputError(f"sign={sign!r}; expected 'both', 'positive' or 'negative'.")
    if place is not None and place not in found:
        raise InputError(f"place={place!r}; here are {list(found)}.")
    parts = {name: part for name, part in found.items() if place in (None, name)}
    if not parts:
        return []
    values = torch.cat(list(parts.values()))
    size = {"both": values.abs(), "positive": values, "negative": -values}[sign]
    order = size.argsort(descending=True, stable=True)
    order = order[size[order] > 0][:top]
    nodes = [(name, row) for name, part in parts.items() for row in range(len(part))]
    return [(node_name(*nodes[i], alive), float(values[i])) for i in order.tolist()]


def strongest_table(
    title: str,
    sources: Sequence[tuple[str, float]],
    targets: Sequence[tuple[str, float]],
    strings: Sequence[str],
) -> Table:
    """A rich table of ranked sources on the left and ranked targets on the right."""
    table = Table(title=title, title_justify="left")
    for heading in ("source", "target"):
        table.add_column(heading, overflow="fold")
        table.add_column("", justify="right")
    for left, right in zip_longest(sources, targets):
        table.add_row(*_cells(strings, left), *_cells(strings, right))
    return table


def _cells(strings: Sequence[str], found: tuple[str, float] | None) -> tuple[Text, Text]:
    if found is None:
        return Text(), Text()
    name, value = found
    place, _, index = name.partition(":")
    text = f"{name} {strings[int(index)]!r}" if place in (EMBEDDING, OUTPUT) else name
    return Text(text), Text(f"{value:+.3f}")  # as Text: brackets in a token are no markup
