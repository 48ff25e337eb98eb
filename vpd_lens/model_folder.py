"""Base models in a directory of their own: the format that `save_model` writes.

| file | content |
|---|---|
| `model.json` | format version, class, TransformerLens version, configuration |
| `model.safetensors` | the state dict |
| tokenizer files | if the model has a tokenizer, as `tokenizer.save_pretrained` writes them |
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vpd_lens.errors import ArtefactError, ConfigError
from vpd_lens.files import (
    FORMAT_VERSION,
    atomic_directory,
    read_json,
    read_tensors,
    write_json,
)
from vpd_lens.sites import model_kind

_FIELDS = {"format_version", "class", "transformer_lens_version", "tokenizer", "cfg"}
_NATIVE = "TransformerLensNative"


def save_model(model: nn.Module, folder: str | Path) -> Path:
    """Write a HookedTransformer or a native TransformerBridge to a directory, whole or not at all.

    A decomposition on the model is left out; save that with `model.vpd.save`.

    Args:
        model: A HookedTransformer, or a bridge made by `TransformerBridge.boot_native`.
        folder: The directory; an earlier one there is replaced once the new one is complete.

    Returns:
        The directory.

    Raises:
        ConfigError: If the model is of another kind, such as a bridge around a Hugging Face
            model, which `transformers` itself can save, or a bridge in compatibility mode.
    """
    kind = model_kind(model)
    if kind == "module" or (kind == "bridge" and model.cfg.architecture != _NATIVE):
        what = getattr(getattr(model, "cfg", None), "architecture", None) or type(model).__name__
        raise ConfigError(
            f"save_model got a {what}; it saves HookedTransformers and bridges made by "
            "TransformerBridge.boot_native. Save a Hugging Face model with its own "
            "save_pretrained and give that directory to load_model; save any other module with "
            "torch.save."
        )
    if kind == "bridge" and getattr(model, "compatibility_mode", False):
        raise ConfigError(
            "save_model got a bridge in compatibility mode, whose processed weights its "
            "configuration does not describe. Save it before enable_compatibility_mode(), and call "
            "that again after loading."
        )
    tokenizer = getattr(model, "tokenizer", None)
    folder = Path(folder)
    with atomic_directory(folder) as new:
        # Clones: buffers such as attention masks share memory, which safetensors refuses.
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        save_file(tensors, new / "model.safetensors")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        write_json(
            new / "model.json",
            {
                "format_version": FORMAT_VERSION,
                "class": kind,
                "transformer_lens_version": importlib.metadata.version("transformer-lens"),
                "tokenizer": tokenizer is not None,
                "cfg": {k: _as_json(k, v) for k, v in vars(model.cfg).items()},
            },
        )
    return folder


def load_saved(path: Path, model_class: str, device: str, processing: str) -> nn.Module:
    """Read what `save_model` wrote; see `vpd_lens.models.load_model`."""
    record = read_json(path / "model.json")
    _require_readable(path, record)
    if processing != "default":
        raise ConfigError(
            f"processing={processing!r}: {path} holds weights as they were when saved. Leave "
            "processing out."
        )
    if model_class not in ("auto", record["class"]):
        raise ConfigError(f"model_class={model_class!r}, but {path} holds a {record['class']}.")
    tensors = read_tensors(path / "model.safetensors")
    build = _build_bridge if record["class"] == "bridge" else _build_hooked_transformer
    tokenizer = _tokenizer(path) if record["tokenizer"] else None
    try:
        with torch.random.fork_rng(devices=[]):  # building draws weights that are then replaced
            model = build(record["cfg"], tokenizer, device)
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtefactError(
            f"{path}: TransformerLens {installed_version()} cannot rebuild this model, saved with "
            f"{record['transformer_lens_version']}: {first_line(error)}"
        ) from None
    return model.eval()


def _require_readable(path: Path, record: dict[str, Any]) -> None:
    version = record.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtefactError(
            f"{path}: format version {version} is newer than this library reads "
            f"({FORMAT_VERSION}). Upgrade vpd-lens."
        )
    known = record.get("class") in ("bridge", "hooked_transformer")
    if set(record) != _FIELDS or not known or not isinstance(record["cfg"], dict):
        raise ArtefactError(
            f"{path / 'model.json'}: expected the fields {sorted(_FIELDS)} as save_model writes "
            f"them, got {sorted(record)}. It was changed, or written by something else."
        )


def _build_bridge(saved: dict[str, Any], tokenizer: Any, device: str) -> nn.Module:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    cfg = TransformerBridgeConfig.from_dict(_without_initialisation(saved, device))
    model = TransformerBridge.boot_native(
        cfg, tokenizer=tokenizer, device=device, dtype=_dtype(saved)
    )
    return _with_saved_cfg(model, saved)


def _build_hooked_transformer(saved: dict[str, Any], tokenizer: Any, device: str) -> nn.Module:
    hooked, config_class = hooked_transformer_class()
    model = hooked(config_class(**_without_initialisation(saved, device)), tokenizer=tokenizer)
    return _with_saved_cfg(model, saved)


def hooked_transformer_class() -> tuple[Any, Any]:
    """`HookedTransformer` and its configuration.

    Raises:
        ArtefactError: If this TransformerLens no longer has them.
    """
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        raise ArtefactError(
            f"A HookedTransformer is asked for, and TransformerLens {installed_version()} no "
            "longer has that class. Install transformer-lens<4, or use model_class='bridge' with "
            "a Hugging Face model."
        ) from None
    return HookedTransformer, HookedTransformerConfig


def _without_initialisation(saved: dict[str, Any], device: str) -> dict[str, Any]:
    """The configuration for building: a seed would reset every global random generator."""
    changes = {"device": device, "dtype": _dtype(saved), "seed": None, "init_weights": False}
    return {**saved, **changes, "tokenizer_name": None}


def _with_saved_cfg(model: nn.Module, saved: dict[str, Any]) -> nn.Module:
    for name in ("seed", "init_weights", "tokenizer_name"):
        setattr(model.cfg, name, saved[name])
    return model


def _dtype(saved: dict[str, Any]) -> torch.dtype:
    dtype = getattr(torch, str(saved["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {saved['dtype']!r}")
    return dtype


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except Exception as error:
        raise ArtefactError(
            f"{path}: its tokenizer cannot be read ({first_line(error)})."
        ) from None


def _as_json(name: str, value: Any) -> Any:
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    try:
        return json.loads(json.dumps(value, default=lambda number: number.item()))
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(
            f"save_model: cfg.{name} is a {type(value).__name__}, which cannot be written as JSON. "
            "Set it to None or to plain numbers and strings first."
        ) from None


def installed_version() -> str:
    """The version of TransformerLens."""
    return importlib.metadata.version("transformer-lens")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
