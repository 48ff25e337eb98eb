"""Save a decomposition, and load it onto the model it belongs to (see `vpd_lens.storage`).

| file | content |
|---|---|
| `subcomponents.safetensors` | `<site>.V` `[d_in, C]`, `<site>.U` `[C, d_out]`; where \
subcomponents were folded into the delta, theirs as `<site>.folded_V`, `<site>.folded_U` |
| `causal_importance.safetensors` | parameters of the causal importance function |
| `record.json` | sites, sizes, how it was trained and measured, what its base model is |
| `README.md` | a model card |
| `labels.json` | what its subcomponents are called, if any are; see `labels.py` |
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vpd_lens import storage
from vpd_lens.decomposition.attach import attach, decomposition_of
from vpd_lens.decomposition.difference import differing_sites
from vpd_lens.decomposition.handle import Decomposition, target_size
from vpd_lens.decomposition.labels import FILE, Labels
from vpd_lens.description import BaseModelRecord, DecompositionRecord, Indices, SubcomponentsRecord
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.model_card import write_card
from vpd_lens.origin import origin_of, seen_from
from vpd_lens.sites import find_sites, model_kind

Model = TypeVar("Model", bound=nn.Module)
Shapes = dict[str, tuple[int, ...]]


def save(
    vpd: Decomposition,
    path: str | Path,
    metrics: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    report: Any = None,
) -> Path:
    """Write a decomposition to a folder, whole or not at all, and return the folder.

    An earlier one there is replaced only once the new one is complete. `metrics`, anything
    measured, are stored in the record. A smaller `dtype` rounds what is written, half the size;
    what is loaded from it is fp32 again, and another decomposition than that in memory. Of an
    `EvalReport`, verdict, tables and plots go into the card, and the figures beside it.

    Raises:
        ArtefactError: If something else is there, or it cannot be written.
        InputError: If `dtype` is none of fp32, fp16 and bf16, or too small for a value; or if the
            report is of another decomposition.
    """
    record = DecompositionRecord(
        **subcomponents_record(vpd),
        origin=seen_from(Path(path), origin_of(vpd.model)),
        other_origin=seen_from(Path(path), vpd.other_origin),
        importance=vpd.importance_config,
        divergence=vpd.divergence if isinstance(vpd.divergence, str) else "custom",
        trained_steps=vpd.trained_steps,
        training=vpd.training_config,
        metrics=metrics or {},
    )
    function = vpd.importance.state_dict()
    tensors = {"subcomponents": subcomponent_tensors(vpd), "causal_importance": function}
    tensors = {file: _rounded(part, dtype) for file, part in tensors.items()}

    def beside(folder: Path) -> None:
        write_card(folder, record, report)
        if vpd.labels:
            _relabelled(vpd.labels, tensors["subcomponents"]).save(folder / FILE)

    return storage.write(path, record, tensors, beside)


def load(
    path: str | Path, model: Model, divergence: Any = None, base: nn.Module | None = None
) -> Model:
    """Attach a saved decomposition to the model it was made from; see `vpd_lens.load`.

    Raises:
        ArtefactError: If a file is missing, damaged or newer than this library, or a decomposed
            weight of `model` differs; the message names the site. The model is left untouched.
        AttachError: If the model is decomposed already or a site does not exist.
    """
    artefact = storage.read(path, DecompositionRecord)
    record = artefact.record
    if record.divergence == "custom" and divergence is None:
        raise ArtefactError(
            "This decomposition was trained with a custom divergence; pass it as divergence=..."
        )
    counts = dict(zip(record.sites, record.n_subcomponents, strict=True))
    names: list[str] = list(record.sites)
    importance = record.importance
    if importance.kind == "transformer":  # older ones have gaps, once filled from all of the target
        importance = importance.filled(*target_size(model, find_sites(model, names)))
    measure: Any = divergence or record.divergence
    chosen = find_sites(model, names)
    if base is not None:
        chosen = differing_sites(chosen, base)
    if missing := set(names) - {site.name for site in chosen}:
        raise ArtefactError(f"base does not differ from the model at {sorted(missing)}, as then.")
    attach(model, chosen, lambda s: counts[s.name], importance, divergence=measure, check=False)
    vpd = decomposition_of(model)
    try:
        check_base_model(vpd, record.base_model)
        subcomponents, importance = recorded_shapes(record, vpd)
        load_subcomponents(vpd, artefact.tensors("subcomponents", subcomponents), record)
        vpd.importance.load_state_dict(artefact.tensors("causal_importance", importance))
        if (artefact.folder / FILE).is_file():
            vpd.labels = Labels.load(artefact.folder / FILE)
    except BaseException:
        vpd.attachment.detach()
        raise
    vpd.trained_steps, vpd.training_config = record.trained_steps, record.training
    vpd.other_origin = None if base is None else origin_of(base)
    return model


def base_model_record(vpd: Decomposition) -> BaseModelRecord:
    """What identifies a decomposition's model, as it is now."""
    cfg = getattr(vpd.model, "cfg", None)
    return BaseModelRecord(
        transformer_lens_version=version("transformer-lens"),
        torch_version=version("torch"),
        model_class=type(vpd.model).__name__,
        kind=model_kind(vpd.model),
        model_name=getattr(cfg, "model_name", None),
        dtype=str(vpd.sites[0].weight.dtype).removeprefix("torch."),
        default_prepend_bos=getattr(cfg, "default_prepend_bos", None),
        normalization_type=getattr(cfg, "normalization_type", None),
        compatibility_mode=bool(getattr(vpd.model, "compatibility_mode", False)),
        weights={site.name: storage.tensor_hash(site.weight) for site in vpd.sites},
        origin={s.name: storage.tensor_hash(s.origin) for s in vpd.sites if s.origin is not None},
    )


