"""Masked forwards that keep only the input of each block of the model for the backward pass.

What happens inside a block is computed again when the backward pass reaches it (activation
checkpointing): more arithmetic in the masked forwards, for a fraction of their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from vpd_lens.decomposition.forward import Pass
from vpd_lens.decomposition.handle import Decomposition
from vpd_lens.decomposition.masks import SourceMasks
from vpd_lens.errors import ConfigError


class RecomputedForwards:
    """Runs a model under source masks and recomputes its blocks in the backward pass.

    Args:
        vpd: The decomposition whose model runs.

    Raises:
        ConfigError: If the model has no `blocks`.
    """

    def __init__(self, vpd: Decomposition) -> None:
        self.vpd = vpd
        blocks = getattr(vpd.model, "blocks", None)
        if blocks is None:
            raise ConfigError(
                "recompute=True needs a model with `blocks` (HookedTransformer or "
                f"TransformerBridge), got {type(vpd.model).__name__}; leave it off, or use "
                "micro_batches to save memory."
            )
        self.blocks: list[nn.Module] = list(blocks)

    def run(self, masks: SourceMasks, batch: Tensor, **kwargs: Any) -> Tensor:
        """The output of the model under masks.

        Args:
            masks: Importances and sources.
            batch: The model's input.
            **kwargs: Passed to the model.
        """
        if not torch.is_grad_enabled():
            return self.vpd.run(masks, batch, **kwargs)  # type: ignore[no-any-return]
        before = [block.__dict__.get("forward") for block in self.blocks]
        for block in self.blocks:
            block.__dict__["forward"] = partial(self._checkpointed, block.forward)
        try:
            return self.vpd.run(masks, batch, **kwargs)  # type: ignore[no-any-return]
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                del block.__dict__["forward"]
                if own is not None:
                    block.__dict__["forward"] = own

    def _checkpointed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = self.vpd.forwards.state.current
        assert current is not None
        # A cache of keys and values would be extended a second time; training needs none.
        args = tuple(None if isinstance(a, Cache) else a for a in args)
        kwargs = {name: None if isinstance(a, Cache) else a for name, a in kwargs.items()}
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing random happens in evaluation mode
            context_fn=lambda: (nullcontext(), self._again(current)),
            **kwargs,
        )

    @contextmanager
    def _again(self, current: Pass) -> Iterator[None]:
        """What the hooks saw in the forward pass, for the time of its repetition."""
        n = len(self.vpd.sites)
        with self.vpd.forwards.within(replace(current, inputs=[None] * n, edited=[False] * n)):
            yield
