"""Forwards under masks: what every site's hooks do while the model runs.

Each site calls `_read` with its input and `_edit` with its output. Without masks and without
listeners `_edit` returns at once and the output is the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens.decomposition.attachment import Attachment
from vpd_lens.decomposition.masked_site import edited_site, masked_site
from vpd_lens.decomposition.masks import AnyMasks, Layout, SiteMasks, SourceMasks
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


class MaskedForwards(nn.Module):
    """The part of a `Decomposition` that runs its model under given masks.

    Args:
        model: The base model.
        sites: Its decomposed matrices, in forward order.
        subcomponents: Their `V` and `U`.
    """

    # Kept in __dict__: registered, they would put the base model's weights into this module.
    model: nn.Module
    sites: list[Site]
    attachment: Attachment

    def __init__(self, model: nn.Module, sites: list[Site], subcomponents: Subcomponents) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.__dict__["sites"] = sites
        self.subcomponents = subcomponents
        self._contexts: list[MaskContext] = []
        self._running = False
        self._frozen = False
        self._finished = False
        self._masks: list[SiteMasks] | None = None
        self._edited = [False] * len(sites)
        self._inputs: list[Tensor | None] = [None] * len(sites)
        self._outputs: list[Tensor | None] | None = None

    @property
    def layout(self) -> Layout:
        """Names and sizes of the sites."""
        return self.subcomponents.layout

    def run(self, masks: AnyMasks | None, *args: Any, **kwargs: Any) -> Any:
        """One forward of the model under fixed masks (`None`: the target model itself).

        Args:
            masks: The masks; broadcast over leading dimensions of size 1.
            *args: Passed to the model.
            **kwargs: Passed to the model.

        Raises:
            InputError: If the masks do not fit the input's batch and positions.
            VPDError: If the forward pass went around a masked matrix.
        """
        before = self._running, self._masks
        self._running, self._masks = True, None
        if isinstance(masks, SourceMasks):
            masks = masks.computed()
        if masks is not None:
            self._masks = masks.per_site(self.layout)
            self._edited = [False] * len(self.sites)
            self._finished = self.attachment.end is None
            self._inputs = [None] * len(self.sites)
        try:
            output = self.attachment.original["forward"](*args, **kwargs)
        finally:
            self._running, self._masks = before
        if masks is not None:
            self._require_all_edited(kwargs)
        return output

    def _require_all_edited(self, kwargs: Mapping[str, Any]) -> None:
        """A flag switched on after attaching may bypass a matrix; its masks would do nothing."""
        reached = [index for index, done in enumerate(self._edited) if done] or [0]
        # A run may start or stop at a layer; between its ends no site may be missing.
        start = 0 if kwargs.get("start_at_layer") is None else reached[0]
        stop = len(self._edited) if self._finished else reached[-1]
        missed = [self.layout.names[i] for i in range(start, stop) if not self._edited[i]]
        if missed:
            raise VPDError(
                f"masks are active, but the forward pass went around {missed}. {FLAGS_HINT}"
            )

    @torch.no_grad()
    def run_recording(self, masks: AnyMasks | None, *args: Any) -> tuple[Any, list[Tensor]]:
        """Like `run`, without gradients, and with every site's output as written.

        Args:
            masks: The masks, or `None` for the target model.
            *args: Passed to the model.
        """
        outputs: list[Tensor | None] = [None] * len(self.sites)
        self._outputs = outputs
        try:
            output = self.run(masks, *args)
            return output, [y for y in outputs if y is not None]
        finally:
            self._outputs = None

    # ------------------------------------------------------- what hooks call

    def _read(self, index: int, x: Tensor) -> None:
        self._inputs[index] = x

    def _edit(self, index: int, y: Tensor) -> Tensor | None:
        edited = self._new_output(index, y)
        if self._outputs is not None:
            self._outputs[index] = y if edited is None else edited
        return edited

    def _new_output(self, index: int, y: Tensor) -> Tensor | None:
        hooks = self.sites[index].hooks
        if self._masks is None:
            if self._contexts and self._contexts[-1].mode != "target" and not self._running:
                raise VPDError(
                    "masks are active, but the model runs without passing through model.forward "
                    "(hf_generate, a submodule called by hand). Call the model itself, or leave "
                    "the masked(...) block."
                )
            if not hooks.masks_are_watched():
                return hooks.hook_out(y) if has_listeners(hooks.hook_out) else None
            return hooks.hook_out(self._watched(index, y, None))  # type: ignore[no-any-return]
        masks = self._masks[index]
        self._edited[index] = True
        self._require_fit(index, masks, y)
        if hooks.masks_are_watched():
            y = self._watched(index, y, masks)
        else:
            v, u = self._directions(index)
            x = self._input_of(index, y)
            y = masked_site(x, y, v, u, masks, self.sites[index].bias)
        self._inputs[index] = None
        return hooks.hook_out(y)  # type: ignore[no-any-return]

    def _input_of(self, index: int, y: Tensor) -> Tensor:
        x = self._inputs[index]
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

    def _note_end(self, _module: nn.Module, _args: tuple) -> None:
        self._finished = True

    def _directions(self, index: int) -> tuple[Tensor, Tensor]:
        v, u = self.subcomponents.v[index], self.subcomponents.u[index]
        return (v.detach(), u.detach()) if self._frozen else (v, u)

    @contextmanager
    def frozen_subcomponents(self) -> Iterator[None]:
        """Forwards inside record no gradient for `V` and `U` (the adversary's inner steps)."""
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    def _watched(self, index: int, y: Tensor, masks: SiteMasks | None) -> Tensor:
        """The site's output when someone listens to its activations or masks."""
        hooks = self.sites[index].hooks
        v, u = self._directions(index)
        x = self._input_of(index, y)
        acts = x.to(y.dtype) @ v.to(y.dtype)
        batch = acts.shape[:-1]
        if masks is None:
            mask, delta = acts.new_ones(acts.shape), acts.new_ones(batch)
        else:
            # Copies, because a hook may write to them in place.
            mask = masks.components.expand(acts.shape).clone()
            delta = masks.delta.squeeze(-1).expand(batch).clone()
            if masks.routed is not None:
                mask = torch.where(masks.routed, mask, 1)
                delta = torch.where(masks.routed.squeeze(-1), delta, 1)
        backward = False
        for hook, leaf in ((hooks.hook_mask, mask), (hooks.hook_delta_mask, delta)):
            if hook._backward_hooks and torch.is_grad_enabled() and not leaf.requires_grad:
                leaf.requires_grad_()
            backward |= bool(hook._backward_hooks)
        backward |= bool(hooks.hook_acts._backward_hooks)
        # The untouched path: hooks that only look leave the model's own output in place.
        before = [_Snapshot(t) for t in (acts, mask, delta)]
        new_acts = hooks.hook_acts(acts)
        new_mask = hooks.hook_mask(mask)
        new_delta = hooks.hook_delta_mask(delta)
        same = new_acts is acts and new_mask is mask and new_delta is delta
        same = same and not any(snapshot.changed() for snapshot in before)
        if masks is None and same and not (backward and torch.is_grad_enabled()):
            return y
        clean = x.to(y.dtype) @ v.to(y.dtype) if before[0].changed() else acts
        return edited_site(y, u, clean, new_acts, new_mask, new_delta, self.sites[index].bias)


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
