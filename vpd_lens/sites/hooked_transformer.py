"""Where a `HookedTransformer` (TransformerLens 3.x) keeps its weight matrices.

HookedTransformer has no hook point after the norm's own weight and bias: `ln1.hook_normalized`
lies before them. The inputs of q, k, v and the MLP are therefore read from the arguments of the
attention and MLP modules, which is what the matrices really multiply.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from einops import rearrange
from torch import Tensor, nn

from vpd_lens.errors import AttachError
from vpd_lens.sites.site import InputPoint, Site, no_bias


def hooked_transformer_sites(model: nn.Module) -> list[Site]:
    """All attention and MLP matrices of a `HookedTransformer`, in forward order, and `unembed`.

    Raises:
        AttachError: If the model has MoE experts, split-qkv inputs or quantised weights.
    """
    _refuse_unsupported(model)
    sites: list[Site] = []
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        sites += _attention_sites(f"blocks.{index}.attn", block.attn)
        if getattr(block, "mlp", None) is not None and not model.cfg.attn_only:
            sites += _mlp_sites(f"blocks.{index}.mlp", block.mlp)
    unembed = model.unembed
    sites.append(
        Site(
            name="unembed",
            read_weight=partial(getattr, unembed, "W_U"),
            read_bias=partial(getattr, unembed, "b_U"),
            inputs=[InputPoint(unembed.hook_in, "output")],
            output=unembed.hook_out,
        )
    )
    return sites


def _refuse_unsupported(model: nn.Module) -> None:
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


def _attention_sites(prefix: str, attn: nn.Module) -> list[Site]:
    def projection(letter: str) -> Site:
        upper = letter.upper()
        # Grouped-query attention stores k and v once per group under an underscored name; the
        # plain name is a property that repeats them.
        stored = f"_W_{upper}" if f"_W_{upper}" in attn._parameters else f"W_{upper}"
        bias = f"_b_{upper}" if f"_b_{upper}" in attn._parameters else f"b_{upper}"
        source = {"q": "query_input", "k": "key_input", "v": "value_input"}[letter]
        return Site(
            name=f"{prefix}.{letter}",
            read_weight=partial(_reading_heads, attn, stored),
            read_bias=partial(_flat, attn, bias),
            inputs=[InputPoint(attn, "argument", source)],
            output=getattr(attn, f"hook_{letter}"),
            has_heads=True,
        )

    output = Site(
        name=f"{prefix}.o",
        read_weight=partial(_writing_heads, attn),
        read_bias=partial(getattr, attn, "b_O"),
        inputs=[InputPoint(attn.hook_z, "output")],
        output=attn,
        output_kind="output",
        results=attn.hook_result,
        has_heads=True,
    )
    return [projection("q"), projection("k"), projection("v"), output]


def _reading_heads(attn: nn.Module, name: str) -> Tensor:
    return rearrange(getattr(attn, name), "head d_in d_head -> d_in (head d_head)")


def _writing_heads(attn: nn.Module) -> Tensor:
    return rearrange(cast(Tensor, attn.W_O), "head d_head d_out -> (head d_head) d_out")


def _flat(attn: nn.Module, name: str) -> Tensor:
    return getattr(attn, name).flatten()


def _mlp_sites(prefix: str, mlp: nn.Module) -> list[Site]:
    gated = hasattr(mlp, "W_gate")
    into = InputPoint(mlp, "argument", 0)
    sites = []
    if gated:
        sites.append(
            Site(f"{prefix}.gate", partial(getattr, mlp, "W_gate"), no_bias, [into], mlp.hook_pre)
        )
    # A gated MLP adds b_in after the product with the gate, so it is not part of this output.
    sites.append(
        Site(
            name=f"{prefix}.in",
            read_weight=partial(getattr, mlp, "W_in"),
            read_bias=no_bias if gated else partial(getattr, mlp, "b_in"),
            inputs=[into],
            output=mlp.hook_pre_linear if gated else mlp.hook_pre,
        )
    )
    sites.append(
        Site(
            name=f"{prefix}.out",
            read_weight=partial(getattr, mlp, "W_out"),
            read_bias=partial(getattr, mlp, "b_out"),
            inputs=[InputPoint(mlp.hook_post, "output")],
            output=mlp,
            output_kind="output",
        )
    )
    return sites
