"""Masks while tokens are generated, the same with and without a key-value cache.

The paper's causal importance function looks ahead, so importances of old tokens would change with
every token that is appended, and cached keys and values would belong to masks that no longer hold.
The rule here: the prompt is masked as in one forward on the prompt; each later token gets the
masks that follow from everything up to and including itself; masks once used are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vpd_lens.decomposition.masks import Masks, Sources
from vpd_lens.decomposition.modes import MaskContext
from vpd_lens.decomposition.sigmoids import lower_leaky
from vpd_lens.errors import VPDError

if TYPE_CHECKING:
    from vpd_lens.decomposition.handle import Decomposition

# Arguments of a forward that concern its cache or its output, not what the target computes.
_NOT_FOR_THE_TARGET = (
    "past_kv_cache",
    "past_key_values",
    "use_cache",
    "use_past_kv_cache",
    "position_ids",
    "cache_position",
    "stop_at_layer",
    "loss_per_token",
)


def call_as_prefix(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a whole, uncached forward of the target that returns logits."""
    clean = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_THE_TARGET}
    if "return_type" in clean or len(args) > 1:
        clean["return_type"] = "logits"
        args = args[:1]
    return args, clean


class Generation:
    """What one call of `generate` has seen: the input so far and the masks already used."""

    def __init__(self) -> None:
        self.history: Tensor | None = None
        self.used: Masks | None = None
        self.sources: Sources | None = None

    @torch.no_grad()
    def masks(
        self, vpd: Decomposition, context: MaskContext, args: tuple, kwargs: dict[str, Any]
    ) -> Masks:
        """Masks of the positions of this call.

        Args:
            vpd: The decomposition.
            context: The masking mode.
            args: Positional arguments of the forward, the first being tokens or residual.
            kwargs: Its keyword arguments.

        Raises:
            VPDError: If the call neither repeats the whole sequence nor adds one token to it.
        """
        x = args[0] if args else kwargs["input"]
        self.history = self._extend(x)
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        prefix_args, prefix_kwargs = call_as_prefix((self.history,), rest)
        output, inputs = vpd.target(*prefix_args, **prefix_kwargs)
        known = 0 if self.used is None else self.used.components.shape[1]
        importance = lower_leaky(vpd.pre_importance(inputs))[:, known:]
        importance = vpd._through_hooks(importance)
        new = self._new_masks(vpd, context, importance, output, prefix_args, prefix_kwargs)
        if self.used is not None:
            new = Masks(
                torch.cat([self.used.components, new.components], dim=1),
                torch.cat([self.used.delta, new.delta], dim=1),
            )
        self.used = new
        last = x.shape[1]
        return Masks(new.components[:, -last:], new.delta[:, -last:])

    def _extend(self, x: Tensor) -> Tensor:
        if self.history is None or x.shape[1] == self.history.shape[1] + 1:
            return x
        if x.shape[1] == 1:
            return torch.cat([self.history, x], dim=1)
        raise VPDError(
            f"generation passed {x.shape[1]} positions after {self.history.shape[1]}; masked "
            "generation needs the whole sequence or its last token at each step."
        )

    def _new_masks(
        self,
        vpd: Decomposition,
        context: MaskContext,
        importance: Tensor,
        output: Tensor,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Masks:
        if context.mode != "adversarial":
            return context.masks(importance, vpd.layout)
        if self.sources is None:
            self.sources = vpd.find_adversary(context, importance, output, args, kwargs)
        return self.sources.masks(importance)
