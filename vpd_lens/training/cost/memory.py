"""Memory of a training step on one rank, item by item, at the moment when it is largest.

Follows what the code really keeps: `_MaskedSite` saves its input, the unmasked output, the
activations and `mask - delta_mask`; `_Interpolate` the importances and sources; the divergence
one set of logits per pass. What the target's blocks save is in `_SAVED`, per model class.
"""

from __future__ import annotations

from dataclasses import dataclass

from vpd_lens.decomposition.divergence import _CHUNK_ELEMENTS
from vpd_lens.training.cost.target import BYTES
from vpd_lens.training.cost.workload import Workload

_FP32 = 4

Items = dict[str, float]


@dataclass(frozen=True)
class _Saved:
    """What a block of the target saves beyond its matrices' inputs and outputs, per position.

    `width` times d_model, `heads` times the width of all heads, `scores` bytes per attention
    score.
    """

    width: int
    heads: int
    scores: int


# Counted on both classes with `torch.autograd.graph.saved_tensors_hooks`.
_SAVED = {
    "hooked_transformer": _Saved(width=4, heads=3, scores=9),
    "bridge": _Saved(width=2, heads=3, scores=8),
    "module": _Saved(width=0, heads=0, scores=0),
}
# Tensors of MLP width that an activation function saves where it is written out step by step.
_STEPS = {"gelu_new": 4, "gelu_fast": 5}


@dataclass(frozen=True)
class Memory:
    """Memory of one rank at the largest moment of a step.

    Attributes:
        moment: Which moment that is.
        items: Bytes by item.
        moments: Total of every moment considered.
    """

    moment: str
    items: Items
    moments: Items

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.items.values())


def memory(work: Workload) -> Memory:
    """What a step needs, once the optimisers have their moments."""
    always = persistent(work) | _prepared(work)
    graph = {"importance function: activations": _importance_graph(work)}
    gradients = {"gradients of V, U and the importance function": _FP32 * _trained(work)}
    sources = {"gradients of the sources": float(_mask_bytes(work) * work.sources)}
    split = work.config.micro_batches > 1
    # From the second part on the first one's gradients are there, and a part's gradient of the
    # sources arrives padded to the whole batch.
    earlier = {name: (2.0 if split else 0.0) * size for name, size in sources.items()}
    c_part = float(work.part * work.c_total)
    c_all = float(work.positions * work.c_total)
    moments: dict[str, Items] = {
        "update": gradients | sources | {"importances": 2 * _FP32 * c_all},
        "backward of the importances": graph
        | gradients
        | sources
        | {"importances": 3 * _FP32 * c_part},
        "losses": graph
        | (gradients if split else {})
        | earlier
        | {
            "importances": (3 if split else 2) * _FP32 * c_part + _cast_importances(work),
            "stochastic sources": work.draws * _mask_bytes(work) * c_part,
            "masked passes: activations": work.loss_passes * masked_pass(work),
            "deltas": float(_FP32 * work.decomposed),
            "temporaries": _temporaries(work),
        },
    }
    if work.inner_passes:
        moments["inner steps"] = (
            ({} if split else graph)
            | (earlier if split else sources)
            | {
                "importances": _mask_bytes(work) * c_all,
                "masked passes: activations": masked_pass(work),
                "temporaries": _temporaries(work),
            }
        )
    totals = {name: sum(items.values()) for name, items in moments.items()}
    moment = max(totals, key=lambda name: totals[name])
    items = {name: size for name, size in (always | moments[moment]).items() if size}
    lasting = sum(always.values())
    return Memory(moment, items, {name: lasting + size for name, size in totals.items()})


def persistent(work: Workload) -> Items:
    """What stays from step to step."""
    importance = work.importance_parameters / work.importance_shards
    moments = 1 if work.config.optimiser.kind == "muon" else 2
    return {
        "target weights": float(work.target.parameters * work.target.bytes_per_weight),
        "target weights, as faithfulness reads them": _copied_weights(work),
        "V and U": float(_FP32 * work.directions),
        "importance function": _FP32 * importance,
        "optimiser moments": _FP32 * moments * (work.directions + importance),
        "sources": float(_mask_bytes(work) * work.sources),
        "moments of the sources": 2.0 * _mask_bytes(work) * work.sources,
    }


def attached(work: Workload) -> float:
    """Bytes that exist before the first step: the target, V, U and the importance function."""
    items = persistent(work)
    return items["target weights"] + items["V and U"] + items["importance function"]


