"""Mount a decomposition on a model and take it off again.

Nothing of the model is replaced: hook points are added under each site, PyTorch hooks are
registered, and the instance's `forward` and `generate` are wrapped so that masks which depend on
the input can be computed first. `detach` undoes all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vpd_lens.sites import model_kind

if TYPE_CHECKING:
    from vpd_lens.decomposition.handle import Decomposition

_WRAPPED = ("forward", "generate", "generate_stream")


class Attachment:
    """The reversible changes that a decomposition makes to its model.

    Args:
        decomposition: The decomposition to mount.
    """

    def __init__(self, decomposition: Decomposition) -> None:
        self.decomposition = decomposition
        self.model: nn.Module = decomposition.model
        # Called last in a whole forward; `None` in models that always run to their end.
        self.end: nn.Module | None = None
        if model_kind(self.model) != "module":
            self.end = self.model._modules.get("unembed")
        self.trainable: list[nn.Parameter] = []
        self.handles: list[RemovableHandle] = []
        self.mounted: list[tuple[nn.Module, str]] = []
        self.previous: dict[str, Any] = {}
        self.original: dict[str, Callable[..., Any]] = {}

    def attach(self) -> None:
        """Freeze the weights, mount the hook points, register the hooks, wrap the entry points."""
        vpd = self.decomposition
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        for index, site in enumerate(vpd.sites):
            self._mount(site.mount, site.hooks)
            self.handles += site.attach(partial(vpd._read, index), partial(vpd._edit, index))
        if self.end is not None:
            self.handles.append(self.end.register_forward_pre_hook(vpd._note_end))
        for name in _WRAPPED:
            if hasattr(type(self.model), name):
                self.original[name] = getattr(self.model, name)
                if name in self.model.__dict__:
                    self.previous[name] = self.model.__dict__[name]
        self.model.__dict__["forward"] = vpd._forward
        if "generate" in self.original:
            self.model.__dict__["generate"] = vpd._generate
        if "generate_stream" in self.original:
            self.model.__dict__["generate_stream"] = vpd._generate_stream
        self.model.__dict__["vpd"] = vpd
        refresh_hook_names(self.model)

    def detach(self) -> None:
        """Restore the model completely."""
        for handle in self.handles:
            handle.remove()
        for parent, name in reversed(self.mounted):
            del parent._modules[name]
        for name in _WRAPPED:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self.previous)
        for parameter in self.trainable:
            parameter.requires_grad_()
        del self.model.__dict__["vpd"]
        refresh_hook_names(self.model)

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


def refresh_hook_names(model: nn.Module) -> None:
    """Let the model notice hook points that were added or removed."""
    kind = model_kind(model)
    if kind == "bridge":
        model.clear_hook_registry()
        model._initialize_hook_registry()
    elif hasattr(model, "setup") and hasattr(model, "hook_dict"):
        model.setup()


@contextmanager
def without_user_hooks(model: nn.Module) -> Iterator[None]:
    """Silence every temporary TransformerLens hook on `model`, then restore them in order.

    Permanent hooks stay: they are part of the model.
    """
    from transformer_lens.hook_points import HookPoint

    saved: list[tuple[nn.Module, list[tuple[int, Any]]]] = []
    for module in model.modules():
        if isinstance(module, HookPoint) and module.fwd_hooks:
            saved.append((module, list(module._forward_hooks.items())))
            for lens_handle in module.fwd_hooks:
                if not lens_handle.is_permanent:
                    module._forward_hooks.pop(lens_handle.hook.id, None)
    try:
        yield
    finally:
        for hook_point, items in saved:
            hook_point._forward_hooks.clear()
            hook_point._forward_hooks.update(items)
