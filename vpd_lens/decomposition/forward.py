"""Forwards under masks: what every site's hooks do while the model runs.

1. `Forwards.run` begins a `Pass`, which holds everything about one forward of the model.
2. Each site calls `read` with its input and `edit` with its output; both look at the pass.
3. Without masks and without listeners `edit` returns at once, and the output is the model's own.

All that changes from forward to forward is kept per thread: masks in one thread do not reach a
forward in another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from vpd_lens.decomposition.masks import (
    AnyMasks,
    Layout,
    SiteMasks,
    SourceMasks,
    edited_site,
    masked_site,
)
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


@dataclass
class Pass:
    """One forward of the model, as the hooks of its sites see it.

    Attributes:
        inputs: Input of every site, `[*batch, d_in]`, from when it is seen until it is used.
        masks: Masks of every site; `None` for the target model.
        frozen: Whether V and U are constants, which get no gradient.
        outputs: Output of every site as written, `[*batch, d_out]`, if they are recorded.
        edited: Which sites have been masked so far.
        by_head: Sites whose masks were applied to the result of every head.
        finished: Whether the forward has reached the model's end.
        own: Whether it runs through the decomposition; `False` for whatever else calls the model.
    """

    inputs: list[Tensor | None]
    masks: list[SiteMasks] | None = None
    frozen: bool = False
    outputs: list[Tensor | None] | None = None
    edited: list[bool] = field(default_factory=list)
    by_head: set[int] = field(default_factory=set)
    finished: bool = False
    own: bool = True


@dataclass
class _State:
    """What one thread does with one decomposition."""

    idle: Pass
    contexts: list[MaskContext] = field(default_factory=list)
    current: Pass | None = None
    generation: Any = None
    frozen: bool = False
    undisturbed: bool = False


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.states: WeakKeyDictionary[Forwards, _State] = WeakKeyDictionary()


_HERE = _PerThread()


class Forwards:
    """Runs a model under masks, through the hooks that its sites have on it.

    Args:
        model: The base model.
        sites: Its decomposed matrices, in forward order.
        subcomponents: Their `V` and `U`.

    Attributes:
        original: The model's own `forward`, which attaching wraps.
        ends: Whether a hook tells when the model's end is reached.
    """

    def __init__(self, model: nn.Module, sites: list[Site], subcomponents: Subcomponents) -> None:
        self.model = model
        self.sites = sites
        self.subcomponents = subcomponents
        self.original: Callable[..., Any] = model.forward
        self.ends = False

    @property
    def state(self) -> _State:
        """What this thread does with the decomposition."""
        state = _HERE.states.get(self)
        if state is None:
            state = _State(Pass([None] * len(self.sites), own=False))
            _HERE.states[self] = state
        return state

    @property
    def layout(self) -> Layout:
        """Names and sizes of the sites."""
        return self.subcomponents.layout

    # ---------------------------------------------------------------- running

    def run(
        self, masks: AnyMasks | None, args: tuple, kwargs: Mapping[str, Any], record: bool = False
    ) -> tuple[Any, Pass]:
        """One forward of the model under fixed masks, and its pass.

        Args:
            masks: The masks, broadcast over leading dimensions of size 1; `None`: the target.
            args: Passed to the model.
            kwargs: Passed to the model.
            record: Keep every site's output.

        Raises:
            InputError: If the masks do not fit the input's batch and positions.
            VPDError: If the forward pass went around a masked matrix.
        """
        n, state = len(self.sites), self.state
        current = Pass([None] * n, frozen=state.frozen, finished=not self.ends)
        if masks is not None:
            masks = masks.computed() if isinstance(masks, SourceMasks) else masks
            current.masks, current.edited = masks.per_site(self.layout), [False] * n
        if record:
            current.outputs = [None] * n
        with self.within(current), self._keeping_activations():
            output = self.original(*args, **kwargs)
        if masks is not None:
            self._require_all_edited(current, kwargs)
        return output, current

    @contextmanager
    def within(self, current: Pass) -> Iterator[None]:
        """Let the hooks of this thread see a pass."""
        state = self.state
        before, state.current = state.current, current
        try:
            yield
        finally:
            state.current = before

    @contextmanager
    def undisturbed(self, again: bool = False) -> Iterator[None]:
        """Forwards inside are in evaluation mode, without the temporary hooks of a user.

        Permanent hooks stay, being part of the model, and so do hooks added inside. Afterwards
        everything is as before, in the same order.

        Args:
            again: Inside another such block, silence the hooks that were added there, too.
        """
        state = self.state
        if state.undisturbed and not again:
            yield
            return
        modules = self._modules()
        training = [module for module in modules if module.training]
        silenced = [entry for module in modules for entry in _temporary_hooks(module)]
        for module in training:
            module.training = False
        before = [(hooks, list(hooks.items())) for hooks, _ in silenced]
        for hooks, numbers in silenced:
            for number in numbers:
                hooks.pop(number, None)
        inside, state.undisturbed = state.undisturbed, True
        try:
            yield
        finally:
            state.undisturbed = inside
            for hooks, items in before:
                hooks.clear()
                hooks.update(items)
            for module in training:
                module.training = True

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Forwards inside record no gradient for `V` and `U`."""
        state = self.state
        before, state.frozen = state.frozen, True
        try:
            yield
        finally:
            state.frozen = before

    def _modules(self) -> list[nn.Module]:
        """All modules of the model; a bridge does not register all those of the one it wraps."""
        wrapped = getattr(self.model, "original_model", None)
        inner = wrapped.modules() if isinstance(wrapped, nn.Module) else ()
        return list(dict.fromkeys([*self.model.modules(), *inner]))

    @contextmanager
    def _keeping_activations(self) -> Iterator[None]:
        """Switch off Hugging Face's gradient checkpointing, whose repetitions know no masks."""
        state = self.state
        if state.undisturbed or not torch.is_grad_enabled():  # then nothing is recomputed
            yield
            return
        recomputing = [
            m for m in self._modules() if m.training and m.__dict__.get("gradient_checkpointing")
        ]
        for module in recomputing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in recomputing:
                module.gradient_checkpointing = True  # type: ignore[assignment]

    def _require_all_edited(self, current: Pass, kwargs: Mapping[str, Any]) -> None:
        """A flag switched on after attaching may bypass a matrix; its masks would do nothing."""
        reached = [index for index, done in enumerate(current.edited) if done] or [0]
        # A run may start or stop at a layer; between its ends no site may be missing.
        start = 0 if kwargs.get("start_at_layer") is None else reached[0]
        stop = len(current.edited) if current.finished else reached[-1]
        missed = [self.layout.names[i] for i in range(start, stop) if not current.edited[i]]
        if missed:
            raise VPDError(
                f"masks are active, but the forward pass went around {missed}. {FLAGS_HINT}"
            )

    # ------------------------------------------------------- what hooks call

    def read(self, index: int, x: Tensor) -> None:
        """See the input of a site."""
        state = self.state
        (state.current or state.idle).inputs[index] = x

    def edit(self, index: int, y: Tensor) -> Tensor | None:
        """The new output of a site, or `None` where it stays what the model computed."""
        state = self.state
        current = state.current
        if current is None:
            self._refuse_unseen_masks(state.contexts)
            current = state.idle
        edited = self._new_output(current, index, y)
        if current.outputs is not None:
            current.outputs[index] = y if edited is None else edited
        if current.masks is not None or not current.own:
            current.inputs[index] = None
        return edited

    def edit_heads(self, index: int, _module: nn.Module, args: tuple) -> tuple[Tensor] | None:
        """The results of a site's heads under masks, `[*batch, head, d_out]`.

        HookedTransformer computes them with `use_attn_result` on, and adds them up itself. Head h
        writes `m_delta z_h W_h + ((m - m_delta) * (z_h V_h)) U`.
        """
        current = self.state.current
        if current is None or current.masks is None:
            return None
        (results,) = args
        z = current.inputs[index]
        assert z is not None
        v, u = (part.to(z.dtype) for part in self._directions(current, index))
        v = rearrange(v, "(head d) c -> head d c", head=results.shape[-2])
        z = rearrange(z, "... (head d) -> ... head d", head=results.shape[-2])
        acts = einsum(z, v, "... head d, head d c -> ... head c")
        seen = self._shown(index, acts.sum(-2), current.masks[index])
        if seen.acts_edited:
            raise VPDError(
                f"hook_acts of {self.layout.names[index]} was edited, which says nothing of single "
                "heads. Call model.set_use_attn_result(False), or edit hook_mask."
            )
        mask, delta = (t.to(z.dtype).unsqueeze(-2) for t in (seen.mask, seen.delta))
        current.by_head.add(index)
        return (delta * results + ((mask - delta) * acts) @ u,)

    def note_end(self, _module: nn.Module, _args: tuple) -> None:
        """See that the forward has reached the model's end."""
        if (current := self.state.current) is not None:
            current.finished = True

    def _refuse_unseen_masks(self, contexts: Sequence[MaskContext]) -> None:
        if contexts and contexts[-1].mode != "target":
            raise VPDError(
                "masks are active, but the model runs without passing through model.forward "
                "(hf_generate, a submodule called by hand). Call the model itself, or leave "
                "the masked(...) block."
            )

    def _new_output(self, current: Pass, index: int, y: Tensor) -> Tensor | None:
        hooks = self.sites[index].hooks
        if current.masks is None:
            if not hooks.masks_are_watched():
                return hooks.hook_out(y) if has_listeners(hooks.hook_out) else None
            return hooks.hook_out(self._watched(current, index, y, None))  # type: ignore[no-any-return]
        masks = current.masks[index]
        current.edited[index] = True
        if index in current.by_head:
            return hooks.hook_out(y)  # type: ignore[no-any-return]
        self._require_fit(index, masks, y)
        if hooks.masks_are_watched():
            y = self._watched(current, index, y, masks)
        else:
            v, u = self._directions(current, index)
            x = self._input_of(current, index, y)
            y = masked_site(x, y, v, u, masks, self.sites[index].bias)
        return hooks.hook_out(y)  # type: ignore[no-any-return]

    def _input_of(self, current: Pass, index: int, y: Tensor) -> Tensor:
        x = current.inputs[index]
        if x is None or x.shape[:-1] != y.shape[:-1]:
            raise VPDError(
                f"the output of {self.layout.names[index]} was computed from something other than "
                f"one input per position. {FLAGS_HINT}"
            )
        return x

    def _require_fit(self, index: int, masks: SiteMasks, y: Tensor) -> None:
        batch = y.shape[:-1]
        for mask in (masks.components, masks.delta):
            given = mask.shape[:-1]
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

    def _watched(self, current: Pass, index: int, y: Tensor, masks: SiteMasks | None) -> Tensor:
        """The site's output when someone listens to its activations or masks."""
        hooks = self.sites[index].hooks
        v, u = self._directions(current, index)
        x = self._input_of(current, index, y)
        acts = x.to(y.dtype) @ v.to(y.dtype)
        shown = self._shown(index, acts, masks)
        points = (hooks.hook_acts, hooks.hook_mask, hooks.hook_delta_mask)
        backward = torch.is_grad_enabled() and any(point._backward_hooks for point in points)
        # The untouched path: hooks that only look leave the model's own output in place.
        if masks is None and not shown.edited and not backward:
            return y
        clean = x.to(y.dtype) @ v.to(y.dtype) if shown.acts_overwritten else acts
        bias = self.sites[index].bias
        return edited_site(y, u, clean, shown.acts, shown.mask, shown.delta, bias)

    def _shown(self, index: int, acts: Tensor, masks: SiteMasks | None) -> _Shown:
        """Activations and masks after the hooks of a site have seen them."""
        hooks = self.sites[index].hooks
        batch = acts.shape[:-1]
        if masks is None:
            mask, delta = acts.new_ones(acts.shape), acts.new_ones(*batch, 1)
        else:
            # Copies, because a hook may write to them in place.
            mask = masks.components.expand(acts.shape).clone()
            delta = masks.delta.expand(*batch, 1).clone()
            if masks.routed is not None:
                mask = torch.where(masks.routed, mask, 1)
                delta = torch.where(masks.routed, delta, 1)
        for hook, leaf in ((hooks.hook_mask, mask), (hooks.hook_delta_mask, delta)):
            if hook._backward_hooks and torch.is_grad_enabled() and not leaf.requires_grad:
                leaf.requires_grad_()
        before = [_Snapshot(t) for t in (acts, mask, delta)]
        after = hooks.hook_acts(acts), hooks.hook_mask(mask), hooks.hook_delta_mask(delta)
        overwritten = [snapshot.changed() for snapshot in before]
        replaced = [new is not old for new, old in zip(after, (acts, mask, delta), strict=True)]
        return _Shown(
            *after, overwritten[0], overwritten[0] or replaced[0], any(overwritten + replaced)
        )