def check_base_model(vpd: Decomposition, then: BaseModelRecord) -> None:
    """Refuse a model that is not the recorded one, naming the sites that differ and a cause."""
    now = base_model_record(vpd)
    if then.origin != now.origin:
        raise ArtefactError(
            "the other model, from which the decomposed difference is taken, is not the one of "
            "then: its weights differ, or it was given then or now only. Pass that one as base=."
        )
    different = [name for name, weight in now.weights.items() if then.weights.get(name) != weight]
    if not different:
        return
    keys = ("model_name", "kind", "dtype", "normalization_type", "compatibility_mode")
    pairs = ((key, getattr(then, key), getattr(now, key)) for key in keys)
    changed = [f"{key}: {old!r} then, {new!r} now" for key, old, new in pairs if old != new]
    hint = f" What else differs: {'; '.join(changed)}." if changed else ""
    raise ArtefactError(
        f"{len(different)} of {len(now.weights)} decomposed weights of this model differ from "
        f"those the decomposition was made for: {', '.join(different[:6])}"
        f"{', ...' if len(different) > 6 else ''}.{hint} Load the same checkpoint with the "
        "same processing (fold_ln, compatibility mode) and dtype."
    )


def subcomponents_record(vpd: Decomposition) -> dict[str, Any]:
    """The fields of a `SubcomponentsRecord`."""
    layout, parts = vpd.layout, vpd.subcomponents
    sites = zip(layout.names, parts.original, parts.folded, strict=True)
    indices = {name: Indices(kept=kept, folded=gone.indices) for name, kept, gone in sites}
    return {
        "sites": layout.names,
        "n_subcomponents": layout.sizes,
        "original_indices": indices if any(i.folded for i in indices.values()) else {},
        "base_model": base_model_record(vpd),
    }


