"""Pairs of subcomponents by head: q with k at every distance, and v with o.

The *static* interaction of a q and a k subcomponent in head h, at distance tau, is

    (s_c ||V_c|| U_q[c, h])^T M_tau (s_c' ||V_c'|| U_k[c', h])

the score that they give where both have an activation of one along their read directions, of the
sign `s` that they have where they are important. It is in the weights alone. That of a v and an o
subcomponent is what one writes into the head and the other reads from it,

    (s_c ||V_c|| U_v[c, h]) . (s_c' ||U_c'|| V_o[c', h]).

Source: VPD, attention (static interaction).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from einops import einsum, repeat
from jaxtyping import Float, Int
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vpd_lens.analysis.attention.form import ScoreForm
from vpd_lens.analysis.attention.parts import unit_vectors
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.labels import Labels
from vpd_lens.errors import InputError
from vpd_lens.rendering import Shown, titled


class Interaction(NamedTuple):
    """One pair of subcomponents in one head; the key is `offset` positions before the query."""

    first: str
    second: str
    head: int
    offset: int
    value: float


@dataclass(repr=False)
class Interactions(Shown):
    """How pairs of subcomponents of two matrices of a layer go together, by head and distance.

    Attributes:
        kind: What the values are: `"static"`, `"mean contribution"`, ...
        first: Site of the first of a pair: q, or v.
        second: Site of the second: k, or o.
        rows: Names of the subcomponents of `first`, and of its bias where that counts, too.
        columns: Names of those of `second`.
        offsets: Distances from the query back to the key; (0,) for v and o.
        values: See `kind`.
        signed: Whether signs mean anything; that of a subcomponent alone is a convention.
        sees_offsets: Whether the model's scores depend on the distance at all, given q and k. With
            learned positions they do not: there the distance is in what q and k read.
        labels: What subcomponents are called.
    """

    kind: str
    first: str
    second: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    offsets: tuple[int, ...]
    values: Float[Tensor, "head offset first second"]
    signed: bool = True
    sees_offsets: bool = True
    labels: Labels = field(default_factory=Labels)

    def standardised(self) -> Interactions:
        """Less their mean and over their standard deviation, in every head."""
        over = (1, 2, 3)
        deviation, mean = torch.std_mean(self.values, over, correction=0, keepdim=True)
        values = (self.values - mean) / deviation.clamp(min=1e-30)
        return replace(self, kind=f"{self.kind}, standardised", values=values)

    def relative(self) -> Interactions:
        """Less the mean over all distances of the same pair in the same head.

        What adds the same at every distance does not change how far back a head looks.
        """
        values = self.values - self.values.mean(1, keepdim=True)
        return replace(self, kind=f"{self.kind}, less its mean over distances", values=values)

    def of(self, first: str, second: str) -> Float[Tensor, "head offset"]:
        """The values of one pair, by names such as `"blocks.1.attn.q:316"`.

        Raises:
            InputError: If one is not among the pairs.
        """
        row, column = (
            _place(self.rows, first, self.first),
            _place(self.columns, second, self.second),
        )
        return self.values[:, :, row, column]

    def top(
        self, n: int = 10, head: int | None = None, offset: int | None = None
    ) -> list[Interaction]:
        """The `n` pairs of the largest values, of either sign; each where its value is largest.

        Of all heads and distances, or of one.

        Raises:
            InputError: If there is no such head or distance.
        """
        heads, offsets = list(range(len(self.values))), list(self.offsets)
        for name, one, known in (("head", head, heads), ("offset", offset, offsets)):
            if one is not None and one not in known:
                raise InputError(f"{name} is {one}; there are {known}.")
            known[:] = known if one is None else [one]
        chosen = self.values[heads][:, [self.offsets.index(o) for o in offsets]]
        size, where = chosen.abs().flatten(0, 1).max(0)
        best = size.flatten().topk(min(n, size.numel())).indices
        found = []
        for r, c in torch.stack(torch.unravel_index(best, size.shape), 1).tolist():
            h, o = divmod(int(where[r, c]), len(offsets))
            place = heads[h], offsets[o]
            found.append(
                Interaction(self.rows[r], self.columns[c], *place, float(chosen[h, o, r, c]))
            )
        return found

    def __rich__(self) -> Group:
        shape = f"{len(self.rows)} x {len(self.columns)} pairs in {len(self.values)} heads"
        title = f"{self.first} and {self.second}, {self.kind}: {shape}"
        if not self.sees_offsets and len(self.offsets) > 1:
            title += "\nThe same at every distance: this model's positions are in its stream."
        if not self.signed:
            title += "\nSigns are a convention; a harvest says which are which."
        table = Table()
        for heading in ("first", "second", "head", "offset", "value"):
            table.add_column(heading, justify="left" if heading in ("first", "second") else "right")
        for pair in self.top():
            ends = (Text(self.labels.named(end)) for end in pair[:2])
            table.add_row(*ends, *map(str, pair[2:4]), f"{pair.value:+.3f}")
        return titled(title, table)


def _place(names: tuple[str, ...], name: str, site: str) -> int:
    if name not in names:
        raise InputError(
            f"{name!r} is not among the {len(names)} of {site} here, which are those that the "
            "harvest has a mean importance of more than threshold= of."
        )
    return names.index(name)


def names_of(site: str, indices: Int[Tensor, " n"]) -> tuple[str, ...]:
    """Names of some subcomponents of a site."""
    return tuple(f"{site}:{index}" for index in indices.tolist())


def used_signs(
    vpd: Decomposition, harvest: Harvest | None, threshold: float
) -> dict[str, tuple[Int[Tensor, " _n"], Float[Tensor, " _n"]]]:
    """By site, which subcomponents have a mean importance above a threshold, and their signs.

    The sign is that of the mean activation where it fires. Without a harvest all are taken, and
    signs are as they happen to be.
    """
    found = {}
    for name, size in zip(vpd.layout.names, vpd.layout.sizes, strict=True):
        if harvest is None or name not in harvest.layout.names:
            found[name] = torch.arange(size), torch.ones(size)
            continue
        columns, usage = harvest.layout.columns(name), harvest.usage
        used = usage.importance[columns].double() / usage.n_positions > threshold
        index = used.nonzero()[:, 0]
        signs = torch.where(usage.signed[columns] < 0, -1.0, 1.0)
        found[name] = index, signs[index]
    return found


@torch.no_grad()
def static_interactions(
    vpd: Decomposition,
    form: ScoreForm,
    offsets: tuple[int, ...],
    used: dict[str, tuple[Tensor, Tensor]],
    signed: bool,
) -> Interactions:
    """The static interactions of a layer's q and k subcomponents."""
    sites = [f"blocks.{form.layer}.attn.{part}" for part in "qk"]
    q, k = (
        unit_vectors(vpd, form.layer, part, norm).cpu()[used[site][0]]
        * used[site][1][:, None, None]
        for part, site, norm in zip("qk", sites, (form.q_norm, form.k_norm), strict=True)
    )
    k = repeat(k, "c kv d -> c (kv group) d", group=q.shape[1] // k.shape[1])
    matrices = form.matrices[list(offsets)].cpu()
    seen = einsum(matrices, k, "offset i j, second head j -> head offset second i")
    values = einsum(q, seen, "first head i, head offset second i -> head offset first second")
    names = (names_of(site, used[site][0]) for site in sites)
    settings = signed, form.sees_offsets
    return Interactions("static", *sites, *names, offsets, values, *settings, vpd.labels)


@torch.no_grad()
def value_output_interactions(
    vpd: Decomposition, layer: int, used: dict[str, tuple[Tensor, Tensor]], signed: bool
) -> Interactions:
    """How much of what every v subcomponent writes into a head every o subcomponent reads."""
    sites = [f"blocks.{layer}.attn.{part}" for part in "vo"]
    v, o = (
        unit_vectors(vpd, layer, part).cpu()[used[site][0]] * used[site][1][:, None, None]
        for part, site in zip("vo", sites, strict=True)
    )
    v = repeat(v, "c kv d -> c (kv group) d", group=o.shape[1] // v.shape[1])
    values = einsum(v, o, "first head d, second head d -> head first second")[:, None]
    names = (names_of(site, used[site][0]) for site in sites)
    return Interactions("static", *sites, *names, (0,), values, signed, labels=vpd.labels)
