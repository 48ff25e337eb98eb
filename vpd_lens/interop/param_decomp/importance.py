"""The authors' causal importance functions as ours: the same functions, in our order of sites.

Theirs multiply from the right (`W` is `[d_in, d_out]`), but for the attention's projections. A
function of all sites reads and writes them in the order of their sorted names, ours in forward
order: the rows of its first matrix and the columns of its last are moved at import.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.interop.param_decomp.checkpoint import State, Tensors


def importance_tensors(
    state: State, sites: Sequence[str], config: CausalImportanceConfig
) -> Tensors:
    """The state dict of our causal importance function; `sites` are their paths in our order.

    Raises:
        KeyError: If a tensor is missing.
    """
    build = {
        "transformer": _transformer,
        "global_mlp": _global_mlp,
        "mlp": _mlp,
        "vector_mlp": _vector_mlp,
        "shared_mlp": _shared_mlp,
    }
    return build[config.kind](state, sites, config)


def _in_our_order(tensor: Tensor, widths: dict[str, int], sites: Sequence[str], dim: int) -> Tensor:
    """A dimension that runs over sorted sites of these `widths`, in the order of `sites`."""
    names = sorted(widths)
    parts = dict(zip(names, tensor.split([widths[n] for n in names], dim), strict=True))
    return torch.cat([parts[name] for name in sites], dim)


def _reads(state: State, sites: Sequence[str], first: Tensor) -> Tensor:
    """The weight `[d_out, sum d_in]` of a layer that reads every site's input, from theirs."""
    widths = {site: state.components[site]["V"].shape[0] for site in sites}
    return _in_our_order(first, widths, sites, 0).T


def _writes(state: State, sites: Sequence[str], last: Tensor) -> Tensor:
    """The weight `[C_total, d_in]`, or bias, of a layer that writes every site's importances."""
    widths = {site: state.components[site]["V"].shape[1] for site in sites}
    return (
        _in_our_order(last, widths, sites, -1).mT
        if last.ndim > 1
        else _in_our_order(last, widths, sites, 0)
    )


def _transformer(state: State, sites: Sequence[str], config: CausalImportanceConfig) -> Tensors:
    own = state.importance[""]
    tensors = {
        "project_in.weight": _reads(state, sites, own["_input_projector.W"]),
        "project_in.bias": own["_input_projector.b"],
        "project_out.weight": _writes(state, sites, own["_output_head.W"]),
        "project_out.bias": _writes(state, sites, own["_output_head.b"]),
    }
    for index in range(config.n_blocks or 0):
        theirs, ours = f"_blocks.{index}", f"blocks.{index}"
        qkv = [own[f"{theirs}.attn.{part}_proj.weight"] for part in "qkv"]
        tensors |= {
            f"{ours}.qkv.weight": torch.cat(qkv),
            f"{ours}.out.weight": own[f"{theirs}.attn.out_proj.weight"],
            f"{ours}.up.weight": own[f"{theirs}.mlp.0.W"].T,
            f"{ours}.up.bias": own[f"{theirs}.mlp.0.b"],
            f"{ours}.down.weight": own[f"{theirs}.mlp.2.W"].T,
            f"{ours}.down.bias": own[f"{theirs}.mlp.2.b"],
        }
    return tensors


def _layers(own: Tensors) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of every linear layer; between them, by number, lie the GELUs."""
    found: list[tuple[Tensor, Tensor]] = []
    for index in count(step=2):
        if f"layers.{index}.W" not in own:
            return found
        found.append((own[f"layers.{index}.W"], own[f"layers.{index}.b"]))
    raise AssertionError


def _global_mlp(state: State, sites: Sequence[str], _: CausalImportanceConfig) -> Tensors:
    layers = [(w.T, b) for w, b in _layers(state.importance[""])]
    layers[0] = (_reads(state, sites, layers[0][0].T), layers[0][1])
    layers[-1] = (_writes(state, sites, layers[-1][0].T), _writes(state, sites, layers[-1][1]))
    return _sequential("mlp", layers)


def _shared_mlp(state: State, sites: Sequence[str], _: CausalImportanceConfig) -> Tensors:
    tensors: Tensors = {}
    for index, site in enumerate(sites):
        layers = [(w.T, b) for w, b in _layers(state.importance[site])]
        tensors |= _sequential(f"mlps.{index}", layers)
    return tensors


def _sequential(prefix: str, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensors:
    tensors: Tensors = {}
    for index, (weight, bias) in enumerate(layers):
        place = f"{prefix}.{2 * index}"
        tensors |= {f"{place}.weight": weight, f"{place}.bias": bias}
    return tensors


def _vector_mlp(state: State, sites: Sequence[str], _: CausalImportanceConfig) -> Tensors:
    tensors: Tensors = {}
    for index, site in enumerate(sites):
        for number, (weight, bias) in enumerate(_layers(state.importance[site])):
            place = f"mlps.{index}.{number}"
            tensors |= {f"{place}.weight": weight, f"{place}.bias": bias}
    return tensors


def _mlp(state: State, sites: Sequence[str], _: CausalImportanceConfig) -> Tensors:
    """An MLP per subcomponent, those of all sites side by side: `[C, 1, h]`, ..., `[C, h, 1]`."""
    per_site = [_layers(state.importance[site]) for site in sites]
    layers = [
        tuple(torch.cat(parts) for parts in zip(*layer, strict=True))
        for layer in zip(*per_site, strict=True)
    ]
    (w_in, b_in), (w_out, b_out) = layers[0], layers[-1]
    if len(layers) == 1:
        return {"w": w_in[:, 0, 0], "b": b_in[:, 0]}
    tensors = {"w_in": w_in[:, 0], "b_in": b_in, "w_out": w_out[..., 0], "b_out": b_out[:, 0]}
    for index, (weight, bias) in enumerate(layers[1:-1]):
        tensors |= {f"middle.{index}.weight": weight, f"middle.{index}.bias": bias}
    return tensors
