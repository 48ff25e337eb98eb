"""Where a `TransformerBridge` (TransformerLens 3.9 and 4.x) keeps its weight matrices.

A bridge wraps each linear module in a component with `hook_in` and `hook_out`. In compatibility
mode with processed weights a gated MLP bypasses those modules and multiplies by stored weights,
firing only the container's `hook_in` and each matrix' `hook_out`. Inputs are therefore read at
every point that can carry them, the nearest one winning, and outputs at `hook_out`.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from einops import rearrange
from torch import Tensor, nn

from vpd_lens.errors import AttachError
from vpd_lens.sites.site import InputPoint, Site


def bridge_sites(model: nn.Module) -> list[Site]:
    """All attention and MLP matrices of a `TransformerBridge`, in forward order, and `unembed`.

    MoE experts have no hook points and are left out here; `find_sites` reports them.

    Raises:
        AttachError: If split-qkv or per-head-result flags bypass the matrices.
    """
    cfg = model.cfg
    for flag in ("use_split_qkv_input", "use_attn_result", "use_attn_in"):
        if getattr(cfg, flag, False):
            raise AttachError(
                f"cfg.{flag} is on: the bridge then multiplies per head and never calls its "
                f"q/k/v/o modules. Call model.set_{flag}(False) before decompose()."
            )
    sites: list[Site] = []
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        attn = _child(block, "attn")
        if attn is not None:
            for letter in "qkvo":
                module = _child(attn, letter)
                if module is not None:
                    sites.append(_site(f"blocks.{index}.attn.{letter}", attn, module))
        mlp = _child(block, "mlp")
        if mlp is not None and not is_mixture(mlp):
            for part in ("gate", "in", "out"):
                module = _child(mlp, part)
                if module is not None:
                    sites.append(_site(f"blocks.{index}.mlp.{part}", mlp, module, block.hook_in))
    unembed = _child(model, "unembed")
    if unembed is not None:
        sites.append(_site("unembed", model, unembed))
    return sites


def is_mixture(mlp: nn.Module) -> bool:
    """Whether an MLP component is a mixture of experts."""
    return "moe" in type(mlp).__name__.lower()


def _child(module: nn.Module, name: str) -> nn.Module | None:
    # `in` is a Python keyword and bridges forward unknown attributes to the wrapped module, so
    # only registered children count.
    return module._modules.get(name)


def _site(
    name: str, container: nn.Module, module: nn.Module, frame: nn.Module | None = None
) -> Site:
    part = name.rsplit(".", 1)[-1]
    linear = module.original_component
    if hasattr(linear, "base_layer"):
        raise AttachError(
            f"{name} carries an adapter ({type(linear).__name__}), which is part of its output and "
            "of no subcomponent, even while it is still zero. Merge it first (merge_and_unload) or "
            "remove it."
        )
    inputs = []
    # Processed gated MLPs skip the `in` and `gate` modules but still fire the container's hook.
    if part in ("in", "gate"):
        inputs.append(InputPoint(container.hook_in, "output"))
    if part == "out":
        inputs.append(InputPoint(module.hook_in, "output"))
    inputs.append(InputPoint(linear, "argument", 0))
    return Site(
        name=name,
        read_weight=partial(_weight, container, module, part),
        read_bias=partial(_bias, container, module, part),
        inputs=inputs,
        output=module.hook_out,
        frame=frame,
        has_heads=part in ("q", "k", "v", "o"),
    )


def _weight(container: nn.Module, module: nn.Module, part: str) -> Tensor:
    processed = getattr(container, f"_processed_W_{part}", None)
    if processed is not None and getattr(container, "_use_processed_weights", False):
        return processed.T
    linear = module.original_component
    if type(linear).__name__ == "Conv1D":
        return cast(Tensor, linear.weight)
    if isinstance(linear, nn.Linear):
        return linear.weight.T
    return _accessor_weight(container, part)


def _accessor_weight(container: nn.Module, part: str) -> Tensor:
    weight = getattr(container, f"W_{part.upper() if part in 'qkvo' else part}")
    if weight.ndim == 2:
        return weight
    if part == "o":
        return rearrange(weight, "head d_head d_out -> (head d_head) d_out")
    return rearrange(weight, "head d_in d_head -> d_in (head d_head)")


def _bias(container: nn.Module, module: nn.Module, part: str) -> Tensor | None:
    if getattr(container, "_use_processed_weights", False) and hasattr(
        container, f"_processed_b_{part}"
    ):
        return getattr(container, f"_processed_b_{part}")
    bias = getattr(module.original_component, "bias", None)
    return None if bias is None else bias.flatten()
