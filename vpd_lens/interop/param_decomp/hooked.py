"""The authors' language models as HookedTransformers (TransformerLens 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vpd_lens.errors import ArtefactError
from vpd_lens.interop.param_decomp.hugging_face import context_length
from vpd_lens.models import hooked_transformer_class


def hooked_transformer(
    kind: str, fields: Mapping[str, Any], weights: Mapping[str, Tensor], tokenizer: Any
) -> nn.Module:
    """A HookedTransformer with the authors' weights, none of them folded or centred.

    `tokenizer` is one that was loaded from a folder which is still there.

    Raises:
        ArtefactError: If this TransformerLens no longer has the class, or the weights are not those
            of such a model.
    """
    hooked, config_class = hooked_transformer_class()
    model = hooked(config_class(**_config(kind, fields)), tokenizer=tokenizer)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in _parameters(fields, weights):
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                raise ArtefactError(
                    f"the target's weights are not those of the {kind} that its configuration "
                    f"describes: {name} is {list(tensor.shape)}, expected "
                    f"{None if parameter is None else list(parameter.shape)}."
                )
            parameter.copy_(tensor)
    return model.eval()


def _config(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    d_head = fields["n_embd"] // fields["n_head"]
    shape = {
        "d_model": fields["n_embd"],
        "d_head": d_head,
        "n_heads": fields["n_head"],
        "n_layers": fields["n_layer"],
        "n_ctx": context_length(fields),
        "d_vocab": fields["vocab_size"],
        "device": "cpu",
        "init_weights": False,
        "default_prepend_bos": False,
    }
    if kind == "GPT2Simple":
        gelu = {"act_fn": "gelu_new", "d_mlp": 4 * fields["n_embd"]}
        return shape | gelu | {"normalization_type": "LN", "eps": 1e-5}
    gated, n_groups = kind == "LlamaSimple", fields["n_key_value_heads"]
    return shape | {
        "d_mlp": fields["n_intermediate"],
        "act_fn": "silu" if gated else "gelu_new",
        "gated_mlp": gated,
        "normalization_type": "RMS",
        "final_rms": True,
        "eps": float(fields["rms_norm_eps"]),
        "n_key_value_heads": None if n_groups == fields["n_head"] else n_groups,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "rotary_base": fields["rotary_base"],
        "rotary_adjacent_pairs": False,
    }


_PLACES = {
    "wte.weight": "embed.W_E",
    "wpe.weight": "pos_embed.W_pos",
    "ln_f.weight": "ln_final.w",
    "ln_f.bias": "ln_final.b",
}
_NORMS = {"rms_1": "ln1", "rms_2": "ln2", "ln_1": "ln1", "ln_2": "ln2"}
_MATRICES = {"c_fc": "in", "up_proj": "in", "gate_proj": "gate", "down_proj": "out"}
_ATTENTION = {"q_proj": "Q", "k_proj": "K", "v_proj": "V", "o_proj": "O"}


def _parameters(
    fields: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a HookedTransformer's parameters."""
    d_head = fields["n_embd"] // fields["n_head"]
    grouped = fields.get("n_key_value_heads", fields["n_head"]) != fields["n_head"]
    for name, tensor in weights.items():
        if name in _PLACES:
            yield _PLACES[name], tensor
        elif name == "lm_head.weight":
            yield "unembed.W_U", tensor.T
        else:
            _, layer, *middle, last = name.split(".")
            block, part, letter = f"blocks.{layer}", middle[-1], "W" if last == "weight" else "b"
            if part in _NORMS:
                yield f"{block}.{_NORMS[part]}.{letter.lower()}", tensor
            elif part in _MATRICES:
                matrix = tensor.T if letter == "W" else tensor
                yield f"{block}.mlp.{letter}_{_MATRICES[part]}", matrix
            else:
                which = _ATTENTION[part]
                place = f"_{letter}_{which}" if grouped and which in "KV" else f"{letter}_{which}"
                yield f"{block}.attn.{place}", _by_head(tensor, which, d_head)


def _by_head(tensor: Tensor, which: str, d_head: int) -> Tensor:
    if which == "O":
        heads = "d_out (head d) -> head d d_out"
        return rearrange(tensor, heads, d=d_head) if tensor.ndim == 2 else tensor
    heads = "(head d) d_in -> head d_in d" if tensor.ndim == 2 else "(head d) -> head d"
    return rearrange(tensor, heads, d=d_head)
