"""The authors' language models as Hugging Face models that compute exactly the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens.errors import ArtefactError

_SIZES = ("vocab_size", "n_embd", "n_layer", "n_head")
_LLAMA = (
    *_SIZES,
    "n_intermediate",
    "n_key_value_heads",
    "rms_norm_eps",
    "rotary_base",
    "attn_bias",
    "mlp_bias",
)


@dataclass(frozen=True)
class TargetClass:
    """One of the authors' classes: the fields of its configuration, and what it is elsewhere."""

    fields: tuple[str, ...]
    model: str  # the class in `transformers`
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    weights: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def context_length(fields: Mapping[str, Any]) -> int:
    """The longest sequence that a target takes."""
    return min(int(fields[name]) for name in ("block_size", "n_ctx") if name in fields)


def _llama_config(fields: Mapping[str, Any], activation: str) -> dict[str, Any]:
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["n_embd"],
        "intermediate_size": fields["n_intermediate"],
        "num_hidden_layers": fields["n_layer"],
        "num_attention_heads": fields["n_head"],
        "num_key_value_heads": fields["n_key_value_heads"],
        "hidden_act": activation,
        "max_position_embeddings": context_length(fields),
        "rms_norm_eps": float(fields["rms_norm_eps"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["rotary_base"])},
        "attention_bias": fields["attn_bias"],
        "mlp_bias": fields["mlp_bias"],
    }


_LLAMA_NAMES = (
    (r"^wte\.", "model.embed_tokens."),
    (r"^ln_f\.", "model.norm."),
    (r"^h\.", "model.layers."),
    (r"\.rms_1\.", ".input_layernorm."),
    (r"\.rms_2\.", ".post_attention_layernorm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".up_proj."),
)


def _llama_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in _LLAMA_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _gpt2_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": fields["vocab_size"],
        "n_embd": fields["n_embd"],
        "n_layer": fields["n_layer"],
        "n_head": fields["n_head"],
        "n_positions": context_length(fields),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    }


def _gpt2_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 fuses q, k and v, and keeps its matrices as `[d_in, d_out]`."""
    renamed = {}
    for name, tensor in weights.items():
        if ".attn.k_proj." in name or ".attn.v_proj." in name:
            continue
        if ".attn.q_proj." in name:
            parts = [
                weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
            ]
            name, tensor = name.replace("q_proj", "c_attn"), torch.cat(parts)
        name = name.replace("o_proj", "c_proj").replace("down_proj", "c_proj")
        matrix = name.endswith(".weight") and re.search(r"\.(attn|mlp)\.", name)
        path = name if name.startswith("lm_head.") else f"transformer.{name}"
        renamed[path] = tensor.T.contiguous() if matrix else tensor
    return renamed


CLASSES = {
    "LlamaSimpleMLP": TargetClass(
        _LLAMA, "Arcee", lambda fields: _llama_config(fields, "gelu_new"), _llama_weights
    ),
    "LlamaSimple": TargetClass(
        _LLAMA, "Llama", lambda fields: _llama_config(fields, "silu"), _llama_weights
    ),
    "GPT2Simple": TargetClass(_SIZES, "GPT2", _gpt2_config, _gpt2_weights),
}


def hugging_face_model(
    kind: str, fields: Mapping[str, Any], weights: Mapping[str, Tensor], tokenizer: Any
) -> nn.Module:
    """One of `CLASSES` with the authors' weights, in evaluation mode.

    Raises:
        ArtefactError: If the weights are not those of such a model.
    """
    import transformers

    this = CLASSES[kind]
    name = "GPT2LMHeadModel" if this.model == "GPT2" else f"{this.model}ForCausalLM"
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = this.config(fields) | special | {"pad_token_id": None, "tie_word_embeddings": True}
    config = getattr(transformers, f"{this.model}Config")(**options)
    config.architectures = [name]
    with torch.random.fork_rng(devices=[]):  # the weights that it begins with are replaced
        model = getattr(transformers, name)(config)
    try:
        model.load_state_dict(this.weights(weights))
    except (RuntimeError, KeyError) as error:
        raise ArtefactError(
            f"the target's weights are not those of the {kind} that its configuration describes: "
            f"{' '.join(str(error).split())[:400]}"
        ) from None
    return model.eval()
