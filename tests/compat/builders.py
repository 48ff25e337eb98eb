"""Tiny models with random, non-trivial parameters for the compatibility tests.

Every parameter is drawn at random, norm weights and biases included: a unit LayerNorm would hide
a matrix' input that was read before the norm's own weight and bias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 61
LENGTH = 6

# Grouped-query attention wherever the architecture has it: 4 query heads on 2 key-value heads.
_WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}

# Hugging Face config class, model class and arguments of each architecture.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _WIDE),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_GROUPED, "pad_token_id": 0}),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_GROUPED, "num_local_experts": 2}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GROUPED),
    "gpt2_one_head": ("GPT2Config", "GPT2LMHeadModel", {**_GPT2, "n_head": 1}),
    "llama_multi_query": ("LlamaConfig", "LlamaForCausalLM", {**_WIDE, "num_key_value_heads": 1}),
    "llama_one_head": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_WIDE, "num_attention_heads": 1, "num_key_value_heads": 1},
    ),
}

MODES = ("default", "unprocessed", "processed")


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, so that no norm weight is 1 and no bias is 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_gain = parameter.ndim == 1 and name.endswith(("weight", ".w"))
        parameter.copy_(1 + 0.4 * noise if is_gain else 0.3 * noise)
    return model


def save_architecture(architecture: str, folder: Path) -> Path:
    """Save a random tiny Hugging Face model with a tokenizer, once per architecture."""
    import transformers

    target = folder / architecture
    if not target.exists():
        config_class, model_class, arguments = ARCHITECTURES[architecture]
        config = getattr(transformers, config_class)(
            bos_token_id=1, eos_token_id=2, **{"pad_token_id": 0, **arguments}
        )
        model = randomise(getattr(transformers, model_class)(config))
        model.save_pretrained(target)
        make_tokenizer().save_pretrained(target)
    return target


def make_tokenizer() -> Any:
    """A word-level tokenizer: `w3 w4` has one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), VOCABULARY)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def boot(folder: Path, mode: str = "default", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Boot a saved model as a `TransformerBridge`, in one of `MODES`."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=dtype)
    if mode == "unprocessed":
        bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    elif mode == "processed":
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Random tokens without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


_TINY = {
    "d_model": 16,
    "d_head": 4,
    "n_heads": 4,
    "n_layers": 2,
    "n_ctx": 32,
    "d_vocab": VOCABULARY,
    "d_mlp": 24,
    "act_fn": "gelu",
    "seed": 0,
}
_ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 4}
_SWIGLU = {"gated_mlp": True, "act_fn": "silu"}

# Arguments of `HookedTransformerConfig` (TransformerLens 3.x), on top of `_TINY`.
HOOKED: dict[str, dict[str, Any]] = {
    "ln": {"normalization_type": "LN"},
    "ln_gated": {"normalization_type": "LN", "gated_mlp": True},
    "lnpre": {"normalization_type": "LNPre"},
    "rms": {"normalization_type": "RMS", "final_rms": True, **_SWIGLU},
    "rmspre": {"normalization_type": "RMSPre", "final_rms": True},
    "no_norm": {"normalization_type": None},
    "grouped": {"normalization_type": "RMS", "n_key_value_heads": 2, **_ROTARY, **_SWIGLU},
    "rotary": {"normalization_type": "LN", **_ROTARY},
    "shortformer": {"normalization_type": "LN", "positional_embedding_type": "shortformer"},
    "parallel": {"normalization_type": "LN", "parallel_attn_mlp": True, **_ROTARY},
    "post_norm": {
        "normalization_type": "RMS",
        "use_normalization_before_and_after": True,
        **_ROTARY,
    },
    "attn_only": {"normalization_type": "LN", "attn_only": True},
    "wide_heads": {"normalization_type": "LN", "d_head": 6},
    "result": {"normalization_type": "LN", "use_attn_result": True},
    "one_head": {"normalization_type": "LN", "n_heads": 1, "d_head": 8, **_ROTARY},
    "multi_query": {"normalization_type": "RMS", "n_key_value_heads": 1, **_ROTARY, **_SWIGLU},
}

# Arguments of `TransformerBridgeConfig` for `TransformerBridge.boot_native`.
NATIVE: dict[str, dict[str, Any]] = {
    "ln": {"normalization_type": "LN"},
    "rms_gated": {"normalization_type": "RMS", **_ROTARY, **_SWIGLU},
    "grouped": {"normalization_type": "LN", "n_key_value_heads": 2, **_ROTARY},
    "no_norm": {"normalization_type": None},
    "attn_only": {"normalization_type": "LN", "attn_only": True},
    "one_head": {"normalization_type": "LN", "n_heads": 1, "d_head": 8},
    "multi_query": {"normalization_type": "LN", "n_key_value_heads": 1, **_ROTARY},
}


def hooked(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One of the `HOOKED` models; needs TransformerLens 3.x."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(**{**_TINY, **HOOKED[name], "dtype": dtype, "device": "cpu"})
    return randomise(HookedTransformer(config)).eval()


def native(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One of the `NATIVE` models, built without Hugging Face."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    config = TransformerBridgeConfig(**{**_TINY, **NATIVE[name]})
    return randomise(TransformerBridge.boot_native(config, device="cpu", dtype=dtype)).eval()


def has_hooked_transformer() -> bool:
    """Whether this TransformerLens still has the class (3.x)."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True
