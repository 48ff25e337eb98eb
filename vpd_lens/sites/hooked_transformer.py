"""Where a `HookedTransformer` (TransformerLens 3.x) keeps its weight matrices.

HookedTransformer has no hook point after the norm's own weight and bias: `ln1.hook_normalized`
lies before them. The inputs of q, k, v and the MLP are therefore read from the arguments of the
attention and MLP modules, which is what the matrices really multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from einops import rearrange
from torch import Tensor, nn

from vpd_lens.errors import AttachError
from vpd_lens.sites.site import InputPoint, Site, no_bias


def hooked_transformer_sites(model: nn.Module) -> list[Site]:
    """All attention and MLP matrices of a `HookedTransformer`, in forward order, and `unembed`."""
    cfg = model.cfg
    if getattr(cfg, "num_experts", None):
        raise AttachError(
            f"This model has {cfg.num_experts} MoE experts, whose weights have no hook points in "
            "HookedTransformer. Load it as a TransformerBridge and pass sites=r'attn' to decompose "
            "its attention only."
        )
    for flag in ("use_split_qkv_input", "use_attn_in"):
        if getattr(cfg, flag, False):
            raise AttachError(
                f"cfg.{flag} is on: q, k and v then read a copy of the residual per head, and no "
                f"single matrix input exists. Switch it off (model.set_{flag}(False)) before "
                "calling decompose()."
            )
    if getattr(cfg, "load_in_4bit", False):
        raise AttachError("The weights are 4-bit quantised. Load the model in fp32 or bf16.")
    sites: list[Site] = []
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        sites += _attention_sites(f"blocks.{index}.attn", block.attn)
        if getattr(block, "mlp", None) is not None and not cfg.attn_only:
            sites += _mlp_sites(f"blocks.{index}.mlp", block.mlp)
    unembed = model.unembed
    weight, bias = partial(getattr, unembed, "W_U"), partial(getattr, unembed, "b_U")
    into = InputPoint(unembed.hook_in, "output")
    return [*sites, Site("unembed", weight, bias, [into], unembed.hook_out)]


def _attention_sites(prefix: str, attn: nn.Module) -> Iterator[Site]:
    for letter, source in (("q", "query_input"), ("k", "key_input"), ("v", "value_input")):
        # Grouped-query attention stores k and v once per group under an underscored name; the
        # plain name is a property that repeats them.
        w, b = (
            name if (name := f"_{kind}_{letter.upper()}") in attn._parameters else name[1:]
            for kind in "Wb"
        )
        shapes = "head d_in d_head -> d_in (head d_head)"
        weight = partial(_heads, attn, w, shapes)
        bias = partial(_heads, attn, b, "head d_head -> (head d_head)")
        into, output = [InputPoint(attn, "argument", source)], getattr(attn, f"hook_{letter}")
        store = partial(_store_heads, attn, w, shapes)  # of heads side by side there is no view
        yield Site(f"{prefix}.{letter}", weight, bias, into, output, has_heads=True, store=store)
    weight = partial(_heads, attn, "W_O", "head d_head d_out -> (head d_head) d_out")
    bias, into = partial(getattr, attn, "b_O"), [InputPoint(attn.hook_z, "output")]
    yield Site(
        f"{prefix}.o", weight, bias, into, attn, "output", results=attn.hook_result, has_heads=True
    )


def _heads(attn: nn.Module, name: str, shapes: str) -> Tensor:
    return rearrange(getattr(attn, name), shapes)


def _store_heads(attn: nn.Module, name: str, shapes: str, weight: Tensor) -> None:
    heads, flat = shapes.split(" -> ")
    kept = getattr(attn, name)
    kept.copy_(rearrange(weight, f"{flat} -> {heads}", head=len(kept)))


def _mlp_sites(prefix: str, mlp: nn.Module) -> Iterator[Site]:
    gated, into = hasattr(mlp, "W_gate"), [InputPoint(mlp, "argument", 0)]
    if gated:
        weight = partial(getattr, mlp, "W_gate")
        yield Site(f"{prefix}.gate", weight, no_bias, into, mlp.hook_pre)
    # A gated MLP adds b_in after the product with the gate, so it is not part of this output.
    bias = no_bias if gated else partial(getattr, mlp, "b_in")
    output = mlp.hook_pre_linear if gated else mlp.hook_pre
    yield Site(f"{prefix}.in", partial(getattr, mlp, "W_in"), bias, into, output)
    weight, bias = partial(getattr, mlp, "W_out"), partial(getattr, mlp, "b_out")
    yield Site(f"{prefix}.out", weight, bias, [InputPoint(mlp.hook_post, "output")], mlp, "output")
