"""Elementwise work of a training step: named passes over memory, and how many kernels run.

A pass reads and writes tensors of one size; on the scale of a model its arithmetic is free and
its time is that of the bytes it moves. The table lists what the code does now; when a pass is
fused away or added there, it is a line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vpd_lens.training.cost.products import (
    FAITHFULNESS,
    IMPORTANCE,
    IMPORTANCE_BACK,
    INNER,
    INNER_BACK,
    LOSSES,
    LOSSES_BACK,
    TARGET,
    UPDATE,
)
from vpd_lens.training.cost.target import BYTES
from vpd_lens.training.cost.workload import Workload

Unit = Literal[
    "mask", "draw", "input", "output", "vocabulary", "width", "heads", "hidden", "score",
    "importance", "ffn", "source", "parameter", "direction", "weight",
]  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """One elementwise pass.

    Attributes:
        name: What it does.
        phases: The phases in which it runs, once per pass of that phase.
        unit: The size of the tensors; see `_sizes`.
        fp32: How many of them it reads or writes in fp32.
        own: How many in the precision of the masked forwards.
    """

    name: str
    phases: tuple[str, ...]
    unit: Unit
    fp32: int = 0
    own: int = 0


_FORWARDS, _BACKWARDS = (INNER, LOSSES), (INNER_BACK, LOSSES_BACK)

PASSES = (
    # Masks and sources, [positions, C_total].
    Pass("draw sources", (LOSSES,), "draw", fp32=1),
    Pass("m = g + (1 - g) r", _FORWARDS, "mask", fp32=3),
    Pass("mask - delta mask", _FORWARDS, "mask", own=2),
    Pass("weight * acts", _FORWARDS, "mask", own=3),
    Pass("weight * acts, for the gradient of U", (LOSSES_BACK,), "mask", own=3),
    Pass("gradient of the masks", _BACKWARDS, "mask", own=3),
    Pass("its sum, for the delta", _BACKWARDS, "mask", own=1),
    Pass("gradient of the activations", _BACKWARDS, "mask", own=3),
    Pass("gradients of all sites put together", _BACKWARDS, "mask", fp32=2),
    Pass("gradient of g or r", _BACKWARDS, "mask", fp32=3),
    Pass("gradients of g added up", (LOSSES_BACK,), "mask", fp32=3),
    Pass("clamp, lower-leaky sigmoid", (IMPORTANCE,), "mask", fp32=6),
    Pass("its gradient, and that of the power sum", (IMPORTANCE_BACK,), "mask", fp32=10),
    Pass("power sum", (IMPORTANCE,), "mask", fp32=8),
    # A site's output, [positions, d_out], and the divergence, [positions, vocabulary].
    Pass("m_delta y", _FORWARDS, "output", own=4),
    Pass("its gradients", _BACKWARDS, "output", own=5),
    Pass("softmax of the target", (TARGET,), "vocabulary", fp32=9),
    Pass("divergence", _FORWARDS, "vocabulary", fp32=6),
    Pass("its gradient", _BACKWARDS, "vocabulary", fp32=8, own=1),
    # The target's blocks.
    Pass("norms and residual stream", (TARGET, *_FORWARDS), "width", fp32=20),
    Pass("their gradients", _BACKWARDS, "width", fp32=30),
    Pass("heads: rotation, transposition", (TARGET, *_FORWARDS), "heads", own=18),
    Pass("their gradients", _BACKWARDS, "heads", own=24),
    Pass("scores: mask, softmax", (TARGET, *_FORWARDS), "score", fp32=8),
    Pass("their gradient", _BACKWARDS, "score", fp32=6),
    Pass("activation function", (TARGET, *_FORWARDS), "hidden", own=4),
    Pass("its gradient", _BACKWARDS, "hidden", own=6),
    # The importance function.
    Pass("normalise the inputs", (IMPORTANCE,), "input", fp32=5),
    Pass("norms, heads, residual stream", (IMPORTANCE,), "importance", fp32=30),
    Pass("their gradients", (IMPORTANCE_BACK,), "importance", fp32=45),
    Pass("activation function", (IMPORTANCE,), "ffn", own=4),
    Pass("its gradient", (IMPORTANCE_BACK,), "ffn", own=4),
    # Whatever does not depend on the batch.
    Pass("square of the deltas", (FAITHFULNESS,), "weight", fp32=8),
    Pass("Adam on the sources, clamp", (INNER_BACK, UPDATE), "source", fp32=10),
    Pass("clip", (UPDATE,), "direction", fp32=3),
    Pass("optimiser", (UPDATE,), "parameter", fp32=8),
)


def traffic(work: Workload) -> dict[str, float]:
    """Bytes moved by elementwise passes, by phase."""
    sizes, own = _sizes(work), BYTES[work.precision]
    times = repetitions(work)
    moved: dict[str, float] = dict.fromkeys(times, 0.0)
    for one in PASSES:
        for phase in one.phases:
            moved[phase] += times[phase] * sizes[one.unit] * (4 * one.fp32 + own * one.own)
    return {phase: size for phase, size in moved.items() if size}


def repetitions(work: Workload) -> dict[str, int]:
    """How often each phase runs over all positions in a step."""
    inner, loss = work.inner_passes, work.loss_passes
    once = (TARGET, IMPORTANCE, IMPORTANCE_BACK, FAITHFULNESS, UPDATE)
    return dict.fromkeys(once, 1) | {
        INNER: inner,
        INNER_BACK: inner,
        LOSSES: loss,
        LOSSES_BACK: loss,
    }


def _sizes(work: Workload) -> dict[str, float]:
    target, ci, n = work.target, work.importance, float(work.positions)
    layers, blocks = target.n_layers, ci.n_blocks or 0
    masks = n * work.c_total
    logits = n * target.d_vocab
    return {
        "mask": masks,
        "draw": masks * work.draws / max(1, work.loss_passes),
        "input": n * work.d_inputs,
        "output": n * work.d_outputs,
        "vocabulary": logits if work.has_logits else 0.0,
        "width": n * layers * target.d_model,
        "heads": n * layers * target.d_query,
        "hidden": n * layers * target.d_mlp,
        "score": n * layers * target.n_heads * work.seq_len,
        "importance": n * blocks * work.d_importance,
        "ffn": n * blocks * (ci.d_ffn or 0) if ci.kind == "transformer" else 0.0,
        "source": float(work.sources),
        "parameter": float(work.directions + work.importance_parameters),
        "direction": float(work.directions),
        "weight": float(work.decomposed),
    }


# Operations that are not mere views, counted with a TorchDispatchMode: per layer and masked pass
# without and with gradients of V and U, per layer of the target's own forward, per block of the
# importance function, and per step.
_OPERATIONS = {
    "hooked_transformer": (310, 370, 80),
    "bridge": (220, 270, 70),
    "module": (25, 30, 5),
}
_PER_BLOCK, _PER_STEP = 108, 350


def operations(work: Workload) -> float:
    """Kernels that a step starts, about, without compilation."""
    inner, loss, own = _OPERATIONS[work.target.model_class]
    layers = work.target.n_layers or len(work.sites)
    blocks = (work.importance.n_blocks or 0) if work.importance.kind == "transformer" else 1
    per_layer = inner * work.inner_passes + loss * work.loss_passes + own
    parts = work.config.micro_batches
    return float(parts * (layers * per_layer + blocks * _PER_BLOCK) + _PER_STEP)
