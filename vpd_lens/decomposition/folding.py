"""Fold subcomponents into the delta of their site, and bring them back.

Without subcomponent c in V and U, `Delta = W - V U` contains `V_c U_c`, so that its mask is the
delta's from then on: under any masks the output is that of before with `m_c = m_delta`. What was
folded is kept, with its column numbers, in `Subcomponents.folded`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from vpd_lens.decomposition.handle import Decomposition
from vpd_lens.decomposition.masks import Layout
from vpd_lens.decomposition.subcomponents import PerSubcomponent
from vpd_lens.errors import InputError


def per_subcomponent(vpd: Decomposition) -> list[PerSubcomponent]:
    """Every parameter that has a row or column per subcomponent."""
    return [*vpd.subcomponents.per_subcomponent(), *vpd.importance.per_subcomponent()]


class Columns:
    """Some of the subcomponents of every site, as ascending column numbers on a device.

    Raises:
        InputError: If a site has none, or numbers that do not ascend within its size.
    """

    def __init__(
        self, sizes: Sequence[int], chosen: Sequence[Iterable[int]], device: torch.device
    ) -> None:
        lists = [list(columns) for columns in chosen]
        for index, (size, columns) in enumerate(zip(sizes, lists, strict=True)):
            if not columns or columns != sorted(set(columns) & set(range(size))):
                raise InputError(
                    f"the columns chosen of site {index} are {columns[:8]}...; give at least one, "
                    f"ascending, below the site's {size} subcomponents."
                )
        self.by_site = [torch.tensor(columns, device=device) for columns in lists]
        self.joined = torch.cat([c + sum(sizes[:i]) for i, c in enumerate(self.by_site)])

    def of(self, site: int | None) -> Int[Tensor, " kept"]:
        """Those of one site; `None`: of all sites side by side."""
        return self.joined if site is None else self.by_site[site]


@torch.no_grad()
def fold(vpd: Decomposition, keep: Columns) -> None:
    """Fold every subcomponent but those to `keep` into the delta of its site, in place.

    Parameters stay the same objects and change their shape.
    """
    parts = vpd.subcomponents
    for index, folded in enumerate(parts.folded):
        v, u, original = parts.v[index], parts.u[index], parts.original[index]
        kept = set(keep.by_site[index].tolist())
        gone = [column for column in range(v.shape[1]) if column not in kept]
        folded.v = torch.cat([folded.v, v[:, gone]], dim=1)
        folded.u = torch.cat([folded.u, u[gone]])
        folded.indices += [original[column] for column in gone]
        parts.original[index] = [original[column] for column in sorted(kept)]
    for parameter, dim, site, _ in per_subcomponent(vpd):
        parameter.data = parameter.data.index_select(dim, keep.of(site))
        parameter.grad = None
    parts.layout = Layout(parts.layout.names, tuple(map(len, parts.original)))


@torch.no_grad()
def unfold(vpd: Decomposition) -> None:
    """Bring what was folded back into its columns, in place, with importance 0 on every input.

    `V U` is again what it was, as far as the rest has not been trained since. To look, not to train
    on: the importance function's parameters that belonged to what was folded are gone.
    """
    parts = vpd.subcomponents
    sizes = parts.original_sizes
    places = Columns(sizes, parts.original, vpd.device)
    for counted in per_subcomponent(vpd):
        parameter, dim, site, off = counted
        full = parameter.new_full(counted.shape(sizes), off)
        parameter.data = full.index_copy_(dim, places.of(site), parameter.data)
        parameter.grad = None
    for v, u, folded in zip(parts.v, parts.u, parts.folded, strict=True):
        v.data[:, folded.indices] = folded.v
        u.data[folded.indices] = folded.u
        folded.v, folded.u, folded.indices = folded.v[:, :0], folded.u[:0], []
    parts.layout = Layout(parts.layout.names, sizes)
    parts.original = [list(range(size)) for size in sizes]
