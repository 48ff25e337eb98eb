"""How near a decomposition is to the mechanisms that a toy is known to have.

All figures are invariant to the order of subcomponents and to the sign of `(V_c, U_c)`, which a
decomposition cannot fix. Importances are those on single-feature inputs `0.75 * eye(n)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

PROBE = 0.75
ALIVE = 0.1


def represented_features(
    output: Float[Tensor, "n n"], skipped: Float[Tensor, "n n"]
) -> Bool[Tensor, " n"]:
    """Features that the target itself computes; no method can find a mechanism for the others.

    A feature's strength is how much of its own output the decomposed layers make. A target has
    dropped a feature, as TMS sometimes does, if its strength is below half the median. The rule is
    the same for every method: it looks at the target alone, at its `output` on single-feature
    inputs and that without the decomposed layers, `skipped` (TMS: 0, residual MLP: the input).
    """
    strength = (output - skipped).diagonal().abs()
    return strength >= 0.5 * strength.median()


def alive(importance: Float[Tensor, "batch C"], threshold: float = ALIVE) -> Bool[Tensor, " C"]:
    """Subcomponents whose importance exceeds `threshold` on some input."""
    return importance.amax(0) > threshold


def cosine_to_features(
    v: Float[Tensor, "n C"], u: Float[Tensor, "C d"], features: Float[Tensor, "n d"]
) -> Float[Tensor, "n C"]:
    """Cosine (Frobenius) of every rank-1 matrix `V_c U_c` with every mechanism `e_i w_i`.

    Both are of rank 1, so it is `cos(V_c, e_i) cos(U_c, w_i)`: a match reads the feature alone and
    writes its vector. Read directions `v` are in feature coordinates; `features` are the `w_i`.
    """
    return F.normalize(v, dim=0) * (F.normalize(features, dim=1) @ F.normalize(u, dim=1).T)


def mmcs(cosine: Float[Tensor, "n C"]) -> float:
    """Mean max cosine similarity: over features, of the best subcomponent.

    `cosine` is that of the live subcomponents with the represented features' mechanisms. SPD's is
    that of the vectors alone, `cos(U_c, w_i)`; that of whole matrices is stricter.
    """
    return float(cosine.amax(1).mean()) if cosine.shape[1] else 0.0


def l2_ratio(
    cosine: Float[Tensor, "n C"],
    v: Float[Tensor, "_coordinates C"],
    u: Float[Tensor, "C d"],
    features: Float[Tensor, "n d"],
) -> float:
    """Mean ratio of the best subcomponent's norm to the true vector's (SPD's ML2R); ideally 1.

    The arguments are those and the result of `cosine_to_features`.
    """
    if not cosine.shape[1]:
        return 0.0
    best = cosine.argmax(1)
    norms = v.norm(dim=0)[best] * u.norm(dim=1)[best]
    return float((norms / features.norm(dim=1)).mean())


def identity_order(importance: Float[Tensor, "n C"]) -> list[int]:
    """Columns in the most diagonal order: optimally assigned to rows, then by falling maximum."""
    first = linear_sum_assignment(importance.numpy(), maximize=True)[1].tolist()
    by_maximum = importance.amax(0).argsort(descending=True).tolist()
    return first + [column for column in by_maximum if column not in first]


def identity_ci_error(importance: Float[Tensor, "n C"], tolerance: float) -> int:
    """Entries in which the importances differ from a permuted identity (SPD).

    Diagonal entries below `1 - tolerance` plus all other entries above `tolerance`, those of
    columns without a feature included. 0 means one subcomponent per feature and no others.
    """
    ordered = importance[:, identity_order(importance)]
    expected = torch.eye(*ordered.shape, dtype=torch.bool)
    missing = len(ordered) - int((ordered.diagonal() >= 1 - tolerance).sum())
    return missing + int((ordered[~expected] > tolerance).sum())


def dense_ci_error(importance: Float[Tensor, "n C"], rank: int, tolerance: float) -> int:
    """Columns missing from, and entries beyond, a dense block of `rank` subcomponents (SPD).

    `rank` is that of the mechanism. Of the `rank` columns with the largest sums each must reach
    `1 - tolerance` on some input; every entry above `tolerance` in another column counts too.
    """
    ordered = importance[:, importance.sum(0).argsort(descending=True)]
    block, rest = ordered[:, :rank], ordered[:, rank:]
    reached = int((block.amax(0) >= 1 - tolerance).sum())
    return rank - reached + int((rest > tolerance).sum())
