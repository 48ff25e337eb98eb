"""Find the sites of a model, choose among them, and check on a tiny forward that they are right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens.errors import AttachError, did_you_mean
from vpd_lens.sites.bridge import bridge_sites, is_mixture
from vpd_lens.sites.hooked_transformer import hooked_transformer_sites
from vpd_lens.sites.site import InputPoint, Site, is_linear, linear_weight, relative_error

SiteSelection = str | Sequence[str] | Sequence[Site]


def model_kind(model: nn.Module) -> str:
    """`"bridge"`, `"hooked_transformer"` or, for anything else, `"module"`, importing neither."""
    if hasattr(model, "adapter") and hasattr(model, "original_model"):
        return "bridge"
    blocks = "blocks" in model._modules and "unembed" in model._modules
    return "hooked_transformer" if blocks and hasattr(model, "hook_dict") else "module"


def attends_both_ways(model: nn.Module) -> bool:
    """Whether a position sees later ones, as in an encoder, by what the model says of itself."""
    adapter, cfg = getattr(model, "adapter", None), getattr(model, "cfg", None)
    generates = getattr(adapter, "supports_generation", True)  # BERT's says no more than that
    return not generates or getattr(cfg, "attention_dir", "causal") != "causal"


def head_count(cfg: Any, part: str) -> int:
    """Heads of a model's `"q"`, `"k"`, `"v"` or `"o"` matrices; of k and v the key-value heads."""
    grouped = getattr(cfg, "n_key_value_heads", None) if part in ("k", "v") else None
    return int(grouped or cfg.n_heads)


def find_sites(model: nn.Module, select: SiteSelection = "all") -> list[Site]:
    """The sites of `model` that `select` names, in forward order.

    The model is a HookedTransformer, a TransformerBridge, or any module with linear layers. Select
    `"all"` (every attention and MLP matrix; `unembed` only on request), a regular expression
    searched in the site names, a list of names, or ready-made `Site` objects.

    Raises:
        AttachError: If nothing matches, a name does not exist, or a part cannot be decomposed.
    """
    if not isinstance(select, str) and len(select) > 0 and isinstance(select[0], Site):
        return list(select)  # type: ignore[arg-type]
    find = {"bridge": bridge_sites, "hooked_transformer": hooked_transformer_sites}
    available = find.get(model_kind(model), module_sites)(model)
    if select == "all":
        if model_kind(model) == "bridge":
            _refuse_experts(model)
        chosen = [site for site in available if site.name != "unembed"]
    elif isinstance(select, str):
        chosen = [site for site in available if re.search(select, site.name)]
    else:
        names, known = [str(name) for name in select], {site.name for site in available}
        if missing := [name for name in names if name not in known]:
            hints = "".join(_meant(name, known) for name in missing)
            raise AttachError(f"No site named {missing}{hints}. Available: {_listing(available)}.")
        chosen = [site for site in available if site.name in names]
    if not chosen:
        raise AttachError(
            f"sites={select!r} matches no site of this {type(model).__name__}. "
            f"Available: {_listing(available)}."
        )
    return chosen


# What TransformerLens calls the tensor of a site.
_TENSORS = {"W_Q": "attn.q", "W_K": "attn.k", "W_V": "attn.v", "W_O": "attn.o", "W_U": "unembed"}
_TENSORS |= {"W_in": "mlp.in", "W_gate": "mlp.gate", "W_out": "mlp.out"}


def _meant(name: str, known: set[str]) -> str:
    meant = _TENSORS.get(tensor := name.rsplit(".", 1)[-1])
    return f"; {tensor} is {meant} here" if meant else did_you_mean(name, known)


def _listing(sites: list[Site]) -> str:
    names = [site.name for site in sites]
    rest = f", ... ({len(names)} in all)" if len(names) > 14 else ""
    return ", ".join(names[:14]) + rest or "none"


def _refuse_experts(model: nn.Module) -> None:
    experts = [
        f"blocks.{index}.mlp"
        for index, block in enumerate(model.blocks)  # type: ignore[arg-type]
        if "mlp" in block._modules and is_mixture(block._modules["mlp"])
    ]
    if experts:
        raise AttachError(
            f"{', '.join(experts)}: mixture-of-experts MLPs keep their experts in fused 3-D "
            "parameters without hook points, so their matrices cannot be decomposed. Pass "
            "sites=r'attn' to decompose the attention matrices only."
        )


@torch.no_grad()
def self_check(model: nn.Module, sites: list[Site], forward: Any, tolerance: float) -> None:
    """Run one forward and check at every site that the hooks fire and that `x W + b = y`.

    None may be attached yet. `forward`, called without arguments, runs the model on a tiny input;
    `tolerance` is the largest allowed error relative to the largest entry of `y`.

    Raises:
        AttachError: Listing every site that failed and why.
    """
    problems = [
        f"{site.name}: its weight is quantised ({dtype}); load the model in fp32 or bf16"
        for site in sites
        if not (dtype := site.weight.dtype).is_floating_point
    ]
    seen: dict[str, Tensor] = {}
    fired: set[str] = set()

    def check(site: Site, y: Tensor) -> None:
        fired.add(site.name)
        if problem := _mismatch(site, seen.get(site.name), y, tolerance):
            problems.append(f"{site.name}: {problem}")

    if not problems:
        with ExitStack() as hooks:
            for site in sites:
                read = partial(seen.__setitem__, site.name)
                for handle in site.attach(read, partial(check, site)):
                    hooks.enter_context(handle)
            forward()
        problems += [
            f"{site.name}: its hooks did not fire; the matrix is bypassed (split-qkv or result "
            "flags, fused experts, or a module that is never called)"
            for site in sites
            if site.name not in fired
        ]
    if problems:
        raise AttachError(
            f"{len(problems)} of {len(sites)} sites of this {type(model).__name__} failed the "
            "self-check, so nothing was attached:\n  " + "\n  ".join(problems)
        )


def _mismatch(site: Site, x: Tensor | None, y: Tensor, tolerance: float) -> str | None:
    if x is None:
        return "its output appeared before any input was seen"
    w, bias = site.weight, 0 if site.bias is None else site.bias.float()
    if (x.shape[-1], y.shape[-1]) != w.shape:
        return f"input {tuple(x.shape)} and output {tuple(y.shape)} do not fit W {tuple(w.shape)}"
    error = relative_error(y.float(), x.float() @ w.float() + bias)
    if not error <= tolerance:
        return f"x W + b differs from y by {error:.1e} (allowed {tolerance:.0e})"
    return None


def module_sites(model: nn.Module) -> list[Site]:
    """Every `nn.Linear` and `Conv1D` of `model`, named by its module path, in module order."""
    sites: list[Site] = []
    for name, module in model.named_modules():
        if is_linear(module):
            weight, bias = partial(linear_weight, module), partial(getattr, module, "bias")
            into = [InputPoint(module, "argument", 0)]
            sites.append(Site(name, weight, bias, into, module, "output"))
    return sites
