"""Nonlinearity locality: a subcomponent should touch few neurons, or few attention heads.

Nonlinearities act on every neuron, or head, by itself. A subcomponent faces them with its write
direction at the matrices that write to them (MLP in and gate; q, k and v), and with its read
direction at those that read from them (MLP out; o). If unit `u` of `N` has the share `f_u` of the
squared norm of that direction, the soft count of the units that it touches is

    (1 + t/N) sum_u f_u / (f_u + t/N)

which is 1 for a single unit, about n for n equal ones while n is small against `N/t`, and at most
`(N + t)/(1 + t)`. The threshold `t` falls during training, so that smaller and smaller shares
count (the authors' later work, where the factor `1 + t/N` is a choice).
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.config import LocalityConfig
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.subcomponents import READS, WRITES
from vpd_lens.errors import ConfigError
from vpd_lens.sites.discovery import head_count


class Units(NamedTuple):
    """The neurons or heads that a matrix faces with one of its sides."""

    kind: str  # "neurons" or "heads"
    count: int  # N
    written: bool  # by the matrix, not read
    served: int = 1  # by each: query heads that share a key-value head


def units_of(vpd: Decomposition, index: int) -> Units | None:
    """What a site writes to or reads from, if that is neurons or heads."""
    name, (d_in, d_out) = vpd.layout.names[index], vpd.sites[index].shape
    part, cfg = name.rpartition(".")[2], getattr(vpd.model, "cfg", None)
    written = part in WRITES
    if part in ("in", "gate", "out"):
        return Units("neurons", d_out if written else d_in, written)
    if part not in WRITES + READS or not hasattr(cfg, "n_heads"):
        return None
    count = head_count(cfg, part)
    return Units("heads", count, written, head_count(cfg, "q") // count)


def soft_count(
    directions: Float[Tensor, "C d"], n_units: int, threshold: float
) -> Float[Tensor, " C"]:
    """How many of `n_units` equal parts each direction touches; 0 for one that is zero."""
    squares = directions.square().unflatten(1, (n_units, -1)).sum(-1)
    # A smaller bound would make the gradient of a zero direction NaN.
    shares = squares / squares.sum(-1, keepdim=True).clamp(min=1e-30)
    level = threshold / n_units
    return (1 + level) * (shares / (shares + level)).sum(-1)


class Locality:
    """The locality loss: the mean soft count of neurons, plus that of heads.

    Each is the mean over the subcomponents of all sites that face units of the kind; a key-value
    head counts as the query heads that share it.

    Raises:
        ConfigError: If no site faces neurons or heads.
    """

    def __init__(self, config: LocalityConfig, vpd: Decomposition) -> None:
        self.config, self.subcomponents = config, vpd.subcomponents
        self.units = [units_of(vpd, index) for index in range(vpd.layout.n_sites)]
        if not any(self.units):
            raise ConfigError(
                f"locality.coefficient={config.coefficient:g}, but none of the decomposed matrices "
                f"({', '.join(vpd.layout.names)}) writes to neurons or heads or reads from them; "
                "set it to 0."
            )

    def __call__(self, progress: float) -> Float[Tensor, ""]:
        """The loss after a fraction of training."""
        start, end = self.config.threshold_start, self.config.threshold_end
        threshold = start + (end - start) * progress
        counts: dict[str, list[Tensor]] = defaultdict(list)
        parts = zip(self.units, self.subcomponents.v, self.subcomponents.u, strict=True)
        for units, v, u in parts:
            if units is not None:
                count = soft_count(u if units.written else v.T, units.count, threshold)
                counts[units.kind].append(units.served * count)
        return torch.stack([torch.cat(each).mean() for each in counts.values()]).sum()
