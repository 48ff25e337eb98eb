"""The strongest of many attributions, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from vpd_lens.analysis.dataset_attribution.names import node_name
from vpd_lens.errors import InputError

Sign = Literal["both", "positive", "negative"]


def ranked(
    found: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    top: int | None,
    sign: Sign,
    place: str | None,
) -> list[tuple[str, float]]:
    """Names and values, the strongest first; what is 0 is left out.

    Args:
        found: Values of the nodes of each place, `[n]`.
        alive: Alive subcomponents by site.
        top: At most so many.
        sign: Which values.
        place: Nodes of this place only.

    Raises:
        InputError: If there is no such sign or place.
    """
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
