"""How many dimensions every site's matrix has, beside how many subcomponents it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from vpd_lens.decomposition.handle import Decomposition

ADVICE = (
    'C of about twice rank99 (n_subcomponents="2x-rank") is often enough for a matrix without '
    "superposition; one that stores more features than it has dimensions needs more than its rank."
)


class Ranks(NamedTuple):
    """How many dimensions a matrix has."""

    rank: int  # singular values that fp32 can tell from 0, as `torch.linalg.matrix_rank` counts
    rank99: int  # the largest of them that hold 99 % of the sum of their squares


NO_RANKS = dict.fromkeys(Ranks._fields)


def ranks(weight: Float[Tensor, "d_in d_out"]) -> Ranks | None:
    """Both ranks of a matrix; `None` if it has a shape only, as in a plan."""
    if weight.is_meta or isinstance(weight, FakeTensor):
        return None
    values = torch.linalg.svdvals(weight.detach().double())
    smallest = torch.finfo(torch.float32).eps * max(weight.shape) * values[0]
    energy = values.square().cumsum(0)
    rank = int((values > smallest).sum())
    return Ranks(rank, int((energy < 0.99 * energy[-1]).sum()) + 1 if rank else 0)


def site_sizes(vpd: Decomposition) -> dict[str, dict[str, Any]]:
    """Of every site its `shape`, number of subcomponents `C`, `rank` and `rank99` (or `None`)."""
    return {
        site.name: {"shape": site.shape, "C": count, **(found._asdict() if found else NO_RANKS)}
        for site, count, found in zip(vpd.sites, vpd.layout.sizes, vpd.ranks, strict=True)
    }


def sites_table(vpd: Decomposition) -> Table:
    """`site_sizes`, and what to make of them."""
    table = Table(title="Sites", title_justify="left", caption=ADVICE, caption_justify="left")
    table.add_column("site", overflow="fold")
    for column in ("shape", "C", *NO_RANKS):
        table.add_column(column, justify="right")
    for name, row in site_sizes(vpd).items():
        d_in, d_out = row.pop("shape")
        cells = ("-" if value is None else str(value) for value in row.values())
        table.add_row(name, f"{d_in} x {d_out}", *cells)
    return table