def recorded_shapes(record: SubcomponentsRecord, vpd: Decomposition) -> tuple[Shapes, Shapes]:
    """The shapes of recorded subcomponents and importance parameters; `vpd` has the same sites."""
    subcomponents: Shapes = {}
    for site, original in zip(vpd.sites, record.indices, strict=True):
        d_in, d_out = site.shape
        for prefix, numbers in (("", original.kept), ("folded_", original.folded)):
            if numbers or not prefix:
                subcomponents[f"{site.name}.{prefix}V"] = (d_in, len(numbers))
                subcomponents[f"{site.name}.{prefix}U"] = (len(numbers), d_out)
    counted = {id(row.parameter): row for row in vpd.importance.per_subcomponent()}
    importance: Shapes = {
        name: counted[id(p)].shape(record.n_subcomponents) if id(p) in counted else tuple(p.shape)
        for name, p in vpd.importance.named_parameters()
    }
    return subcomponents, importance


def subcomponent_tensors(vpd: Decomposition) -> dict[str, Tensor]:
    """`{<site>.V, <site>.U}` of every site, and `folded_V`, `folded_U` where there are any."""
    parts, tensors = vpd.subcomponents, {}
    for name, v, u, folded in zip(vpd.layout.names, parts.v, parts.u, parts.folded, strict=True):
        tensors |= {f"{name}.V": v, f"{name}.U": u}
        if folded.indices:
            tensors |= {f"{name}.folded_V": folded.v, f"{name}.folded_U": folded.u}
    return tensors


def _relabelled(labels: Labels, tensors: dict[str, Tensor]) -> Labels:
    """The same labels, of what will be loaded from tensors that may have been rounded."""
    fingerprint = _stored_fingerprint(labels.sizes, tensors)
    return Labels.of(labels.record.model_copy(update={"fingerprint": fingerprint}))


def _rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"dtype={dtype}; expected torch.float32, torch.float16 or torch.bfloat16.")
    rounded = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    for name, tensor in rounded.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{name} has values that {dtype} cannot hold; use torch.bfloat16.")
    return rounded


@torch.no_grad()
def load_subcomponents(
    vpd: Decomposition, tensors: dict[str, Tensor], record: SubcomponentsRecord
) -> None:
    """Copy in place what `subcomponent_tensors` gave of a decomposition of the same sizes."""
    parts = vpd.subcomponents
    for index, (name, original) in enumerate(zip(record.sites, record.indices, strict=True)):
        parts.v[index].copy_(tensors[f"{name}.V"])
        parts.u[index].copy_(tensors[f"{name}.U"])
        parts.original[index], folded = list(original.kept), parts.folded[index]
        folded.indices = list(original.folded)
        folded.v = tensors.get(f"{name}.folded_V", folded.v[:, :0]).to(parts.v[index])
        folded.u = tensors.get(f"{name}.folded_U", folded.u[:0]).to(parts.u[index])


_FINGERPRINTS: WeakKeyDictionary[Decomposition, tuple[Any, str]] = WeakKeyDictionary()


def fingerprint(vpd: Decomposition) -> str:
    """SHA-256 of all V and U, by which results know their decomposition; kept until one changes."""
    directions = [*vpd.subcomponents.v, *vpd.subcomponents.u]
    # Changes through `.data` leave the version as it is; the sum notices those.
    total = float(torch.stack([part.detach().sum() for part in directions]).sum())
    versions = [total, *((part.data_ptr(), part.shape, part._version) for part in directions)]
    known, value = _FINGERPRINTS.get(vpd, (None, ""))
    if known != versions:
        value = fingerprint_of(directions)
        _FINGERPRINTS[vpd] = versions, value
    return value


def saved_fingerprint(path: str | Path) -> str:
    """The `fingerprint` of the decomposition in a folder, as of the model it is loaded onto."""
    artefact = storage.read(path, DecompositionRecord)
    return _stored_fingerprint(artefact.record.sites, artefact.tensors("subcomponents"))


def _stored_fingerprint(sites: Iterable[str], tensors: dict[str, Tensor]) -> str:
    return fingerprint_of([tensors[f"{name}.{part}"].float() for part in "VU" for name in sites])


def fingerprint_of(directions: Sequence[Tensor]) -> str:
    """The `fingerprint` of a decomposition with these `V`, and then `U`, of every site in order."""
    hashes = "".join(storage.tensor_hash(part) for part in directions)
    return hashlib.sha256(hashes.encode()).hexdigest()
