"""Matrix products of a training step, phase by phase.

A product of `[n, a]` with `[a, b]` counts `2 n a b` FLOPs. Backward passes need the products that
carry gradients to something: none to the target's weights, none to inputs before the first site.
"""

from __future__ import annotations

from dataclasses import dataclass

from vpd_lens.training.cost.workload import Workload

TARGET, FAITHFULNESS, UPDATE = "target forward", "faithfulness", "update"
IMPORTANCE, IMPORTANCE_BACK = "importances: forward", "importances: backward"
INNER, INNER_BACK = "inner steps: masked forward", "inner steps: backward"
LOSSES, LOSSES_BACK = "losses: masked forward", "losses: backward"

# Muon's orthogonalisation (torch.optim.Muon): iterations, each of three products.
_NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Product:
    """The matrix products of one phase of a step, on one rank.

    Attributes:
        phase: Which phase.
        flops: Floating-point operations, a multiplication and an addition being two.
        precision: In which they are computed.
        passes: How often the phase runs in a step; `flops` is the sum over all of them.
    """

    phase: str
    flops: float
    precision: str
    passes: int = 1


def products(work: Workload) -> list[Product]:
    """All matrix products of a step, in the order of the step."""
    inner, loss = work.inner_passes, work.loss_passes
    masked = _target_forward(work) + _sites_forward(work)
    to_masks = _target_backward(work) + _sites_backward(work)
    # In several parts the importances are computed twice, first without a graph.
    forwards = 2 if work.config.micro_batches > 1 else 1
    # Blocks that are computed again in the backward pass; the unembedding is not in one.
    again = masked - _unembedding(work) if work.config.recompute else 0.0
    own, ci = work.precision, work.importance_precision
    found = [
        Product(TARGET, _target_forward(work), own),
        Product(IMPORTANCE, forwards * _importance_forward(work), ci, forwards),
        Product(INNER, inner * masked, own, inner),
        Product(INNER_BACK, inner * (to_masks + again), own, inner),
        Product(LOSSES, loss * masked, own, loss),
        Product(LOSSES_BACK, loss * (to_masks + again + _directions_backward(work)), own, loss),
        Product(IMPORTANCE_BACK, _importance_backward(work), ci),
        Product(FAITHFULNESS, _faithfulness(work), "float32"),
        Product(UPDATE, _newton_schulz(work), "bfloat16"),
    ]
    return [product for product in found if product.flops]


def flops(work: Workload) -> float:
    """All FLOPs of a step on one rank."""
    return sum(product.flops for product in products(work))


def _target_forward(work: Workload) -> float:
    target = work.target
    if not target.n_layers:
        matrices = sum(site.d_in * site.d_out for site in work.sites)
        return 2.0 * work.positions * matrices
    matrices = sum(m.d_in * m.d_out for m in target.matrices())
    scores = target.n_layers * work.seq_len * target.d_query
    return work.positions * (2.0 * matrices + 4.0 * scores)


def _unembedding(work: Workload) -> float:
    return 2.0 * work.positions * work.target.d_model * work.target.d_vocab


def _target_backward(work: Workload) -> float:
    """To the inputs only: the target's weights are frozen."""
    target = work.target
    if not target.n_layers:
        return 2.0 * work.positions * sum(s.d_in * s.d_out for s in work.sites if work.tracked(s))
    matrices = sum(m.d_in * m.d_out for m in target.matrices() if work.tracked(m))
    scores = work.tracked_attentions * work.seq_len * target.d_query
    return work.positions * (2.0 * matrices + 8.0 * scores)


def _sites_forward(work: Workload) -> float:
    """`x V`, then `(weight * acts) U`."""
    return 2.0 * work.positions * work.directions


def _sites_backward(work: Workload) -> float:
    """The gradient of the masks (through `U`), and of the input (through `V`)."""
    pairs = zip(work.sites, work.counts, strict=True)
    widths = sum(c * (s.d_out + (s.d_in if work.tracked(s) else 0)) for s, c in pairs)
    return 2.0 * work.positions * widths


def _directions_backward(work: Workload) -> float:
    return 2.0 * work.positions * work.directions


def _importance_scores(work: Workload) -> float:
    ci = work.importance
    blocks = (ci.n_blocks or 0) if ci.kind == "transformer" else 0
    return float(work.positions) * blocks * work.seq_len * work.d_importance


def _importance_forward(work: Workload) -> float:
    own = 2.0 * work.positions * work.importance_parameters
    if work.importance.kind == "mlp":
        # Only the second layer is a product; the first reads the activations `x V`.
        hidden = work.positions * work.c_total * work.importance.hidden
        return 2.0 * hidden + 2.0 * work.positions * _read_directions(work)
    return own + 4.0 * _importance_scores(work)


def _importance_backward(work: Workload) -> float:
    if work.importance.kind == "mlp":
        hidden = work.positions * work.c_total * work.importance.hidden
        return 4.0 * hidden + 2.0 * work.positions * _read_directions(work)
    # Nothing before the importance function needs a gradient.
    matrices = work.importance_matrices
    if work.importance.kind == "transformer":
        first = matrices[:1]
    else:
        first = matrices[:: 2 if work.importance.hidden else 1]
    skipped = 2.0 * work.positions * sum(a * b for a, b in first)
    # Fused attention computes its scores again in the backward pass.
    own = 4.0 * work.positions * work.importance_parameters
    return own - skipped + 10.0 * _importance_scores(work)


def _read_directions(work: Workload) -> int:
    return sum(c * s.d_in for s, c in zip(work.sites, work.counts, strict=True))


def _faithfulness(work: Workload) -> float:
    """`V U` of every site, and the gradients of both; the batch plays no part."""
    pairs = zip(work.sites, work.counts, strict=True)
    return 6.0 * sum(s.d_in * s.d_out * c for s, c in pairs)


def _newton_schulz(work: Workload) -> float:
    if work.config.optimiser.kind != "muon":
        return 0.0
    pairs = list(zip(work.sites, work.counts, strict=True))
    shapes = [(s.d_in, c) for s, c in pairs] + [(c, s.d_out) for s, c in pairs]
    total = 0.0
    for a, b in shapes + work.importance_matrices:
        short, long = min(a, b), max(a, b)
        total += 4.0 * short * short * long + 2.0 * short**3
    return _NEWTON_SCHULZ_STEPS * total
