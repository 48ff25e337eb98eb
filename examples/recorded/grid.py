"""The grid of a sweep: `PATH=V1,V2,...`, and every combination of several."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from vpd_lens.config import parse_yaml
from vpd_lens.errors import ConfigError

Axes = dict[str, list[Any]]
GridPoint = dict[str, Any]


def parse_grid(axes: Sequence[str]) -> Axes:
    """Values by path, in the order given.

    Args:
        axes: `PATH=V1,V2,...` each. PATH is that of `--set`; the values are YAML, separated by
            commas (`n_subcomponents={attn: 8, mlp: 16},32` has two).

    Raises:
        ConfigError: If one cannot be read, has no values or a value twice, or a path repeats.
    """
    grid: Axes = {}
    for axis in axes:
        path, _, text = axis.partition("=")
        path = path.strip()
        values = parse_yaml(f"[{text}]", f"--grid {axis!r}")
        if not path or not values:
            raise ConfigError(
                f"--grid {axis!r}: expected PATH=V1,V2,..., for example optimiser.lr=1e-3,3e-3."
            )
        if path in grid or path == "output":
            reason = "is given twice" if path in grid else "is the sweep's own; use --output"
            raise ConfigError(f"--grid {axis!r}: {path} {reason}.")
        if len({label(value) for value in values}) < len(values):
            raise ConfigError(f"--grid {axis!r}: a value is given twice.")
        grid[path] = values
    if not grid:
        raise ConfigError("a sweep needs at least one --grid PATH=V1,V2,...")
    return grid


def grid_points(grid: Axes) -> list[GridPoint]:
    """The Cartesian product, the last path varying fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def overrides(point: GridPoint) -> list[str]:
    """A point as `--set` would be given it: JSON values are YAML."""
    return [f"{path}={json.dumps(value)}" for path, value in point.items()]


def point_name(point: GridPoint) -> str:
    """A point as the name of a directory, for example `seed=0,optimiser.lr=0.001`."""
    text = ",".join(f"{path}={label(value)}" for path, value in point.items())
    return re.sub(r"[^\w.,=+-]+", "_", text)


def label(value: Any) -> str:
    """A value, short enough for a plot."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
