"""Forwards under masks: what every site's hooks do while the model runs.

1. `Forwards.run` begins a `Pass`, which holds everything about one forward of the model.
2. Each site calls `read` with its input and `edit` with its output; both look at the pass.
3. Without masks and without listeners `edit` returns at once, and the output is the model's own.

What changes from forward to forward is kept per thread: masks of one do not reach another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from vpd_lens.decomposition.below import Kept, blocks_below
from vpd_lens.decomposition.heads import empty_heads, head_acts
from vpd_lens.decomposition.masks import AnyMasks, Layout, Masks, edited_site, masked_site
from vpd_lens.decomposition.modes import MaskContext
from vpd_lens.decomposition.subcomponents import Subcomponents
from vpd_lens.errors import InputError, VPDError
from vpd_lens.sites import Site
from vpd_lens.sites.site import has_listeners

FLAGS_HINT = (
    "Switch off flags that multiply per head or go around a matrix "
    "(model.set_use_split_qkv_input(False), model.set_use_attn_result(False), "
    "model.set_use_attn_in(False)), or decompose other sites."
)


class _Reached(BaseException):
    """Ends a forward whose output nobody needs; not an error, which a model might catch."""


@dataclass
class Pass:
    """One forward of the model, as the hooks of its sites see it."""

    inputs: list[Tensor | None]  # of every site, `[*batch, d_in]`, from when seen until used
    masks: list[Masks] | None = None  # of every site; `None` for the target model
    frozen: bool = False  # whether V and U are constants, which get no gradient
    outputs: list[Tensor | None] | None = None  # of every site as written, if they are recorded
    edited: set[int] = field(default_factory=set)  # sites that have been masked so far
    by_head: set[int] = field(default_factory=set)  # those masked in the result of every head
    finished: bool = False  # whether the forward has reached the model's end
    only_inputs: bool = False  # whether it ends as soon as the inputs of all sites are known


class _State(threading.local):
    """What one thread does with one decomposition."""

    def __init__(self, n_sites: int) -> None:
        self.n_sites = n_sites
        self.idle = Pass([None] * n_sites)  # of calls that do not go through the decomposition
        self.context: MaskContext | None = None  # a `masked` block that changes the model
        self.current: Pass | None = None
        self.generation: Any = None
        self.kept: Kept | None = None  # inside `kept_below`
        self.frozen = self.undisturbed = False

    def __reduce__(self) -> tuple[type[_State], tuple[int]]:
        """A copy is outside of all blocks."""
        return _State, (self.n_sites,)


class Forwards:
    """Runs a model under masks, through the hooks that its sites have on it."""

    def __init__(self, model: nn.Module, sites: list[Site], subcomponents: Subcomponents) -> None:
        self.model, self.sites, self.subcomponents = model, sites, subcomponents
        self.original: Callable[..., Any] = model.forward  # which attaching wraps
        self.passable: bool | None = None  # whether blocks below the first site may be passed by
        self.ends = False  # whether a hook tells when the model's end is reached
        self.state = _State(len(sites))  # what this thread does with the decomposition

    @property
    def below(self) -> list[nn.Module]:
        """The model's blocks below the first site."""
        return blocks_below(self.model, self.sites)

    @property
    def layout(self) -> Layout:
        """Names and sizes of the sites."""
        return self.subcomponents.layout

    def run(
        self,
        masks: AnyMasks | None,
        args: tuple,
        kwargs: Mapping[str, Any],
        record: bool = False,
        only_inputs: bool = False,
    ) -> tuple[Any, Pass]:
        """One forward under fixed masks (`None`: the target), and its pass; see `Decomposition`.

        For `only_inputs` the target's forward ends at the last site, and its output is `None`.
        """
        n = len(self.sites)
        current = Pass([None] * n, frozen=self.state.frozen, finished=not self.ends)
        current.only_inputs = only_inputs
        if masks is not None:
            masks = masks if isinstance(masks, Masks) else masks.computed()
            current.masks = masks.per_site(self.layout)
        current.outputs = [None] * n if record else None
        repeated = _set(self._recomputing(), "gradient_checkpointing", False)
        with self.during(current=current), repeated:
            output = self._from_what_is_kept(args, kwargs)
        if masks is not None:
            self._require_all_edited(current, kwargs)
        return output, current

    def stream(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """What the blocks below the first site return for a forward, if that is kept."""
        kept = self.state.kept
        return None if kept is None or not self.passable else kept.of(args, kwargs)

    def _from_what_is_kept(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The model's forward, without the blocks below the first site if they are known."""
        kept = self.state.kept
        if kept is None or self.passable is False:
            return self._call(args, kwargs)
        if (stream := self.stream(args, kwargs)) is not None:
            with kept.passing_by(stream):
                return self._call(args, kwargs)
        with kept.keeping(args, kwargs):
            output = self._call(args, kwargs)
        if self.passable is None and output is not None:
            self.passable = self._is_passable(kept.of(args, kwargs), output, args, kwargs)
        return output

    def _call(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        try:
            return self.original(*args, **kwargs)
        except _Reached:
            return None

    @torch.no_grad()
    def _is_passable(
        self, stream: Any, output: Any, args: tuple, kwargs: Mapping[str, Any]
    ) -> bool | None:
        """Whether the model computes the same, to the bit, when it passes by the blocks below."""
        if stream is None:  # nothing was kept of this forward, which says nothing of others
            return None
        masks = self.state.current.masks if self.state.current is not None else None
        again = Pass([None] * len(self.sites), masks, frozen=True, finished=True)
        with self.during(current=again), Kept(self.below).passing_by(stream):
            short = self.original(*args, **kwargs)
        pairs = zip(tree_leaves(output), tree_leaves(short), strict=True)
        tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor)]
        if any(a.is_meta or isinstance(a, FakeTensor) for a, _ in tensors):  # no values: in a plan
            return True
        return all(torch.equal(a, b) for a, b in tensors)

    @contextmanager
    def kept_below(self) -> Iterator[None]:
        """A block in which blocks below the first site run once per input."""
        if self.state.kept is not None or self.passable is False or not self.below:
            yield
            return
        with self.during(kept=Kept(self.below)):
            yield

    @contextmanager
    def during(self, **values: Any) -> Iterator[None]:
        """A block in which this thread's state has other values."""
        state = self.state.__dict__  # of this thread
        before = {name: state[name] for name in values}
        state.update(values)
        try:
            yield
        finally:
            state.update(before)

    @contextmanager
    def undisturbed(self, again: bool = False) -> Iterator[None]:
        """Forwards inside are in evaluation mode, without the temporary hooks of a user.

        Permanent hooks stay, being part of the model, and so do hooks added inside; but `again`, in
        a block inside another, silences those that were added there, too.
        """
        if self.state.undisturbed and not again:
            yield
            return
        modules = self._modules()
        silenced = [entry for module in modules for entry in _temporary_hooks(module)]
        before = [(hooks, list(hooks.items())) for hooks, _ in silenced]
        for hooks, numbers in silenced:
            for number in numbers:
                hooks.pop(number, None)
        training = [module for module in modules if module.training]
        try:
            with self.during(undisturbed=True), _set(training, "training", False):
                yield
        finally:
            for hooks, items in before:
                hooks.clear()
                hooks.update(items)

    def _modules(self) -> list[nn.Module]:
        """All modules of the model; a bridge does not register all those of the one it wraps."""
        wrapped = getattr(self.model, "original_model", None)
        inner = wrapped.modules() if isinstance(wrapped, nn.Module) else ()
        return list(dict.fromkeys([*self.model.modules(), *inner]))

    def _recomputing(self) -> list[nn.Module]:
        """Modules with Hugging Face's gradient checkpointing, whose repetitions know no masks."""
        if self.state.undisturbed or not torch.is_grad_enabled():  # then nothing is recomputed
            return []
        flag = "gradient_checkpointing"
        return [m for m in self._modules() if m.training and m.__dict__.get(flag)]

    def _require_all_edited(self, current: Pass, kwargs: Mapping[str, Any]) -> None:
        """A flag switched on after attaching may bypass a matrix; its masks would do nothing."""
        # A run may start or stop at a layer; between its ends no site may be missing.
        start = 0 if kwargs.get("start_at_layer") is None else min(current.edited, default=0)
        stop = len(self.sites) if current.finished else max(current.edited, default=0)
        missed = [self.layout.names[i] for i in range(start, stop) if i not in current.edited]
        if missed:
            raise VPDError(
                f"masks are active, but the forward pass went around {missed}. {FLAGS_HINT}"
            )

    def read(self, index: int, x: Tensor) -> None:
        """See the input of a site."""
        current = self.state.current or self.state.idle
        current.inputs[index] = x
        if current.only_inputs and all(known is not None for known in current.inputs):
            raise _Reached

    def edit(self, index: int, y: Tensor) -> Tensor | None:
        """The new output of a site, or `None` where it stays what the model computed."""
        state = self.state
        if state.current is None and state.context is not None:
            raise VPDError(
                "masks are active, but the model runs without passing through model.forward "
                "(hf_generate, a submodule called by hand). Call the model itself, or leave "
                "the masked(...) block."
            )
        current = state.current or state.idle
        edited = self._new_output(current, index, y)
        if current.outputs is not None:
            current.outputs[index] = y if edited is None else edited
        if current.masks is not None or current is state.idle:
            current.inputs[index] = None
        return edited

    def edit_heads(self, index: int, _module: nn.Module, args: tuple) -> tuple[Tensor] | None:
        """The results `[*batch, head, d_out]` of a site under masks, if `use_attn_result` is on.

        HookedTransformer adds them up itself, so that `edit` leaves such a site's output alone.
        """
        current = self.state.current
        if current is None or current.masks is None:
            return None
        (results,) = args
        v, u = self._directions(current, index)
        acts = head_acts(current.inputs[index], v, results.shape[-2])
        (_, mask, delta), edited, _ = self._shown(index, acts.sum(-2), current.masks[index])
        if edited[0]:
            raise VPDError(
                f"hook_acts of {self.layout.names[index]} was edited, which says nothing of single "
                "heads. Call model.set_use_attn_result(False), or edit hook_mask."
            )
        current.by_head.add(index)
        mask, delta = mask.unsqueeze(-2), delta.unsqueeze(-2)
        empty = empty_heads(self.sites[index], current.inputs[index], results.shape[-2])
        return (edited_site(results, u, acts, acts, mask, delta, empty),)

    def note_end(self, _module: nn.Module, _args: tuple) -> None:
        """See that the forward has reached the model's end."""
        if (current := self.state.current) is not None:
            current.finished = True

    def _new_output(self, current: Pass, index: int, y: Tensor) -> Tensor | None:
        site, masks = self.sites[index], None if current.masks is None else current.masks[index]
        hooks, by_head = site.hooks, index in current.by_head
        if masks is not None:
            current.edited.add(index)
            self._require_fit(index, masks, y)
        if hooks.masks_are_watched() and not by_head:
            y = self._watched(current, index, y, masks)
        elif masks is not None and not by_head:
            x, (v, u) = self._input_of(current, index, y), self._directions(current, index)
            y = masked_site(x, y, v, u, masks, site.empty(x))
        elif masks is None and not has_listeners(hooks.hook_out):
            return None
        return hooks.hook_out(y)  # type: ignore[no-any-return]

    def _input_of(self, current: Pass, index: int, y: Tensor) -> Tensor:
        x = current.inputs[index]
        if x is None or x.shape[:-1] != y.shape[:-1]:
            raise VPDError(
                f"the output of {self.layout.names[index]} was computed from something other than "
                f"one input per position. {FLAGS_HINT}"
            )
        return x

    def _require_fit(self, index: int, masks: Masks, y: Tensor) -> None:
        batch = y.shape[:-1]
        for given in (masks.components.shape[:-1], masks.delta.shape[:-1]):
            pairs = zip(reversed(given), reversed(batch), strict=False)
            if len(given) > len(batch) or any(got not in (1, need) for got, need in pairs):
                raise InputError(
                    f"the masks of {self.layout.names[index]} have leading shape {tuple(given)}, "
                    f"but the model runs on {tuple(batch)} (batch and positions); give the same, "
                    "or 1 where one mask serves all."
                )

    def _directions(self, current: Pass, index: int) -> tuple[Tensor, Tensor]:
        v, u = self.subcomponents.v[index], self.subcomponents.u[index]
        return (v.detach(), u.detach()) if current.frozen else (v, u)

    def _watched(self, current: Pass, index: int, y: Tensor, masks: Masks | None) -> Tensor:
        """The site's output when someone listens to its activations or masks."""
        v, u = self._directions(current, index)
        x = self._input_of(current, index, y)
        clean = x.to(y.dtype) @ v.to(y.dtype)
        # Hooks see a copy, which they may write to: the delta's share is of what was there before.
        (acts, mask, delta), edited, backward = self._shown(index, clean.clone(), masks)
        # The untouched path: hooks that only look leave the model's own output in place.
        if masks is None and not any(edited) and not backward:
            return y
        return edited_site(y, u, clean, acts, mask, delta, self.sites[index].empty(x))

    def _shown(
        self, index: int, acts: Tensor, masks: Masks | None
    ) -> tuple[list[Tensor], list[bool], bool]:
        """Activations, mask, delta's mask after a site's hooks; which were edited; any backward?"""
        hooks = self.sites[index].hooks
        points = (hooks.hook_acts, hooks.hook_mask, hooks.hook_delta_mask)
        if masks is None:
            mask, delta = torch.ones_like(acts), acts.new_ones(*acts.shape[:-1], 1)
        else:
            # Copies, because a hook may write to them in place.
            mask = masks.components.expand(acts.shape).clone()
            delta = masks.delta.expand(*acts.shape[:-1], 1).clone()
            if masks.routed is not None:
                mask = torch.where(masks.routed, mask, 1)
                delta = torch.where(masks.routed, delta, 1)
        values = (acts, mask, delta)
        backward = [bool(p._backward_hooks) and torch.is_grad_enabled() for p in points]
        for value, listened in zip(values[1:], backward[1:], strict=True):
            if listened and not value.requires_grad:
                value.requires_grad_()
        # Inference tensors (HookedTransformer.generate) count no versions; copies stand for them.
        before = [value.clone() if value.is_inference() else value._version for value in values]
        after = [point(value) for point, value in zip(points, values, strict=True)]
        edited = [
            new is not old
            or (not torch.equal(old, was) if isinstance(was, Tensor) else old._version != was)
            for new, old, was in zip(after, values, before, strict=True)
        ]
        return after, edited, any(backward)


@contextmanager
def _set(modules: Sequence[nn.Module], flag: str, value: bool) -> Iterator[None]:
    """A block in which a flag of some modules has another value."""
    for module in modules:
        setattr(module, flag, value)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, flag, not value)


def _temporary_hooks(module: nn.Module) -> Iterator[tuple[Any, list[int]]]:
    """The hook dictionaries of a hook point, each with the numbers of its temporary hooks."""
    for handles, hooks in (("fwd_hooks", "_forward_hooks"), ("bwd_hooks", "_backward_hooks")):
        temporary = [h.hook.id for h in getattr(module, handles, ()) if not h.is_permanent]
        if temporary:
            yield getattr(module, hooks), temporary
