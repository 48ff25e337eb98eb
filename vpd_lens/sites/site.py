"""A site: one weight matrix of a model, seen as `y = x W + b`.

A site knows how to read its weight, where the matrix' input `x` appears and where its
output `y` can be edited. It never replaces a module: it only registers PyTorch hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vpd_lens.errors import AttachError

ReadInput = Callable[[Tensor], None]
EditOutput = Callable[[Tensor], Tensor | None]


class SiteHooks(nn.Module):
    """The five TransformerLens hook points of one site, mounted as `<site>.vpd`.

    | hook point | value | shape |
    |---|---|---|
    | `hook_acts` | subcomponent activations `x V` | `[*batch, C]` |
    | `hook_ci` | causal importances | `[*batch, C]` |
    | `hook_mask` | masks in use (1 where unmasked) | `[*batch, C]` |
    | `hook_delta_mask` | the delta's mask | `[*batch, 1]` |
    | `hook_out` | the site's output as written | `[*batch, d_out]` |
    """

    def __init__(self) -> None:
        # Here: TransformerLens takes seconds to import, and the mathematics does not need it.
        from transformer_lens.hook_points import HookPoint

        super().__init__()
        self.hook_acts, self.hook_ci = HookPoint(), HookPoint()
        self.hook_mask, self.hook_delta_mask = HookPoint(), HookPoint()
        self.hook_out = HookPoint()

    def masks_are_watched(self) -> bool:
        """Whether anyone listens to the activations or masks of this site."""
        return any(map(has_listeners, (self.hook_acts, self.hook_mask, self.hook_delta_mask)))


def has_listeners(hook_point: nn.Module) -> bool:
    """Whether any forward or backward hook is registered on `hook_point`."""
    return bool(hook_point._forward_hooks or hook_point._backward_hooks)


@dataclass
class InputPoint:
    """Where a matrix' input can be read: at a call of `module`.

    As its `"argument"` of that position or keyword, just before it runs, or as its `"output"`
    after every other hook on it has run.
    """

    module: nn.Module
    kind: str = "argument"
    argument: int | str = 0


@dataclass
class Site:
    """One weight matrix of a model and the places where its input and output appear.

    Attributes:
        name: The same for both TransformerLens classes: `blocks.0.attn.q`, `blocks.0.mlp.out`.
        read_weight: Returns the current weight as `[d_in, d_out]`.
        read_bias: Returns the bias that is part of `y` as `[d_out]`, or `None`.
        inputs: Where the input appears. With several, the one nearest to the matrix wins.
        output: The module whose value is the site's output.
        output_kind: `"argument"`: `output` is a hook point that receives `y`, edited before
            any hook on it runs; `"output"`: `output` is a module that returns `y`.
        frame: A hook point that sees `[batch, pos, ...]` just before, for a matrix whose module
            may be called on `[batch * pos, d_in]` (OPT's MLP); `None` takes inputs as they come.
        results: A hook point that may receive every head's share, `[batch, pos, heads, d_out]`.
        has_heads: Whether its input or output may come as `[batch, pos, heads, d_head]`, which
            no shape tells of a single head.
        origin: The weight `[d_in, d_out]` of another model, if the difference from it is what is
            decomposed.
        store: Writes a weight `[d_in, d_out]` where it is kept; `None`: what `read_weight` returns
            is a view of it.
    """

    name: str
    read_weight: Callable[[], Tensor]
    read_bias: Callable[[], Tensor | None]
    inputs: list[InputPoint]
    output: nn.Module
    output_kind: str = "argument"
    frame: nn.Module | None = None
    results: nn.Module | None = None
    has_heads: bool = False
    hooks: SiteHooks = field(default_factory=SiteHooks)
    origin: Tensor | None = None
    store: Callable[[Tensor], None] | None = None
    _rows: torch.Size | None = field(default=None, init=False, repr=False)

    @property
    def weight(self) -> Num[Tensor, "d_in d_out"]:
        """The base weight, detached: reading it never builds a graph."""
        return self.read_weight().detach()

    @torch.no_grad()
    def overwrite(self, weight: Float[Tensor, "d_in d_out"]) -> None:
        """Write another base weight in place.

        Raises:
            AttachError: If the model keeps this weight where it cannot be written.
        """
        weight = weight.to(self.weight.dtype)
        if self.store is None:
            self.read_weight().detach().copy_(weight)
        else:
            self.store(weight)
        if not torch.equal(self.weight, weight):
            raise AttachError(
                f"{self.name}: this model makes that weight from others, so it cannot be written. "
                "Edit it while the model runs (vpd_lens.edited), or load another model class."
            )

    @property
    def decomposed(self) -> Num[Tensor, "d_in d_out"]:
        """What subcomponents and delta add up to: the weight, less the `origin` if there is one."""
        return self.weight if self.origin is None else self.weight.float() - self.origin.float()

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """The bias added by the matrix itself, or `None`."""
        bias = self.read_bias()
        return None if bias is None else bias.detach()

    def empty(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*n d_out"] | None:
        """The output with every mask 0, from the input: the bias, and `x` times the `origin`."""
        if self.origin is None:
            return self.bias
        y = x.to(self.origin.dtype) @ self.origin
        return y if self.bias is None else y + self.bias

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_in, d_out)`."""
        d_in, d_out = self.weight.shape
        return int(d_in), int(d_out)

    def attach(self, read: ReadInput, edit: EditOutput) -> list[RemovableHandle]:
        """Call `read(x)` on the matrix' input and let `edit(y)` replace its output.

        `read` receives the input `[*batch, d_in]`; `edit` the output `[*batch, d_out]`, heads
        flattened, and returns the new output, or `None` to leave it. The handles undo it.
        """
        # Bound methods and partials, never closures: `copy.deepcopy` of the model binds the copy's
        # hooks to the copy.
        d_in, d_out = self.shape
        handles: list[RemovableHandle] = []
        if self.frame is not None:
            handles.append(self.frame.register_forward_pre_hook(self._remember_rows))
        for point in self.inputs:
            if point.kind == "argument":
                see = partial(self._read_argument, read, d_in, point.argument)
                handles.append(point.module.register_forward_pre_hook(see, with_kwargs=True))
                continue
            last = point.module.register_forward_hook(partial(self._read_output, read, d_in))
            # A user's hook registered later would run later and could change what the matrix sees,
            # so ours is moved to the end of the queue each time the hook point is entered.
            to_end = point.module.register_forward_pre_hook(partial(move_last, last.id))
            handles += [last, to_end]
        if self.output_kind == "output":
            replace = partial(self._edit, edit, d_out)
            return [*handles, self.output.register_forward_hook(replace)]
        replace = partial(self._edit_argument, edit, d_out)
        return [*handles, self.output.register_forward_pre_hook(replace)]

    def _remember_rows(self, _module: nn.Module, args: tuple) -> None:
        self._rows = args[0].shape[:-1]

    def _read_argument(
        self, read: ReadInput, width: int, argument: int | str, _m: nn.Module, args: tuple, kw: dict
    ) -> None:
        read(self._in_rows(kw[argument] if isinstance(argument, str) else args[argument], width))

    def _read_output(self, read: ReadInput, width: int, _m: Any, _a: tuple, x: Tensor) -> None:
        read(self._in_rows(x, width))

    def _edit(self, edit: EditOutput, width: int, _m: Any, _a: tuple, y: Tensor) -> Tensor | None:
        new = edit(self._in_rows(y, width))
        return None if new is None else new.reshape(y.shape)

    def _edit_argument(self, edit: EditOutput, width: int, m: Any, args: tuple) -> tuple | None:
        new = self._edit(edit, width, m, args, args[0])
        return None if new is None else (new, *args[1:])

    def _in_rows(self, x: Tensor, width: int) -> Tensor:
        if self.has_heads and x.ndim == 4 and x.shape[-2] * x.shape[-1] == width:
            x = x.flatten(-2)
        return x if self._rows is None else x.reshape(*self._rows, width)


def move_last(hook_id: int, module: nn.Module, _args: tuple) -> None:
    """Have a forward hook run after all the others."""
    module._forward_hooks.move_to_end(hook_id)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear` or a Hugging Face `Conv1D`."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_weight(module: nn.Module) -> Tensor:
    """The weight `[d_in, d_out]` of either, which an `nn.Linear` keeps as `[out, in]`."""
    return cast(Tensor, module.weight.T if isinstance(module, nn.Linear) else module.weight)


def no_bias() -> None:
    """Bias reader of a matrix without a bias."""


@torch.no_grad()
def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest expected entry."""
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
