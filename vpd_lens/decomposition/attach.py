"""Attach a decomposition to a model, and take it off again.

Nothing of the model is replaced: hook points are added under each site, PyTorch hooks are
registered, and the instance's `forward` and `generate` are wrapped so that masks which depend on
the input can be computed first. `remove` undoes all of it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.decomposition.divergence import CustomDivergence, DivergenceKind
from vpd_lens.decomposition.forward import Forwards
from vpd_lens.decomposition.handle import Decomposition
from vpd_lens.decomposition.subcomponents import CountSpec, resolve_counts
from vpd_lens.errors import AttachError, ConfigError
from vpd_lens.sites import find_sites, model_kind, self_check
from vpd_lens.sites.discovery import SiteSelection, attends_both_ways

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    sites: SiteSelection = "all",
    n_subcomponents: CountSpec = "paper",
    importance: CausalImportanceConfig | None = None,
    example: Tensor | None = None,
    divergence: DivergenceKind | CustomDivergence | None = None,
    seed: int = 0,
    check: bool = True,
) -> Model:
    """Attach an untrained decomposition; see `vpd_lens.decompose`."""
    _require_attachable(model)
    importance = importance or CausalImportanceConfig()
    if importance.kind == "transformer" and importance.causal and attends_both_ways(model):
        raise ConfigError(
            "importance.causal=True keeps importances from looking at later positions, but this "
            f"{type(model).__name__} is an encoder, whose own attention does; set "
            "importance.causal=False."
        )
    chosen = find_sites(model, sites)
    weight = chosen[0].weight
    devices = {site.weight.device for site in chosen}
    if len(devices) > 1:
        raise AttachError(
            f"the weights to decompose are on several devices ({sorted(map(str, devices))}). Load "
            "the model on one (no device_map, n_devices=1), or choose sites that share one."
        )
    if check:
        half = weight.dtype in (torch.float16, torch.bfloat16)
        self_check(model, chosen, _tiny_forward(model, example), 5e-2 if half else 1e-4)
    counts = resolve_counts(chosen, n_subcomponents)
    divergence = divergence or ("mse" if model_kind(model) == "module" else "kl")
    with torch.inference_mode(False):
        vpd = Decomposition(model, chosen, counts, importance, divergence, seed)
        vpd.__dict__["attachment"] = Attachment(vpd.to(weight.device))
    return model


def decomposition_of(model: nn.Module) -> Decomposition:
    """The decomposition that a model carries; an `AttachError` if it carries none."""
    if "vpd" not in model.__dict__:
        raise AttachError(
            "This model carries no decomposition. Call vpd_lens.decompose or vpd_lens.load first."
        )
    return model.__dict__["vpd"]  # type: ignore[no-any-return]


def remove(model: Model) -> Model:
    """Take a decomposition off and restore the model completely, as it was before `decompose`.

    Raises:
        AttachError: If the model carries no decomposition.
    """
    decomposition_of(model).attachment.detach()
    return model


@contextmanager
def removed_if_untrained(model: nn.Module) -> Iterator[None]:
    """Take the decomposition off again if the block fails before any training step."""
    try:
        yield
    except BaseException:
        if "vpd" in model.__dict__ and model.__dict__["vpd"].trained_steps == 0:
            remove(model)
        raise


def _require_attachable(model: nn.Module) -> None:
    if "vpd" in model.__dict__:
        raise AttachError(
            "This model is decomposed already. Call vpd_lens.remove(model) first, or use the "
            "decomposition it carries, model.vpd."
        )
    if hasattr(model, "_orig_mod"):
        raise AttachError(
            "This model is compiled (torch.compile), and its hooks would be compiled away. "
            "Decompose the model itself and compile it afterwards."
        )
    version = importlib.metadata.version("transformers")
    if model_kind(model) == "bridge" and tuple(map(int, version.split(".")[:2])) >= (5, 24):
        raise AttachError(
            f"transformers {version} renamed attention's past_key_values, so that a "
            "TransformerBridge generates with an empty key-value cache and wrong text, decomposed "
            'or not. Install an older one: pip install "transformers<5.24".'
        )


def _tiny_forward(model: nn.Module, example: Tensor | None) -> Callable[[], Any]:
    if example is not None:
        return lambda: model(example)
    cfg = getattr(model, "cfg", None)
    if model_kind(model) == "module" or cfg is None:
        raise AttachError(
            "For a model that is neither a HookedTransformer nor a TransformerBridge, pass "
            "example=<one input batch>, so that the sites can be checked."
        )
    device = next(model.parameters()).device
    length = min(4, int(cfg.n_ctx))
    tokens = torch.arange(2 * length, device=device).reshape(2, length) % int(cfg.d_vocab)
    return lambda: model(tokens)


class Attachment:
    """The reversible changes that a decomposition makes to its model, made when it is created."""

    def __init__(self, vpd: Decomposition) -> None:
        self.model = model = vpd.model
        self.handles: list[RemovableHandle] = []
        self.mounted: list[tuple[nn.Module, str]] = []
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        # The model's own entry points, in whose place are the decomposition's.
        self.original = {n: getattr(model, n) for n in _ENTRIES if hasattr(type(model), n)}
        self.previous = {name: model.__dict__[name] for name in _ENTRIES if name in model.__dict__}
        forwards = vpd.forwards
        forwards.original = self.original["forward"]
        model.requires_grad_(False)
        pre_hooks: list[tuple[nn.Module, Callable]] = []
        for i, site in enumerate(vpd.sites):
            self._mount(site.name, site.hooks)
            self.handles += site.attach(partial(forwards.read, i), partial(forwards.edit, i))
            if site.results is not None:
                pre_hooks.append((site.results, partial(forwards.edit_heads, i)))
        if model_kind(model) != "module":
            if (unembed := model._modules.get("unembed")) is not None:
                forwards.ends = True
                pre_hooks.append((unembed, forwards.note_end))
            watched = partial(_require_grad_if_watched, model, forwards)
            pre_hooks += [(point, watched) for point in _embedding_points(model)]
        self.handles += [module.register_forward_pre_hook(hook) for module, hook in pre_hooks]
        model.__dict__.update({name: getattr(vpd, f"_{name}") for name in self.original})
        model.__dict__["vpd"] = vpd
        _refresh_hook_names(model)

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
        _refresh_hook_names(self.model)

    def _mount(self, path: str, hooks: nn.Module) -> None:
        # In the mode of what they are mounted on: TransformerLens 4.3 patches no model of which any
        # module is in training mode.
        parent: Any = self.model
        for part in path.split("."):
            if part not in parent._modules:
                nn.Module.add_module(parent, part, nn.Module().train(parent.training))
                self.mounted.append((parent, part))
            parent = parent._modules[part]
        nn.Module.add_module(parent, "vpd", hooks.train(parent.training))
        self.mounted.append((parent, "vpd"))


# What a user calls on a model, and a decomposition has a method of its own for.
_ENTRIES = (
    "forward", "generate", "generate_stream", "run_with_cache", "run_with_hooks", "hooks",
)  # fmt: skip


def _embedding_points(model: nn.Module) -> list[nn.Module]:
    """The hook points through which token and position embeddings enter the residual stream."""
    points = [model._modules.get(name) for name in ("hook_embed", "hook_pos_embed")]
    components = [model._modules.get(name) for name in ("embed", "pos_embed")]
    points += [c._modules.get("hook_out") for c in components if c is not None]
    return [point for point in points if point is not None]


def _require_grad_if_watched(model: nn.Module, forwards: Forwards, _m: Any, args: tuple) -> None:
    """Let gradients begin at the embeddings, as all weights are frozen, if a hook waits for one."""
    x = args[0]
    if forwards.state.undisturbed or not torch.is_grad_enabled() or x.requires_grad:
        return
    if any(getattr(m, "bwd_hooks", None) for m in model.modules()):
        x.requires_grad_()


def _refresh_hook_names(model: Any) -> None:
    """Let the model notice hook points that were added or removed."""
    if model_kind(model) == "bridge":
        model.clear_hook_registry()
        model._initialize_hook_registry()
    elif hasattr(model, "setup") and hasattr(model, "hook_dict"):
        model.setup()
