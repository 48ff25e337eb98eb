"""How alike are two decompositions of the same model?

Mean max cosine similarity (MMCS): every subcomponent of the reference is matched with the most
similar one at the same site of the other decomposition, and the cosines are averaged. It is 1 if
everything in the reference is found again, and is not symmetric. Cosines are absolute: the sign
of a V column or of a U row is a convention.

A rank-1 matrix' cosine is the product of its directions' cosines,
`<v u', w z'> / (|v u'| |w z'|) = cos(v, w) cos(u, z)`, so no rank-1 matrix is ever formed.

Source: VPD, evaluation (seed consistency and feature splitting).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vpd_lens.analysis.usage import Alive
from vpd_lens.decomposition import Decomposition
from vpd_lens.description import DecompositionRecord
from vpd_lens.errors import InputError
from vpd_lens.storage import read

# By site; sizes differ from one to the next, so their names are not checked against each other.
Directions = Mapping[str, tuple[Float[Tensor, "_d_in _C"], Float[Tensor, "_C _d_out"]]]

MATCH = 0.5


class Similarity(BaseModel):
    """Mean max cosine similarity of the reference's subcomponents with the other's.

    Attributes:
        v: Of the read directions, the columns of V.
        u: Of the write directions, the rows of U.
        rank_one: Of the rank-1 matrices `V[:, c] U[c, :]`.
        n_reference: Subcomponents averaged over; the similarities are NaN if there are none.
        n_other: Subcomponents they could be matched with; the similarities are 0 without any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    v: float
    u: float
    rank_one: float
    n_reference: int
    n_other: int


class Comparison(BaseModel):
    """Two decompositions, site by site.

    Attributes:
        sites: Similarity at every site.
        overall: The mean over all subcomponents of the reference, whatever their site.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: dict[str, Similarity]
    overall: Similarity


@torch.no_grad()
def compare(
    reference: Directions, other: Directions, alive: tuple[Alive, Alive] | None = None
) -> Comparison:
    """Match every subcomponent of `reference` with its most similar one in `other`.

    Args:
        reference: `{site: (V [d_in, C], U [C, d_out])}`; see `directions`.
        other: The same sites; numbers of subcomponents may differ.
        alive: Which subcomponents count, `{site: indices}` of the reference and of the other; by
            default all. See `vpd_lens.analysis.alive_subcomponents`.

    Raises:
        InputError: If the sites or their shapes differ.

    Examples:
        >>> v, u = torch.eye(3), torch.eye(3)
        >>> compare({"w": (v, u)}, {"w": (v, -u.flip(0))}).overall
        Similarity(v=1.0, u=1.0, rank_one=0.0, n_reference=3, n_other=3)
    """
    pairs = _paired(reference, other, alive)
    best = {site: _best_cosines(*pair) for site, pair in pairs.items()}
    n_other = {site: other_v.shape[1] for site, (_, (other_v, _)) in pairs.items()}
    return Comparison(
        sites={site: _similarity(best[site], n_other[site]) for site in pairs},
        overall=_similarity(torch.cat(list(best.values()), dim=1), sum(n_other.values())),
    )


def random_baseline(
    reference: Directions,
    other: Directions,
    alive: tuple[Alive, Alive] | None = None,
    seed: int = 0,
) -> Comparison:
    """`compare` for random directions of the same shapes: what chance gives.

    Only shapes and counts of the arguments are used. Directions are Gaussian, as at the
    initialisation, whose scale does not matter.

    Args:
        reference: As for `compare`.
        other: As for `compare`.
        alive: As for `compare`.
        seed: Seed of the directions.

    Raises:
        InputError: If the sites or their shapes differ.
    """
    generator = torch.Generator().manual_seed(seed)

    def like(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        v, u = (torch.randn(x.shape, generator=generator) for x in pair)
        return v, u

    pairs = _paired(reference, other, alive)
    drawn = {site: (like(first), like(second)) for site, (first, second) in pairs.items()}
    return compare(
        {site: first for site, (first, _) in drawn.items()},
        {site: second for site, (_, second) in drawn.items()},
    )


@torch.no_grad()
def multiple_match_share(
    reference: Directions,
    larger: Directions,
    alive: tuple[Alive, Alive] | None = None,
    threshold: float = MATCH,
) -> float:
    """Share of the reference's subcomponents that more capacity has split.

    A subcomponent counts as split if *more than one* subcomponent at the same site of the larger
    decomposition has a write direction (row of U) whose absolute cosine with its own exceeds
    `threshold`. The share is taken over all subcomponents of the reference, those without a match
    included, of all sites together. The paper reports 2.7 %.

    Args:
        reference: The smaller decomposition; see `directions`.
        larger: The one with more subcomponents.
        alive: Which subcomponents count, as for `compare`.
        threshold: Cosine above which two write directions match.

    Returns:
        A number between 0 and 1; NaN if the reference has no subcomponents.

    Raises:
        InputError: If the sites or their shapes differ.
    """
    split, count = 0, 0
    for (_, u), (_, larger_u) in _paired(reference, larger, alive).values():
        matches = (_cosines(u, larger_u) > threshold).sum(1)  # [C]
        split += int((matches > 1).sum())
        count += len(matches)
    return split / count if count else float("nan")


def directions(decomposition: Decomposition | str | Path) -> Directions:
    """V and U of every site, on the CPU.

    Args:
        decomposition: `model.vpd`, or the directory of a saved decomposition, which is read
            without its model.

    Raises:
        ArtefactError: If the directory is missing or damaged.
    """
    if isinstance(decomposition, Decomposition):
        layout, parts = decomposition.layout, decomposition.subcomponents
        return {
            name: (v.detach().cpu(), u.detach().cpu())
            for name, v, u in zip(layout.names, parts.v, parts.u, strict=True)
        }
    artefact = read(decomposition, DecompositionRecord)
    tensors = artefact.tensors("subcomponents")
    return {site: (tensors[f"{site}.V"], tensors[f"{site}.U"]) for site in artefact.record.sites}


# --------------------------------------------------------------------------- one site

Pair = tuple[Tensor, Tensor]  # V [d_in, C], U [C, d_out]


def _best_cosines(reference: Pair, other: Pair) -> Float[Tensor, "3 C"]:
    """For every subcomponent of the reference the largest cosine of V, of U and of V U."""
    v = _cosines(reference[0].T, other[0].T)  # [C, C_other]
    u = _cosines(reference[1], other[1])
    if not v.shape[1]:
        return v.new_zeros(3, v.shape[0])
    return torch.stack([cosine.amax(1) for cosine in (v, u, v * u)])


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
    if set(reference) != set(other):
        raise InputError(
            "the decompositions have different sites; only in one of them: "
            f"{sorted(set(reference) ^ set(other))}."
        )
    pairs = {}
    for site, (v, u) in reference.items():
        other_v, other_u = other[site]
        shapes = (v.shape[0], u.shape[1]), (other_v.shape[0], other_u.shape[1])
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{site}: matrices of different shapes, {shapes[0]} and {shapes[1]}; only "
                "decompositions of the same model can be compared."
            )
        keep, other_keep = (
            (slice(None), slice(None)) if alive is None else (alive[0][site], alive[1][site])
        )
        pairs[site] = (v[:, keep], u[keep]), (other_v[:, other_keep], other_u[other_keep])
    return pairs
