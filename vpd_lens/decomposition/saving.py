"""Save a decomposition to a directory, and load it onto the model it belongs to.

| file | content |
|---|---|
| `subcomponents.safetensors` | `<site>.V` `[d_in, C]`, `<site>.U` `[C, d_out]`, fp32; where \
subcomponents were folded into the delta, theirs as `<site>.folded_V`, `<site>.folded_U` |
| `causal_importance.safetensors` | parameters of the causal importance function |
| `config.json` | format version, sites, sizes, how it was trained, checksums of the tensors |
| `base_model.json` | versions, model class, dtype, BOS policy, processing, weight hashes |
| `metrics.json` | what was measured, if anything |
| `README.md` | a model card |
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.handle import Decomposition
from vpd_lens.errors import ArtefactError
from vpd_lens.files import (
    FORMAT_VERSION,
    atomic_directory,
    existing_directory,
    file_hash,
    read_json,
    read_tensors,
    weight_hash,
    write_json,
)
from vpd_lens.saved_config import read_config
from vpd_lens.sites import model_kind

Model = TypeVar("Model", bound=nn.Module)

_TENSOR_FILES = ("subcomponents.safetensors", "causal_importance.safetensors")


def save(vpd: Decomposition, path: str | Path, metrics: dict[str, Any] | None = None) -> Path:
    """Write a decomposition to a directory, whole or not at all.

    Args:
        vpd: The decomposition.
        path: The directory; an earlier one there is replaced only once the new one is complete.
        metrics: Anything measured, stored beside it as `metrics.json`.

    Returns:
        The directory.
    """
    path = Path(path)
    with atomic_directory(path) as folder:
        save_file(subcomponent_tensors(vpd), folder / _TENSOR_FILES[0])
        save_file(_contiguous(vpd.importance.state_dict()), folder / _TENSOR_FILES[1])
        write_json(folder / "base_model.json", base_model_record(vpd))
        write_json(folder / "metrics.json", metrics or {})
        (folder / "README.md").write_text(_model_card(vpd))
        write_json(
            folder / "config.json",
            {
                "format_version": FORMAT_VERSION,
                "vpd_lens_version": importlib.metadata.version("vpd-lens"),
                "sites": list(vpd.layout.names),
                "n_subcomponents": list(vpd.layout.sizes),
                "importance": vpd.importance_config.model_dump(mode="json"),
                "divergence": vpd.divergence if isinstance(vpd.divergence, str) else "custom",
                "trained_steps": vpd.trained_steps,
                "training": vpd.training_config,
                "sha256": {name: file_hash(folder / name) for name in _TENSOR_FILES},
                **folded_record(vpd),
            },
        )
    return path


def load(path: str | Path, model: Model, divergence: Any = None) -> Model:
    """Attach a saved decomposition to the model it was made from.

    Args:
        path: The directory that `vpd.save` wrote.
        model: The base model, processed and in the dtype as it was then.
        divergence: The output divergence, needed if a custom one was used in training.

    Returns:
        The same model, with `model.vpd`.

    Raises:
        ArtefactError: If a file is missing, damaged or newer than this library, or a decomposed
            weight of `model` differs; the message names the site. The model is left untouched.
        AttachError: If the model is decomposed already or a site does not exist.
    """
    folder = existing_directory(Path(path))
    config = read_config(folder)
    for name, expected in config["sha256"].items():
        if file_hash(folder / name) != expected:
            raise ArtefactError(
                f"{folder / name}: its content does not match the checksum in config.json; the "
                "file is truncated or was changed. Restore it from a copy."
            )
    if config["divergence"] == "custom" and divergence is None:
        raise ArtefactError(
            "This decomposition was trained with a custom divergence; pass it as divergence=..."
        )
    tensors = read_tensors(folder / _TENSOR_FILES[0])
    importance = read_tensors(folder / _TENSOR_FILES[1])
    base = read_json(folder / "base_model.json")
    counts = dict(zip(config["sites"], config["n_subcomponents"], strict=True))
    attach(
        model,
        sites=config["sites"],
        n_subcomponents=lambda site: counts[site.name],
        importance=CausalImportanceConfig(**config["importance"]),
        divergence=divergence or config["divergence"],
        check=False,
    )
    vpd: Decomposition = model.__dict__["vpd"]
    try:
        check_weights(vpd, base)
        load_subcomponents(vpd, tensors, config)
        vpd.importance.load_state_dict(importance)
    except (ArtefactError, KeyError, RuntimeError) as error:
        vpd.attachment.detach()
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{folder}: its tensors do not fit its config.json: {error}") from None
    vpd.trained_steps = config["trained_steps"]
    vpd.training_config = config["training"]
    return model


def subcomponent_tensors(vpd: Decomposition) -> dict[str, Tensor]:
    """`{<site>.V, <site>.U}` of every site, and `folded_V`, `folded_U` where there are any."""
    parts, tensors = vpd.subcomponents, {}
    for name, v, u, folded in zip(vpd.layout.names, parts.v, parts.u, parts.folded, strict=True):
        tensors[f"{name}.V"] = v
        tensors[f"{name}.U"] = u
        if folded.indices:
            tensors[f"{name}.folded_V"] = folded.v
            tensors[f"{name}.folded_U"] = folded.u
    return _contiguous(tensors)


def folded_record(vpd: Decomposition) -> dict[str, Any]:
    """Original column numbers, by site, of what is there and what was folded; or nothing."""
    parts = vpd.subcomponents
    if not any(folded.indices for folded in parts.folded):
        return {}
    sites = zip(vpd.layout.names, parts.original, parts.folded, strict=True)
    return {
        "original_indices": {
            name: {"kept": kept, "folded": folded.indices} for name, kept, folded in sites
        }
    }


def load_subcomponents(
    vpd: Decomposition, tensors: dict[str, Tensor], record: dict[str, Any]
) -> None:
    """Copy `V` and `U` of every site in place, and what was folded.

    Args:
        vpd: A decomposition of the same sizes.
        tensors: As from `subcomponent_tensors`.
        record: Holds what `folded_record` made.

    Raises:
        ArtefactError: If the column numbers do not fit the tensors.
    """
    parts, indices = vpd.subcomponents, record.get("original_indices", {})
    for index, (name, folded) in enumerate(zip(vpd.layout.names, parts.folded, strict=True)):
        parts.v[index].data.copy_(tensors[f"{name}.V"])
        parts.u[index].data.copy_(tensors[f"{name}.U"])
        if name not in indices:
            continue
        kept, gone = indices[name]["kept"], indices[name]["folded"]
        folded.v = tensors.get(f"{name}.folded_V", folded.v[:, :0]).to(vpd.device)
        folded.u = tensors.get(f"{name}.folded_U", folded.u[:0]).to(vpd.device)
        numbers = list(range(vpd.layout.sizes[index] + folded.v.shape[1]))
        if kept != sorted(kept) or sorted([*kept, *gone]) != numbers:
            raise ArtefactError(
                f"original_indices of {name}: {len(kept)} kept and {len(gone)} folded column "
                f"numbers do not count its {len(numbers)} subcomponents. The record was changed."
            )
        parts.original[index], folded.indices = kept, gone


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def base_model_record(vpd: Decomposition) -> dict[str, Any]:
    """What identifies the base model: versions, class, processing, dtype, weight hashes."""
    model = vpd.model
    cfg = getattr(model, "cfg", None)
    return {
        "transformer_lens_version": importlib.metadata.version("transformer-lens"),
        "torch_version": importlib.metadata.version("torch"),
        "model_class": type(model).__name__,
        "kind": model_kind(model),
        "model_name": getattr(cfg, "model_name", None),
        "dtype": str(vpd.sites[0].weight.dtype).removeprefix("torch."),
        "default_prepend_bos": getattr(cfg, "default_prepend_bos", None),
        "normalization_type": getattr(cfg, "normalization_type", None),
        "compatibility_mode": bool(getattr(model, "compatibility_mode", False)),
        "weights": {site.name: weight_hash(site.weight) for site in vpd.sites},
    }


def fingerprint(vpd: Decomposition) -> str:
    """SHA-256 of all V and U, by which results recognise the decomposition they belong to."""
    directions = [*vpd.subcomponents.v, *vpd.subcomponents.u]
    return hashlib.sha256("".join(weight_hash(part) for part in directions).encode()).hexdigest()


def check_weights(vpd: Decomposition, base: dict[str, Any]) -> None:
    """Compare the model's weights with the recorded hashes.

    Raises:
        ArtefactError: Naming the sites that differ, and the likely cause.
    """
    recorded = base.get("weights", {})
    different = [
        site.name for site in vpd.sites if recorded.get(site.name) != weight_hash(site.weight)
    ]
    if not different:
        return
    now = base_model_record(vpd)
    changed = [
        f"{key}: {base.get(key)!r} then, {now[key]!r} now"
        for key in ("model_name", "kind", "dtype", "normalization_type", "compatibility_mode")
        if base.get(key) != now[key]
    ]
    hint = f" What else differs: {'; '.join(changed)}." if changed else ""
    raise ArtefactError(
        f"{len(different)} of {len(vpd.sites)} decomposed weights of this model differ from those "
        f"the decomposition was made for: {', '.join(different[:6])}"
        f"{', ...' if len(different) > 6 else ''}.{hint} Load the same checkpoint with the same "
        "processing (fold_ln, compatibility mode) and dtype."
    )


def _model_card(vpd: Decomposition) -> str:
    base = base_model_record(vpd)
    rows = "\n".join(
        f"| `{name}` | {size} |"
        for name, size in zip(vpd.layout.names, vpd.layout.sizes, strict=True)
    )
    return (
        f"# VPD decomposition of {base['model_name'] or base['model_class']}\n\n"
        f"Trained for {vpd.trained_steps} steps with vpd_lens "
        f"{importlib.metadata.version('vpd-lens')}. Base model: {base['model_class']}, "
        f"{base['dtype']}.\n\n"
        '```python\nimport vpd_lens\n\nmodel = vpd_lens.load("path/to/this/folder", base_model)\n'
        "```\n\n"
        f"| site | subcomponents |\n|---|---|\n{rows}\n"
    )
