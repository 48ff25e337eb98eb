"""Mount a decomposition on a model and take it off again.

Nothing of the model is replaced: hook points are added under each site, PyTorch hooks are
registered, and the instance's `forward` and `generate` are wrapped so that masks which depend on
the input can be computed first. `detach` undoes all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vpd_lens.decomposition.forward import Forwards
from vpd_lens.sites import Site, model_kind


class Attachment:
    """The reversible changes that a decomposition makes to its model.

    Args:
        model: The model.
        sites: Its sites.
        forwards: What the sites' hooks call.
        wrapped: What takes the place of `forward`, `generate`, ..., by name.
        handle: Stored as `model.vpd`.

    Attributes:
        original: The model's own entry points, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        forwards: Forwards,
        wrapped: dict[str, Callable[..., Any]],
        handle: nn.Module,
    ) -> None:
        self.model = model
        self.handles: list[RemovableHandle] = []
        self.mounted: list[tuple[nn.Module, str]] = []
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        owned = [name for name in wrapped if hasattr(type(model), name)]
        self.original = {name: getattr(model, name) for name in owned}
        self.previous = {name: model.__dict__[name] for name in wrapped if name in model.__dict__}
        forwards.original = self.original["forward"]
        model.requires_grad_(False)
        for index, site in enumerate(sites):
            self._mount(site.mount, site.hooks)
            self.handles += site.attach(
                partial(forwards.read, index), partial(forwards.edit, index)
            )
            if site.results is not None:
                edit_heads = partial(forwards.edit_heads, index)
                self.handles.append(site.results.register_forward_pre_hook(edit_heads))
        if model_kind(model) != "module":
            self.handles += self._hook_ends(forwards)
        model.__dict__.update({name: wrapped[name] for name in self.original})
        model.__dict__["vpd"] = handle
        refresh_hook_names(model)

    def detach(self) -> None:
        """Restore the model completely."""
        for handle in self.handles:
            handle.remove()
        for parent, name in reversed(self.mounted):
            del parent._modules[name]
        for name in self.original:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self.previous)
        for parameter in self.trainable:
            parameter.requires_grad_()
        del self.model.__dict__["vpd"]
        refresh_hook_names(self.model)

    def _hook_ends(self, forwards: Forwards) -> list[RemovableHandle]:
        """Hooks at the beginning of the residual stream and before the unembedding."""
        handles = []
        unembed = self.model._modules.get("unembed")
        if unembed is not None:
            forwards.ends = True
            handles.append(unembed.register_forward_pre_hook(forwards.note_end))
        for point in _embedding_points(self.model):
            watched = partial(_require_grad_if_watched, self.model, forwards)
            handles.append(point.register_forward_pre_hook(watched))
        return handles

    def _mount(self, path: str, hooks: nn.Module) -> None:
        parent = self.model
        for part in path.split("."):
            if part not in parent._modules:
                nn.Module.add_module(parent, part, nn.Module())
                self.mounted.append((parent, part))
            child = parent._modules[part]
            assert child is not None
            parent = child
        nn.Module.add_module(parent, "vpd", hooks)
        self.mounted.append((parent, "vpd"))


def _embedding_points(model: nn.Module) -> list[nn.Module]:
    """The hook points through which token and position embeddings enter the residual stream."""
    points = [model._modules.get(name) for name in ("hook_embed", "hook_pos_embed")]
    for name in ("embed", "pos_embed"):
        component = model._modules.get(name)
        if component is not None:
            points.append(component._modules.get("hook_out"))
    return [point for point in points if point is not None]


def _require_grad_if_watched(
    model: nn.Module, forwards: Forwards, _module: nn.Module, args: tuple
) -> None:
    """Let gradients begin at the embeddings, if a hook waits for one.

    The weights are frozen while a decomposition is attached, so nothing before the first masked
    site would have a gradient otherwise.
    """
    x = args[0]
    if forwards.state.undisturbed or not torch.is_grad_enabled() or x.requires_grad:
        return
    if any(getattr(m, "bwd_hooks", None) for m in model.modules()):
        x.requires_grad_()


def refresh_hook_names(model: nn.Module) -> None:
    """Let the model notice hook points that were added or removed."""
    kind = model_kind(model)
    if kind == "bridge":
        model.clear_hook_registry()
        model._initialize_hook_registry()
    elif hasattr(model, "setup") and hasattr(model, "hook_dict"):
        model.setup()
