"""What the arguments of a model's forward say, besides its tokens: padding, positions, caches."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from vpd_lens.sites import model_kind

# Arguments that concern what a forward returns or remembers, not what the target computes.
_OF_THE_CALL = (
    "past_kv_cache",
    "past_key_values",
    "cache",
    "use_cache",
    "use_past_kv_cache",
    "stop_at_layer",
    "loss_per_token",
    "labels",
)
# Arguments that describe only the last positions of a sequence whose beginning lies in a cache.
_OF_THE_LAST = ("position_ids", "cache_position")
_CACHES = ("past_kv_cache", "past_key_values", "cache")


def whole_call(
    args: tuple, kwargs: dict[str, Any], generating: bool = False
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a whole, uncached forward of the target that returns logits.

    Args:
        args: Positional arguments of a forward.
        kwargs: Its keyword arguments.
        generating: Whether they belong to the last positions of a longer sequence.
    """
    dropped = _OF_THE_CALL + _OF_THE_LAST if generating else _OF_THE_CALL
    clean = {name: value for name, value in kwargs.items() if name not in dropped}
    if "return_type" in clean or len(args) > 1:
        clean["return_type"] = "logits"
        args = args[:1]
    return args, clean


def cached_positions(kwargs: dict[str, Any]) -> int:
    """How many positions lie in a key-value cache that a forward is given; 0 without one."""
    for name in _CACHES:
        cache = kwargs.get(name)
        if cache is None:
            continue
        if hasattr(cache, "get_seq_length"):  # Hugging Face
            return int(cache.get_seq_length())
        if getattr(cache, "entries", None):  # TransformerLens
            return int(cache.entries[0].past_keys.shape[1])
    return 0


def real_positions(
    model: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Bool[Tensor, "batch pos"] | None:
    """Which positions of a forward's input are tokens and not padding; `None`: all of them.

    Read off `attention_mask`, off texts of unequal length, or, for token tensors of a
    HookedTransformer whose tokenizer pads on the left, as the model itself does it.

    Args:
        model: A HookedTransformer, a TransformerBridge or any other module.
        args: Positional arguments of its forward.
        kwargs: Its keyword arguments.
    """
    for name in ("attention_mask", "one_zero_attention_mask"):
        mask = kwargs.get(name)
        if mask is not None and mask.ndim == 2:
            return mask.bool()
    x = args[0] if args else kwargs.get("input")
    if isinstance(x, list | tuple) and len(x) > 1 and all(isinstance(text, str) for text in x):
        return _of_texts(model, list(x), kwargs)
    tokenizer = getattr(model, "tokenizer", None)
    if (
        model_kind(model) == "hooked_transformer"
        and tokenizer is not None
        and tokenizer.padding_side == "left"
        and isinstance(x, Tensor)
        and not x.is_floating_point()
    ):
        return _as_the_model_does(model, torch.atleast_2d(x), kwargs)
    return None


def _of_texts(model: nn.Module, texts: list[str], kwargs: dict[str, Any]) -> Tensor | None:
    given = {"prepend_bos": kwargs["prepend_bos"]} if "prepend_bos" in kwargs else {}
    lengths = [model.to_tokens(text, **given).shape[1] for text in texts]  # type: ignore[operator]
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    side = kwargs.get("padding_side") or getattr(model.tokenizer, "padding_side", "right")
    rows = torch.arange(longest).expand(len(texts), -1)
    n = torch.tensor(lengths)[:, None]
    return rows >= longest - n if side == "left" else rows < n


def _as_the_model_does(model: nn.Module, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    from transformer_lens import utils

    bos = kwargs.get("prepend_bos")
    prepend = bos if isinstance(bos, bool) else getattr(model.cfg, "default_prepend_bos", True)
    mask = utils.get_attention_mask(model.tokenizer, tokens, prepend)
    return mask.bool()
