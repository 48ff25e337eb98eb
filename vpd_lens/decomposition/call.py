"""What the arguments of a model's forward say besides its tokens: padding, positions, caches.

And what the calls of one `generate` have in common. The paper's causal importance function looks
ahead, so importances of old tokens would change with every token that is appended, and cached keys
and values would belong to masks that no longer hold. The rule here: the prompt is masked as in one
forward on the prompt; each later token gets the masks that follow from everything up to and
including itself; masks once used are kept, with and without a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from vpd_lens.decomposition.masks import Masks, Sources
from vpd_lens.errors import VPDError
from vpd_lens.sites import model_kind

_CACHES = ("past_kv_cache", "past_key_values", "cache")
# Arguments that concern what a forward returns or remembers, not what the target computes.
_OF_THE_CALL = {*_CACHES, "use_cache", "use_past_kv_cache", "stop_at_layer"}
_OF_THE_CALL |= {"loss_per_token", "labels"}
# Arguments that describe only the last positions of a sequence whose beginning lies in a cache.
_OF_THE_LAST = {"position_ids", "cache_position"}


def whole_call(args: tuple, kwargs: dict, generating: bool = False) -> tuple[tuple, dict]:
    """The arguments of a whole, uncached forward of the target that returns logits.

    When `generating`, those given belong to the last positions of a longer sequence.
    """
    dropped = _OF_THE_CALL | _OF_THE_LAST if generating else _OF_THE_CALL
    clean = {name: value for name, value in kwargs.items() if name not in dropped}
    if "return_type" in clean or len(args) > 1:
        clean["return_type"] = "logits"
        args = args[:1]
    return args, clean


def cached_positions(kwargs: dict[str, Any]) -> int:
    """How many positions lie in a key-value cache that a forward is given; 0 without one."""
    for name in _CACHES:
        cache: Any = kwargs.get(name)
        if hasattr(cache, "get_seq_length"):  # Hugging Face
            return int(cache.get_seq_length())
        if getattr(cache, "entries", None):  # TransformerLens
            return int(cache.entries[0].past_keys.shape[1])
    return 0


def real_positions(model: nn.Module, args: tuple, kwargs: dict) -> Bool[Tensor, "batch pos"] | None:
    """Which positions of a forward's input are tokens and not padding; `None`: all of them.

    Read off `attention_mask`, off texts of unequal length, or, for token tensors of a
    HookedTransformer whose tokenizer pads on the left, as the model itself does it.
    """
    for name in ("attention_mask", "one_zero_attention_mask"):
        mask = kwargs.get(name)
        if mask is not None and mask.ndim == 2:
            return mask.bool()
    x = args[0] if args else kwargs.get("input")
    if isinstance(x, list | tuple) and len(x) > 1 and all(isinstance(text, str) for text in x):
        given = {"prepend_bos": kwargs["prepend_bos"]} if "prepend_bos" in kwargs else {}
        lengths = torch.tensor([model.to_tokens(text, **given).shape[1] for text in x])  # type: ignore[operator]
        n, longest = lengths[:, None], int(lengths.max())
        if bool((n == longest).all()):
            return None
        side = kwargs.get("padding_side") or getattr(model.tokenizer, "padding_side", "right")
        rows = torch.arange(longest).expand(len(x), -1)
        return rows >= longest - n if side == "left" else rows < n
    tokenizer: Any = getattr(model, "tokenizer", None)
    left = getattr(tokenizer, "padding_side", None) == "left"
    tokens = isinstance(x, Tensor) and not x.is_floating_point()
    if left and tokens and model_kind(model) == "hooked_transformer":
        from transformer_lens import utils

        bos = kwargs.get("prepend_bos")
        bos = bos if isinstance(bos, bool) else getattr(model.cfg, "default_prepend_bos", True)
        return utils.get_attention_mask(tokenizer, torch.atleast_2d(x), bos).bool()
    return None


def right_padding(model: nn.Module, real: Bool[Tensor, "batch pos"]) -> dict[str, Tensor]:
    """What tells a model's forward that rows are padded on the right.

    A TransformerBridge that is not told the positions reads the mask's values to find out whether
    the padding is on the left: the host would wait, and no graph could be recorded.
    """
    arguments = {"attention_mask": real.long()}
    positioned = getattr(model, "_accepts_derived_position_ids", None)
    if positioned is not None and positioned():
        positions = torch.arange(real.shape[1], device=real.device)
        arguments["position_ids"] = positions.expand(real.shape)
    return arguments


@dataclass
class Generation:
    """What one call of `generate` has seen: the input so far and the masks already used."""

    history: Tensor | None = None  # the input, `[batch, pos]` tokens or `[batch, pos, d_model]`
    n_passed: int = 0  # how many of its positions the current call passes
    used: Masks | None = None  # masks of its positions, but for those that are new
    sources: Sources | None = None  # what `adversarial` found on the prompt, kept for what follows

    @property
    def n_used(self) -> int:
        """Positions that have masks already."""
        return 0 if self.used is None else self.used.components.shape[1]

    def whole_call(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of an uncached forward on everything up to this call's last position."""
        x = args[0] if args else kwargs["input"]
        self.n_passed, before = x.shape[1], self.history
        if before is not None and x.shape[1] != before.shape[1] + 1:
            if x.shape[1] != 1:
                raise VPDError(
                    f"generation passed {x.shape[1]} positions after {before.shape[1]}; masked "
                    "generation needs the whole sequence or its last token at each step."
                )
            x = torch.cat([before, x], dim=1)
        self.history = x
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        return whole_call((x,), rest, generating=True)

    def remember(self, new: Masks) -> Masks:
        """Keep the masks `[batch, new, C_total]` of new positions; return those of the call's."""
        if self.used is not None:
            old, both = self.used, self.used.routed is not None and new.routed is not None
            new = Masks(
                torch.cat([old.components, new.components], 1),
                torch.cat([old.delta, new.delta], 1),
                torch.cat([old.routed, new.routed], 1) if both else None,  # type: ignore[list-item]
            )
        self.used, n = new, self.n_passed
        routed = None if new.routed is None else new.routed[:, -n:]
        return Masks(new.components[:, -n:], new.delta[:, -n:], routed)
