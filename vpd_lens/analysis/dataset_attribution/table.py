"""A node's strongest sources and targets, for the terminal."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from vpd_lens.analysis.dataset_attribution.result import DatasetAttributions


def table(result: DatasetAttributions, node: str, top: int, absolute: bool) -> Table:
    """Sources on the left, targets on the right.

    Args:
        result: The attributions.
        node: Name of the node.
        top: Number of rows.
        absolute: The absolute variant.

    Raises:
        InputError: If there is no such node.
    """
    kind = "absolute attributions" if absolute else "attributions"
    out = Table(title=f"{node}: {kind}", title_justify="left")
    for heading in ("source", "target"):
        out.add_column(heading, overflow="fold")
        out.add_column("", justify="right")
    place = node.partition(":")[0]
    sources = result.sources(node, top, absolute=absolute) if place in result.places else []
    targets = [] if place == "output" else result.targets(node, top, absolute=absolute)
    for left, right in zip_longest(sources, targets):
        out.add_row(*_cells(result, left), *_cells(result, right))
    return out


def _cells(result: DatasetAttributions, found: tuple[str, float] | None) -> tuple[Text, Text]:
    if found is None:
        return Text(), Text()
    name, value = found
    place, _, index = name.partition(":")
    text = f"{name} {result.strings[int(index)]!r}" if place in ("embed", "output") else name
    return Text(text), Text(f"{value:+.3f}")  # as Text: brackets in a token are no markup
