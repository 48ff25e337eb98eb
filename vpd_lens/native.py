"""`native_transformer`: a TransformerLens model with random weights, on 3.x and 4.x alike."""

from __future__ import annotations

from typing import Any

from torch import nn


def native_transformer(tokenizer: Any = None, **shape: Any) -> nn.Module:
    """A HookedTransformer on TransformerLens 3.x, a TransformerBridge on 4.x.

    Args:
        tokenizer: Its tokenizer, if it has one.
        **shape: Fields that `HookedTransformerConfig` and `TransformerBridgeConfig` share.
    """
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_native(TransformerBridgeConfig(**shape))
        model.tokenizer = tokenizer
        return model
    config = HookedTransformerConfig(**shape, device="cpu")
    return HookedTransformer(config, tokenizer=tokenizer, default_padding_side="right")
