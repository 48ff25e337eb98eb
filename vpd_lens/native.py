"""`native_transformer`: a TransformerLens model with random weights, on 3.x and 4.x alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def native_transformer(seed: int = 0, **shape: Any) -> nn.Module:
    """A HookedTransformer on TransformerLens 3.x, a TransformerBridge on 4.x.

    `shape` are fields that `HookedTransformerConfig` and `TransformerBridgeConfig` share. No global
    random state is touched, unlike by a configuration with a seed.
    """
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_native(TransformerBridgeConfig(**shape, seed=seed))
    config = HookedTransformerConfig(**shape, device="cpu", init_weights=False)
    model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # as HookedTransformer.init_weights does
        if "W_" in name:
            nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
    return model
