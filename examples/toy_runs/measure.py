"""All ground-truth figures of one decomposed toy, site by site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vpd_lens.decomposition import Decomposition
from vpd_lens.toys.ground_truth import (
    PROBE,
    alive,
    cosine_to_features,
    dense_ci_error,
    identity_ci_error,
    identity_order,
    l2_ratio,
    mmcs,
    represented_features,
)
from vpd_lens.toys.models import TMS, ResidualMLP, Toy

HELD_OUT, HELD_OUT_SEED = 4096, 10**6
_SHOWN = 8  # columns beyond the expected ones that a record keeps


class SiteFigures(BaseModel):
    """What was found at one site.

    Attributes:
        kind: `"identity"`: one subcomponent per feature is expected; `"dense"`: one mechanism.
        expected: Number of subcomponents that the ground truth has here.
        alive: Subcomponents with importance above 0.1 somewhere on 4096 held-out inputs.
        error_01: Identity or dense CI error at tolerance 0.1.
        error_02: The same at 0.2.
        mmcs: Mean max cosine similarity of the live ones' vectors with the true ones, if these
            are known (SPD).
        matrix_mmcs: That of their whole rank-1 matrices.
        l2_ratio: Mean ratio of their norms.
        importance: Importances on single-feature inputs, columns in `identity_order`, those
            beyond the expected ones cut after a few.
        true: The true vectors `w_i` of the represented features.
        found: Those of the best-matching live subcomponents, scaled and signed to compare.
    """

    kind: str
    expected: int
    alive: int
    error_01: int
    error_02: int
    mmcs: float | None = None
    matrix_mmcs: float | None = None
    l2_ratio: float | None = None
    importance: list[list[float]]
    true: list[list[float]] = []
    found: list[list[float]] = []


class ToyReport(BaseModel):
    """How near a decomposition came to what its toy is known to compute.

    Attributes:
        represented: The features that the target represents.
        sites: Figures by site, of the represented features only.
    """

    model_config = ConfigDict(extra="forbid")

    represented: list[int]
    sites: dict[str, SiteFigures]


@dataclass
class Mechanisms:
    """A site's subcomponents next to its true mechanisms, in feature coordinates.

    Attributes:
        v: Coordinates of each subcomponent on the features, `[n, C]`.
        u: Its vector on the other side of the matrix, `[C, d]`.
        features: The true vectors, `[n, d]`.
    """

    v: Float[Tensor, "n C"]
    u: Float[Tensor, "C d"]
    features: Float[Tensor, "n d"]


def mechanisms(vpd: Decomposition, name: str) -> Mechanisms | None:
    """The known mechanisms of a site, or `None` where they are not known vectors.

    Feature `i` of TMS is row `i` of the first matrix and column `i` of the second; of the first
    residual block it is what the feature's embedding writes to the neurons.

    Args:
        vpd: The decomposition of a toy.
        name: A site.
    """
    model, weight = vpd.model, vpd.site(name).weight.detach()
    v, u = vpd.v(name).detach(), vpd.u(name).detach()
    if isinstance(model, TMS) and name == "linear1":
        return Mechanisms(v, u, weight)
    if isinstance(model, TMS) and name == "linear2":
        return Mechanisms(u.T, v.T, weight.T)
    if isinstance(model, ResidualMLP) and name == "layers.0.mlp_in":
        return Mechanisms(model.embedding @ v, u, model.embedding @ weight)
    return None


@torch.no_grad()
def measure(toy: Toy, vpd: Decomposition) -> ToyReport:
    """Compare a decomposition with what its toy is known to compute.

    Args:
        toy: The toy.
        vpd: Its decomposition, trained or not.
    """
    model, n = vpd.model, toy.data.n_features
    probe = PROBE * torch.eye(n)
    skipped = torch.zeros(n, n) if isinstance(model, TMS) else probe
    represented = represented_features(model(probe), skipped)
    held_out = toy.data(torch.Generator().manual_seed(HELD_OUT_SEED), HELD_OUT)
    on_probe = vpd.layout.split(vpd.causal_importance(probe)[represented])
    on_data = vpd.layout.split(vpd.causal_importance(held_out))
    figures = {}
    for name, importance, data in zip(vpd.layout.names, on_probe, on_data, strict=True):
        rank = toy.dense_sites.get(name)
        live = alive(data)
        figures[name] = _figures(importance, live, rank)
        known = mechanisms(vpd, name)
        if known is not None:
            known = Mechanisms(known.v[:, live], known.u[live], known.features)
            _compare(figures[name], known, represented)
    return ToyReport(represented=represented.nonzero().flatten().tolist(), sites=figures)


def _figures(importance: Tensor, live: Tensor, rank: int | None) -> SiteFigures:
    expected = len(importance) if rank is None else rank
    errors = [
        identity_ci_error(importance, tolerance)
        if rank is None
        else dense_ci_error(importance, rank, tolerance)
        for tolerance in (0.1, 0.2)
    ]
    by_mass = importance.sum(0).argsort(descending=True).tolist()
    order = identity_order(importance) if rank is None else by_mass
    return SiteFigures(
        kind="identity" if rank is None else "dense",
        expected=expected,
        alive=int(live.sum()),
        error_01=errors[0],
        error_02=errors[1],
        importance=_rounded(importance[:, order[: expected + _SHOWN]]),
    )


def _compare(figures: SiteFigures, known: Mechanisms, represented: Tensor) -> None:
    """Add what needs the true vectors: both MMCS, L2 ratio and the vectors themselves."""
    cosine = cosine_to_features(known.v, known.u, known.features)[represented]
    true = known.features[represented]
    vectors = F.normalize(known.features, dim=1) @ F.normalize(known.u, dim=1).T
    figures.mmcs = mmcs((vectors * known.v.sign())[represented])
    figures.matrix_mmcs = mmcs(cosine)
    figures.l2_ratio = l2_ratio(cosine, known.v, known.u, true)
    figures.true = _rounded(true)
    if cosine.shape[1]:
        best = cosine.argmax(1)
        at_feature = known.v[represented].gather(1, best[:, None])
        figures.found = _rounded(at_feature * known.u[best])


def _rounded(x: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in x.tolist()]
