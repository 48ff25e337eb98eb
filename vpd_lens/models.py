"""`load_model` and `save_model`: base models by name or directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vpd_lens.config import ModelClass, Processing
from vpd_lens.errors import ArtefactError, ConfigError
from vpd_lens.files import existing_directory
from vpd_lens.model_folder import (
    first_line,
    hooked_transformer_class,
    installed_version,
    load_saved,
    save_model,
)

__all__ = ["load_model", "save_model"]


def load_model(
    source: str | Path,
    model_class: ModelClass = "auto",
    device: str = "cpu",
    processing: Processing = "default",
    weights: bool = True,
) -> nn.Module:
    """Load a base model, in evaluation mode.

    | `source` | what happens |
    |---|---|
    | a directory written by `save_model` | that model, bit for bit |
    | a Hugging Face model directory | a TransformerBridge around it |
    | anything else | a name for TransformerLens, which may download it |

    Args:
        source: The directory or name.
        model_class: `"hooked_transformer"` (TransformerLens 3 only), `"bridge"`, or `"auto"`: what
            the directory says, otherwise a bridge.
        device: Where to put it: `"cpu"`, `"cuda"`, `"cuda:N"`, or `"auto"` for CUDA if there is.
        processing: What is done to weights that come from Hugging Face. `"none"`: as they are;
            `"full"`: layer norms folded, weights centred; `"default"`: what TransformerLens does
            for that class (bridge: none, HookedTransformer: full). A directory written by
            `save_model` holds weights as they were and takes only `"default"`.
        weights: False: a Hugging Face model as a bridge comes with fake tensors, for which its
            configuration is enough (to plan a run).

    Returns:
        The model, with its tokenizer if there is one.

    Raises:
        ArtefactError: If a directory is missing, damaged, or holds a class that this
            TransformerLens does not have.
        ConfigError: If a name is unknown or cannot be downloaded, or an argument does not fit.
    """
    _require_one_of("model_class", model_class, ModelClass)
    _require_one_of("processing", processing, Processing)
    device = _usable_device(device)
    path = Path(source).expanduser()
    if _looks_like_a_path(str(source)) or path.is_dir():
        path = existing_directory(path)
        if (path / "model.json").exists():
            return load_saved(path, model_class, device, processing)
        if not (path / "config.json").exists():
            raise ArtefactError(
                f"{path}: neither model.json (written by save_model) nor config.json (a Hugging "
                "Face model) is in this directory. Check the path."
            )
        source = path
    return _load_pretrained(str(source), model_class, device, processing, weights)


# -------------------------------------------------------------- pretrained models


def _load_pretrained(
    source: str, model_class: str, device: str, processing: str, weights: bool
) -> nn.Module:
    load = _pretrained_hooked if model_class == "hooked_transformer" else _pretrained_bridge
    if not weights and load is _pretrained_bridge:
        load = _bridge_without_weights
    try:
        return load(source, device, processing).eval()
    except ArtefactError:
        raise
    except Exception as error:  # whatever transformers, the hub client or TransformerLens raise
        raise ConfigError(
            f"source={source!r}: no such directory here, or not a model that TransformerLens "
            f"{installed_version()} can load ({type(error).__name__}: {first_line(error)}). Check "
            "the spelling, the network and HF_HUB_OFFLINE."
        ) from None


def _pretrained_bridge(source: str, device: str, processing: str) -> nn.Module:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(source, device=device)
    if processing == "full":
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


def _bridge_without_weights(source: str, device: str, processing: str) -> nn.Module:
    from transformer_lens.model_bridge import TransformerBridge

    # Tensors with shapes and no values: fused matrices are split at boot, which "meta" refuses.
    with FakeTensorMode():
        return TransformerBridge.boot_transformers(source, load_weights=False)


def _pretrained_hooked(source: str, device: str, processing: str) -> nn.Module:
    hooked, _ = hooked_transformer_class()
    if processing == "none":
        return hooked.from_pretrained_no_processing(source, device=device)
    return hooked.from_pretrained(source, device=device)


# ------------------------------------------------------------------------- checks


def _require_one_of(argument: str, value: str, choices: Any) -> None:
    if value not in choices.__args__:
        raise ConfigError(f"{argument}={value!r} is not one of {', '.join(choices.__args__)}.")


def _usable_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device={device!r}: {first_line(error)}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={device!r}, but this PyTorch sees no CUDA device. Use device='cpu', or "
            "install a CUDA build of PyTorch."
        )
    return device


def _looks_like_a_path(source: str) -> bool:
    """Hub names are `name` or `owner/name`; anything else can only be a directory."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
