"""Masked forwards of the training step that save memory or time: recomputed, or compiled.

Recomputed ones keep only the input of each block of the model for the backward pass, which
computes the rest again (activation checkpointing). Compiled ones are recorded once under a tracer,
every tensor operation, hooks included, whatever Python happens around them; `torch.compile` fuses
the record. That works for every model class, because nothing of the model's Python is compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from vpd_lens.decomposition.below import Kept
from vpd_lens.decomposition.handle import Decomposition
from vpd_lens.decomposition.masks import SourceMasks
from vpd_lens.errors import ConfigError
from vpd_lens.sites.site import relative_error

Forward = Callable[..., Tensor]


def recomputed(vpd: Decomposition) -> Forward:
    """`vpd.run` under source masks, with the model's `blocks` recomputed in the backward pass."""
    blocks = getattr(vpd.model, "blocks", None)
    if blocks is None:
        raise ConfigError(
            "recompute=True needs a model with `blocks` (HookedTransformer or "
            f"TransformerBridge), got {type(vpd.model).__name__}; leave it off, or use "
            "micro_batches to save memory."
        )

    def run(masks: SourceMasks, batch: Tensor, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return vpd.run(masks, batch, **kwargs)  # type: ignore[no-any-return]
        before = [block.__dict__.get("forward") for block in blocks]
        for block in blocks:
            block.__dict__["forward"] = partial(_checkpointed, vpd, block.forward)
        try:
            return vpd.run(masks, batch, **kwargs)  # type: ignore[no-any-return]
        finally:
            for block, own in zip(blocks, before, strict=True):
                del block.__dict__["forward"]
                if own is not None:
                    block.__dict__["forward"] = own

    return run


def _checkpointed(vpd: Decomposition, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    current = vpd.forwards.state.current
    assert current is not None
    n = len(vpd.sites)
    # What the hooks saw in the forward pass, for the time of its repetition.
    again = replace(current, inputs=[None] * n, edited=set())
    # A cache of keys and values would be extended a second time; training needs none.
    args = tuple(None if isinstance(a, Cache) else a for a in args)
    kwargs = {name: None if isinstance(a, Cache) else a for name, a in kwargs.items()}
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing random happens in evaluation mode
        context_fn=lambda: (nullcontext(), vpd.forwards.during(current=again)),
        **kwargs,
    )


def _given(attention_mask: Tensor | None, position_ids: Tensor | None) -> dict[str, Tensor]:
    given = {"attention_mask": attention_mask, "position_ids": position_ids}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


# Largest relative difference from the model itself that rounding explains.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class CompiledForwards:
    """Runs a model under source masks, through a compiled graph per kind of call.

    A graph belongs to one shape of input, and to the hooks that were on the model when it was
    recorded. It is compared with the model on another input before it is used; if that fails, or
    no compiler is found, a warning says so and the model itself runs.
    """

    def __init__(self, vpd: Decomposition) -> None:
        self.vpd = vpd
        self._graphs: dict[Hashable, Forward] = {}

    def run(
        self,
        masks: SourceMasks,
        batch: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The output of the model under masks."""
        kwargs = _given(attention_mask, position_ids)
        stream = self.vpd.forwards.stream((batch,), kwargs)
        stream = stream if isinstance(stream, Tensor) else None
        arguments = (*vars(masks).values(), attention_mask, position_ids, stream, batch)
        key = (
            self.vpd.forwards.state.frozen,
            torch.is_autocast_enabled(batch.device.type),
            *(None if t is None else (t.shape, t.dtype) for t in arguments),
        )
        if key not in self._graphs:
            self._graphs[key] = self._compile(arguments)
        return self._graphs[key](*arguments)

    def _plain(self, *arguments: Any) -> Tensor:
        *masks, attention_mask, position_ids, stream, batch = arguments
        kwargs, forwards = _given(attention_mask, position_ids), self.vpd.forwards
        with ExitStack() as stack:
            if stream is not None:  # an argument of the graph, not what was kept when it was made
                stack.enter_context(Kept(forwards.below).passing_by(stream))
            stack.enter_context(forwards.during(kept=None))
            return self.vpd.run(SourceMasks(*masks), batch, **kwargs)  # type: ignore[no-any-return]

    def _compile(self, arguments: tuple[Tensor | None, ...]) -> Forward:
        try:
            with torch.no_grad():
                graph = make_fx(self._plain)(*arguments)
            compiled = torch.compile(graph, dynamic=False)
            self._check(compiled, arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            warnings.warn(
                f"the masked forward could not be compiled and runs uncompiled "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}).",
                RuntimeWarning,
                stacklevel=2,
            )
            return self._plain
        return compiled

    def _check(self, compiled: Forward, arguments: tuple[Tensor | None, ...]) -> None:
        """Output and gradients on another input than the recorded one, against the model's."""
        *rest, batch = arguments
        assert batch is not None
        assert arguments[0] is not None
        other = (*rest, batch.roll((1,) * batch.ndim, tuple(range(batch.ndim))))
        leaves = [t for t in rest if t is not None and t.requires_grad]
        results = []
        for forward in (compiled, self._plain):
            output = forward(*other)
            result = [output.detach()]
            if leaves and torch.is_grad_enabled():
                # Compared together: where V U equals W, the deltas' gradients are all rounding.
                gradients = torch.autograd.grad(output.float().square().mean(), leaves)
                result.append(torch.cat([gradient.flatten() for gradient in gradients]))
            results.append(result)
        dtypes = results[1][0].dtype, arguments[0].dtype
        tolerance = max(_TOLERANCE.get(dtype, 1e-3) for dtype in dtypes)
        for got, expected in zip(*results, strict=True):
            error = relative_error(got.float(), expected.float())
            if not error <= tolerance:
                raise ValueError(f"its results differ from the model's by {error:.1e}")
