"""Names of subcomponents, and positions, as edits give them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import InputError

Positions = int | slice | Sequence[int] | None


def located(
    vpd: Decomposition, names: str | Sequence[str], positions: Positions = None
) -> list[tuple[str, int, Positions]]:
    """Site, index and positions of subcomponents by name.

    Raises:
        InputError: If there is no subcomponent of a name, or it says a position and so does
            `positions`.
    """
    found: list[tuple[str, int, Positions]] = []
    sizes = dict(zip(vpd.layout.names, vpd.layout.sizes, strict=True))
    for name in [names] if isinstance(names, str) else names:
        match = re.fullmatch(r"(.+):(\d+)(?:@(\d+))?", name)
        if match is None:
            raise InputError(
                f"{name!r} is no subcomponent; names are like 'blocks.0.mlp.in:31' (site:index) or "
                "'blocks.0.mlp.in:31@5' (at a position)."
            )
        site, index, position = match[1], int(match[2]), None if match[3] is None else int(match[3])
        if site not in sizes:
            raise InputError(f"{name!r}: no site {site!r}; sites: {list(sizes)}.")
        if index >= sizes[site]:
            raise InputError(f"{name!r}: {site} has {sizes[site]} subcomponents, counted from 0.")
        if position is not None and positions is not None:
            raise InputError(f"{name!r} names a position, and positions={positions!r} too.")
        found.append((site, index, positions if position is None else position))
    return found


def where_of(what: str, positions: Positions, n_positions: int | None = None) -> range | list[int]:
    """Positions as a range or list, if they are counted from 0 up and in the prompt."""
    given = slice(None) if positions is None else positions
    if isinstance(given, slice):
        step = 1 if given.step is None else given.step
        begins, ends = [given.start or 0], [sys.maxsize if given.stop is None else given.stop]
        where, backwards = range(begins[0], ends[0], max(step, 1)), step < 1
    else:
        where = begins = [given] if isinstance(given, int) else list(given)
        ends, backwards = [], isinstance(positions, bool)
    if backwards:
        raise InputError(f"positions={positions!r}; expected numbers, or a slice going forwards.")
    if any(position < 0 for position in begins + ends):
        raise InputError(
            f"positions={positions!r}: count from the beginning; generated text has no fixed end."
        )
    if n_positions is not None and max(begins, default=0) >= n_positions:
        raise InputError(
            f"{what}: position {max(begins)} is not in the prompt, which has "
            f"{n_positions} tokens (0 to {n_positions - 1})."
        )
    return where


def meet(one: range | list[int], other: range | list[int]) -> bool:
    """Whether two sets of positions have one in common; open slices are taken as having no step."""
    if isinstance(one, list) or isinstance(other, list):
        few, many = (one, other) if isinstance(one, list) else (other, one)
        return any(position in many for position in few)
    return max(one.start, other.start) < min(one.stop, other.stop)
