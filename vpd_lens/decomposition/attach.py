"""`decompose` and `remove`: attach a decomposition to a model, and take it off."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.decomposition.attachment import Attachment
from vpd_lens.decomposition.divergence import CustomDivergence, DivergenceKind
from vpd_lens.decomposition.handle import Decomposition
from vpd_lens.decomposition.subcomponents import CountSpec, resolve_counts
from vpd_lens.errors import AttachError
from vpd_lens.sites import Site, find_sites, model_kind, self_check
from vpd_lens.sites.discovery import SiteSelection

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
    chosen = find_sites(model, sites)
    _require_one_device(chosen)
    half = chosen[0].weight.dtype in (torch.float16, torch.bfloat16)
    if check:
        self_check(model, chosen, _tiny_forward(model, example), 5e-2 if half else 1e-4)
    counts = resolve_counts(chosen, n_subcomponents)
    if divergence is None:
        divergence = "mse" if model_kind(model) == "module" else "kl"
    with torch.inference_mode(False):
        vpd = Decomposition(
            model, chosen, counts, importance or CausalImportanceConfig(), divergence, seed
        )
        vpd.to(chosen[0].weight.device)
        mount(vpd)
    return model


def mount(vpd: Decomposition) -> None:
    """Hang a decomposition on its model, which `remove` undoes."""
    wrapped = {
        "forward": vpd._forward,
        "generate": vpd._generate,
        "generate_stream": vpd._generate_stream,
        "run_with_cache": vpd._run_with_cache,
    }
    vpd.__dict__["attachment"] = Attachment(vpd.model, vpd.sites, vpd.forwards, wrapped, vpd)


def decomposition_of(model: nn.Module) -> Decomposition:
    """The decomposition that a model carries.

    Raises:
        AttachError: If it carries none.
    """
    if "vpd" not in model.__dict__:
        raise AttachError(
            "This model carries no decomposition. Call vpd_lens.decompose or vpd_lens.load first."
        )
    return model.__dict__["vpd"]  # type: ignore[no-any-return]


def remove(model: Model) -> Model:
    """Take a decomposition off and restore the model completely.

    Weights that were trainable before are trainable again.

    Args:
        model: A decomposed model.

    Returns:
        The same model, as it was before `decompose`.

    Raises:
        AttachError: If the model carries no decomposition.
    """
    decomposition_of(model).attachment.detach()
    return model


@contextmanager
def removed_if_untrained(model: nn.Module) -> Iterator[None]:
    """Take the decomposition off again if the block fails before any training step.

    So that a corrected call finds the model as it was.
    """
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
    _require_working_cache(model)


def _require_one_device(sites: Sequence[Site]) -> None:
    devices = {site.weight.device for site in sites}
    if len(devices) > 1:
        raise AttachError(
            f"the weights to decompose are on several devices ({sorted(map(str, devices))}). Load "
            "the model on one (no device_map, n_devices=1), or choose sites that share one."
        )


def _require_working_cache(model: nn.Module) -> None:
    """Refuse the releases of transformers under which bridges lose their key-value cache.

    Raises:
        AttachError: If `model` is a bridge and transformers is 5.24 or newer.
    """
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