class _Shown(NamedTuple):
    """What the hooks of a site made of its activations and masks.

    Attributes:
        acts: Activations `[*batch, C]`.
        mask: Masks of the subcomponents `[*batch, C]`.
        delta: The delta's mask `[*batch, 1]`.
        acts_overwritten: Whether a hook wrote into the activations that it was given.
        acts_edited: Whether it did so, or returned others.
        edited: Whether any of the three is another one.
    """

    acts: Tensor
    mask: Tensor
    delta: Tensor
    acts_overwritten: bool
    acts_edited: bool
    edited: bool


class _Snapshot:
    """Notices edits of a tensor in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        # Inference tensors (HookedTransformer.generate) count no versions.
        self.version = tensor.clone() if tensor.is_inference() else tensor._version

    def changed(self) -> bool:
        if isinstance(self.version, Tensor):
            return not torch.equal(self.version, self.tensor)
        return self.version != self.tensor._version


def _temporary_hooks(module: nn.Module) -> Iterator[tuple[Any, list[int]]]:
    """The hook dictionaries of a hook point, each with the numbers of its temporary hooks."""
    for handles, hooks in (("fwd_hooks", "_forward_hooks"), ("bwd_hooks", "_backward_hooks")):
        temporary = [h.hook.id for h in getattr(module, handles, ()) if not h.is_permanent]
        if temporary:
            yield getattr(module, hooks), temporary