def masked_pass(work: Workload) -> float:
    """What one masked forward keeps for its backward pass, in bytes.

    With `recompute`, the input of every block and the masks, and of one block at a time the rest.
    """
    own = BYTES[work.precision]
    at_sites = 2 * work.c_total + work.d_outputs + _kept_inputs(work)
    logits = work.target.d_vocab if work.has_logits else 2 * work.target.d_vocab
    in_blocks = work.part * (own * at_sites + _block_activations(work)) + _cast_weights(work)
    if work.config.recompute:
        layers = work.target.n_layers
        kept = own * layers * work.target.d_model + _mask_bytes(work) * work.c_total
        in_blocks = work.part * kept + in_blocks / layers
    return float(work.part * own * logits + in_blocks)


def _mask_bytes(work: Workload) -> int:
    return BYTES[work.config.mask_dtype]


def _cast_importances(work: Workload) -> float:
    """The copy of the importances that masks are made of, where it is narrower."""
    own = _mask_bytes(work)
    return float(own * work.part * work.c_total) if own != _FP32 else 0.0


def _kept_inputs(work: Workload) -> int:
    """Inputs that q, k and v share are shared in memory, unless each casts its own."""
    cast = work.precision != work.target.dtype
    return work.d_inputs if cast else work.d_distinct_inputs


def _block_activations(work: Workload) -> float:
    """Bytes per position that the target's blocks keep besides their matrices' own."""
    target, saved = work.target, _SAVED[work.target.model_class]
    own = BYTES[work.precision]
    hidden = _STEPS.get(target.activation, 1) + (2 if target.gated else 0)
    # Under autocast the softmax stays in fp32, and its result is cast.
    score = saved.scores - (own if target.dtype == "float32" and own == 2 else 0)
    attention = own * (saved.width / 2 * target.d_model + saved.heads * target.d_query)
    attention += score * target.n_heads * work.seq_len
    mlp = own * (saved.width / 2 * target.d_model + hidden * target.d_mlp)
    return float(work.tracked_attentions * attention + work.tracked_mlps * mlp)


def _cast_weights(work: Workload) -> float:
    """Copies of weights that a masked pass makes and keeps."""
    own, target = BYTES[work.precision], work.target
    directions = own * work.directions if work.precision != "float32" else 0
    matrices = target.matrices() if target.n_layers else []
    if work.precision == target.dtype:
        # HookedTransformer keeps attention weights per head and rearranges them at every call.
        matrices = [m for m in matrices if ".attn." in m.name]
        if target.model_class != "hooked_transformer":
            matrices = []
    return float(directions + own * sum(m.d_in * m.d_out for m in matrices))


def _copied_weights(work: Workload) -> float:
    """fp32 copies where a site's weight is not stored as `[d_in, d_out]` in fp32 already."""
    sites = work.sites
    if work.target.dtype == "float32" and work.target.model_class == "hooked_transformer":
        # q, k and v are kept per head; the others have the right order.
        sites = tuple(s for s in sites if s.name[-7:] in (".attn.q", ".attn.k", ".attn.v"))
    return float(_FP32 * sum(s.d_in * s.d_out for s in sites))


def _prepared(work: Workload) -> Items:
    """What the target left, for all micro-batches."""
    n, own = work.positions, BYTES[work.precision]
    vocabulary = work.target.d_vocab
    # fp32 logits are kept beside their probabilities, narrower ones alone.
    kept = 2 * own if work.has_logits and own == _FP32 else own
    return {
        "target: logits and probabilities": float(n * vocabulary * kept),
        "target: inputs of the sites": float(n * own * work.d_distinct_inputs),
        "importances before the sigmoid": float(_FP32 * n * work.c_total),
    }


def _importance_graph(work: Workload) -> float:
    """What the importance function keeps for its backward pass."""
    ci, own = work.importance, BYTES[work.importance_precision]
    cast = 2 * work.importance_parameters if own == 2 else 0
    if ci.kind == "mlp":
        return float(work.part * work.c_total * (own + 2 * own * ci.hidden))
    if ci.kind == "shared_mlp":
        # In fp32 the inputs are the target's own.
        inputs = work.d_inputs if own == 2 else 0
        return float(work.part * own * (inputs + 2 * len(work.sites) * ci.hidden) + cast)
    d, blocks = work.d_importance, ci.n_blocks or 0
    # Per block: the inputs of four products, q, k and v rotated, the mixture, two norms' inputs.
    per_block = own * (7 * d + 2 * (ci.d_ffn or 0)) + _FP32 * 2 * d
    return float(work.part * (own * (work.d_inputs + d) + blocks * per_block) + cast)


def _trained(work: Workload) -> float:
    return float(work.directions + work.importance_parameters / work.importance_shards)


def _temporaries(work: Workload) -> float:
    """The larger of a gradient of the logits and the masks of a pass."""
    logits = work.part * work.target.d_vocab if work.has_logits else 0
    gradient = BYTES[work.precision] * logits + _FP32 * min(logits, _CHUNK_ELEMENTS)
    return float(max(gradient, _FP32 * work.part * work.c_total))
