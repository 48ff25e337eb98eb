"""How alike are two decompositions of the same model?

Mean max cosine similarity (MMCS): every subcomponent of the reference is matched with the most
similar one at the same site of the other decomposition, and the cosines are averaged. It is 1 if
everything in the reference is found again, and is not symmetric. Cosines are absolute: the sign
of a V column or of a U row is a convention. That of two rank-1 matrices is the product of their
directions' cosines, `<v u', w z'> / (|v u'| |w z'|) = cos(v, w) cos(u, z)`, so none is formed.

Source: VPD, evaluation (seed consistency and feature splitting).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vpd_lens.analysis.usage import Alive
from vpd_lens.decomposition import Decomposition
from vpd_lens.description import DecompositionRecord
from vpd_lens.errors import InputError
from vpd_lens.rendering import Shown
from vpd_lens.storage import read

# V and U; sizes differ from one site to the next, so they are not checked against each other.
Pair = tuple[Float[Tensor, "_d_in _C"], Float[Tensor, "_C _d_out"]]
Directions = Mapping[str, Pair]

MATCH = 0.5


class Similarity(BaseModel):
    """Mean max cosine similarity of the reference's subcomponents with the other's.

    `v` is of the read directions, the columns of V, `u` of the write directions, the rows of U, and
    `rank_one` of the matrices `V[:, c] U[c, :]`. `n_reference` subcomponents are averaged over,
    without any all is NaN; they could be matched with `n_other`, without any all is 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    v: float
    u: float
    rank_one: float
    n_reference: int
    n_other: int


class Comparison(Shown, BaseModel):
    """Two decompositions, site by site, and `overall`: the mean over all subcomponents."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: dict[str, Similarity]
    overall: Similarity

    def __rich__(self) -> Table:
        table = Table(title="Mean max cosine similarity", title_justify="left")
        table.add_column("site", overflow="fold")
        for heading in ("V", "U", "rank one", "reference", "other"):
            table.add_column(heading, justify="right")
        for site, found in {**self.sites, "overall": self.overall}.items():
            cosines = (f"{x:.3f}" for x in (found.v, found.u, found.rank_one))
            table.add_row(Text(site), *cosines, str(found.n_reference), str(found.n_other))
        return table


@torch.no_grad()
def compare(
    reference: Directions, other: Directions, alive: tuple[Alive, Alive] | None = None
) -> Comparison:
    """Match every subcomponent of `reference` with its most similar one in `other`.

    Both are `{site: (V [d_in, C], U [C, d_out])}`, see `directions`, of the same sites; numbers of
    subcomponents may differ. `alive` says which count, `{site: indices}` of the reference and of
    the other, see `vpd_lens.analysis.alive_subcomponents`; by default all do.

    Raises:
        InputError: If the sites or their shapes differ.

    Examples:
        >>> v, u = torch.eye(3), torch.eye(3)
        >>> compare({"w": (v, u)}, {"w": (v, -u.flip(0))}).overall
        Similarity(v=1.0, u=1.0, rank_one=0.0, n_reference=3, n_other=3)
    """
    return _compared(_paired(reference, other, alive))


@torch.no_grad()
def random_baseline(
    reference: Directions,
    other: Directions,
    alive: tuple[Alive, Alive] | None = None,
    seed: int = 0,
) -> Comparison:
    """`compare`, whose arguments these are, for Gaussian directions: what chance gives.

    Raises:
        InputError: If the sites or their shapes differ.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = _paired(reference, other, alive)
    for site, both in pairs.items():
        pairs[site] = tuple(
            tuple(torch.randn(x.shape, generator=generator) for x in pair) for pair in both
        )
    return _compared(pairs)


@torch.no_grad()
def multiple_match_share(
    reference: Directions,
    larger: Directions,
    alive: tuple[Alive, Alive] | None = None,
    threshold: float = MATCH,
) -> float:
    """Share of the reference's subcomponents that more capacity has split, NaN if it has none.

    One is split if *more than one* subcomponent at the same site of the larger decomposition has a
    write direction (row of U) whose absolute cosine with its own exceeds `threshold`. The share is
    of all subcomponents of the reference, without a match or with, of all sites together. The paper
    reports 2.7 %. The arguments are those of `compare`.

    Raises:
        InputError: If the sites or their shapes differ.
    """
    pairs = _paired(reference, larger, alive).values()
    matches = [(_cosines(u, larger_u) > threshold).sum(1) for (_, u), (_, larger_u) in pairs]
    return float((torch.cat(matches) > 1).double().mean())


def directions(decomposition: Decomposition | str | Path) -> Directions:
    """V and U of every site, on the CPU, of `model.vpd` or a saved decomposition's directory.

    Raises:
        ArtefactError: If the directory is missing or damaged.
    """
    if isinstance(decomposition, Decomposition):
        vpd = decomposition
        return {n: (vpd.v(n).detach().cpu(), vpd.u(n).detach().cpu()) for n in vpd.layout.names}
    artefact = read(decomposition, DecompositionRecord)
    tensors = artefact.tensors("subcomponents")
    return {site: (tensors[f"{site}.V"], tensors[f"{site}.U"]) for site in artefact.record.sites}


def _compared(pairs: Mapping[str, tuple[Pair, Pair]]) -> Comparison:
    best, n_other = {}, {}
    for site, ((v, u), (other_v, other_u)) in pairs.items():
        of_v, of_u = _cosines(v.T, other_v.T), _cosines(u, other_u)  # [C, C_other]
        # A column of zeros, so that there is a largest one even if there is no other.
        best[site] = torch.stack([F.pad(c, (1, 0)).amax(1) for c in (of_v, of_u, of_v * of_u)])
        n_other[site] = len(other_u)
    return Comparison(
        sites={site: _similarity(best[site], n_other[site]) for site in pairs},
        overall=_similarity(torch.cat(list(best.values()), dim=1), sum(n_other.values())),
    )


def _cosines(a: Float[Tensor, "A d"], b: Float[Tensor, "B d"]) -> Float[Tensor, "A B"]:
    """Absolute cosines between rows; those of a zero row are 0."""
    return (F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T).abs()


def _similarity(best: Float[Tensor, "3 C"], n_other: int) -> Similarity:
    v, u, rank_one = best.mean(1).tolist()
    return Similarity(v=v, u=u, rank_one=rank_one, n_reference=best.shape[1], n_other=n_other)


def _paired(
    reference: Directions, other: Directions, alive: tuple[Alive, Alive] | None
) -> dict[str, tuple[Pair, Pair]]:
    """Directions of both at every site, restricted to those that count."""
    if unlike := sorted(set(reference) ^ set(other)):
        raise InputError(f"the decompositions have different sites; only in one of them: {unlike}.")
    pairs = {}
    for site in reference:
        both = reference[site], other[site]
        first, second = ((len(v), u.shape[1]) for v, u in both)
        if first != second:
            raise InputError(
                f"{site}: matrices of different shapes, {first} and {second}; only decompositions "
                "of the same model can be compared."
            )
        kept = (slice(None),) * 2 if alive is None else (alive[0][site], alive[1][site])
        pairs[site] = tuple((v[:, i], u[i]) for (v, u), i in zip(both, kept, strict=True))
    return pairs
