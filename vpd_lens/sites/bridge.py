"""Where a `TransformerBridge` (TransformerLens 3.9 and 4.x) keeps its weight matrices.

A bridge wraps each linear module in a component with `hook_in` and `hook_out`. In compatibility
mode with processed weights a gated MLP bypasses those modules and multiplies by stored weights,
firing only the container's `hook_in` and each matrix' `hook_out`. Inputs are therefore read at
every point that can carry them, the nearest one winning, and outputs at `hook_out`.
"""

from __future__ import annotations

from functools import partial

from einops import rearrange
from torch import Tensor, nn

from vpd_lens.errors import AttachError
from vpd_lens.sites.site import InputPoint, Site, is_linear, linear_weight


def bridge_sites(model: nn.Module) -> list[Site]:
    """All attention and MLP matrices of a `TransformerBridge`, in forward order, and `unembed`.

    MoE experts have no hook points and are left out here; `find_sites` reports them.
    """
    for flag in ("use_split_qkv_input", "use_attn_result", "use_attn_in"):
        if getattr(model.cfg, flag, False):
            raise AttachError(
                f"cfg.{flag} is on: the bridge then multiplies per head and never calls its "
                f"q/k/v/o modules. Call model.set_{flag}(False) before decompose()."
            )
    sites: list[Site] = []
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        for container, parts in (("attn", "qkvo"), ("mlp", ("gate", "in", "out"))):
            parent = block._modules.get(container)
            if parent is None or (container == "mlp" and is_mixture(parent)):
                continue
            frame = block.hook_in if container == "mlp" else None
            # `in` is a Python keyword and bridges forward unknown attributes to the wrapped
            # module, so only registered children count.
            sites += [
                _site(f"blocks.{index}.{container}.{part}", parent, module, frame)
                for part in parts
                if (module := parent._modules.get(part)) is not None
            ]
    if (unembed := model._modules.get("unembed")) is not None:
        sites.append(_site("unembed", model, unembed))
    return sites


def is_mixture(mlp: nn.Module) -> bool:
    """Whether an MLP component is a mixture of experts."""
    return "moe" in type(mlp).__name__.lower()


def _site(name: str, parent: nn.Module, module: nn.Module, frame: nn.Module | None = None) -> Site:
    part = name.rsplit(".", 1)[-1]
    linear = module.original_component
    if hasattr(linear, "base_layer"):
        raise AttachError(
            f"{name} carries an adapter ({type(linear).__name__}), which is part of its output and "
            "of no subcomponent, even while it is still zero. Merge it first (merge_and_unload) or "
            "remove it."
        )
    inputs = [InputPoint(linear, "argument", 0)]
    # Processed gated MLPs skip the `in` and `gate` modules but still fire the container's hook.
    if part in ("in", "gate", "out"):
        hook = module.hook_in if part == "out" else parent.hook_in
        inputs.insert(0, InputPoint(hook, "output"))
    weight, bias = (partial(read, parent, module, part) for read in (_weight, _bias))
    return Site(name, weight, bias, inputs, module.hook_out, frame=frame, has_heads=part in "qkvo")


def _weight(container: nn.Module, module: nn.Module, part: str) -> Tensor:
    processed = getattr(container, f"_processed_W_{part}", None)
    if processed is not None and getattr(container, "_use_processed_weights", False):
        return processed.T
    if is_linear(module.original_component):
        return linear_weight(module.original_component)
    weight = getattr(container, f"W_{part.upper() if part in 'qkvo' else part}")
    if weight.ndim == 2:
        return weight
    heads_first = "head d_head d_out -> (head d_head) d_out"
    return rearrange(weight, heads_first if part == "o" else "head d_in d -> d_in (head d)")


def _bias(container: nn.Module, module: nn.Module, part: str) -> Tensor | None:
    processed = f"_processed_b_{part}"
    if getattr(container, "_use_processed_weights", False) and hasattr(container, processed):
        return getattr(container, processed)
    bias = getattr(module.original_component, "bias", None)
    return None if bias is None else bias.flatten()
