"""Where a base model came from, and how it is had again: `origin_of`, `load_base`, `load_other`.

TransformerLens keeps a model's name, but not what it did to the weights. That shows in the weights
themselves: a centred matrix has rows that add up to zero, a folded norm has gains of one.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens.description import DecompositionRecord, Origin
from vpd_lens.errors import ArtefactError
from vpd_lens.models import load_model
from vpd_lens.sites import find_sites, model_kind
from vpd_lens.storage import tensor_hash

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # of a model on the hub
_GAIN = re.compile(r"(^|\.)ln(1|2|_final)\.(w|weight)$")


def origin_of(model: nn.Module) -> Origin | None:
    """What a decomposition records of a model's origin; directories with their whole path.

    `None` if the model came neither from the hub nor from a directory that is still there.
    """
    found = _source(model)
    if found is None:
        return None
    source, revision = found
    if Path(source).is_dir():
        source, revision = Path(source).resolve().as_posix(), None
    elif not _NAME.fullmatch(source):
        return None
    return Origin(
        source=source,
        revision=revision,
        processing=_processing(model),
        parameters=_all_parameters(model),
    )


def seen_from(folder: Path, origin: Origin | None) -> Origin | None:
    """The same origin for a record in `folder`: a directory beside that may move with it."""
    if origin is None or not origin.is_folder:
        return origin
    return origin.model_copy(update={"source": _from(folder, Path(origin.source))})


def load_base(record: DecompositionRecord, folder: Path, device: str = "cpu") -> nn.Module:
    """Load the base model of a decomposition that lies in `folder`, as its record says.

    Raises:
        ArtefactError: If the record does not say, or what is there now is another model.
        ConfigError: If the model cannot be downloaded.
    """
    advice = "Pass its base model: vpd_lens.load(..., model=...); on the command line --model."
    return _settled(_found(record, record.origin, folder, device, "base model", advice), record)


def load_as_recorded(record: DecompositionRecord, source: str | Path, device: str) -> nn.Module:
    """Load a base model from `source`, in the class, processing and dtype of the recorded one."""
    return _settled(_loaded(record, record.origin, source, device), record)


def load_other(
    record: DecompositionRecord, folder: Path, source: str | Path | None = None
) -> nn.Module:
    """Load the model, the difference from which lies decomposed in `folder`; as `load_base`.

    From `source`, if it is given, without a check. It is put on the CPU, since only the weights of
    some sites are taken from it.
    """
    origin = record.other_origin
    if source is not None:
        return _loaded(record, origin, source, "cpu")
    advice = "Pass that model: vpd_lens.load(..., base=...); on the command line --base."
    what = "model from which the decomposed difference is taken"
    return _found(record, origin, folder, "cpu", what, advice)


def _found(
    record: DecompositionRecord,
    origin: Origin | None,
    folder: Path,
    device: str,
    what: str,
    advice: str,
) -> nn.Module:
    """A model from its origin, unless that is unknown or has another model now."""
    if origin is None:
        raise ArtefactError(
            f"{folder}: its record does not say where its {what} came from: that was made in "
            f"Python, or is where nobody else can get it. {advice}"
        )
    source = str(folder / origin.source) if origin.is_folder else origin.source
    if origin.is_folder and not Path(source).is_dir():
        raise ArtefactError(f"{folder}: its {what} was in {source}, which is not here. {advice}")
    model = _loaded(record, origin, source, device)
    if _all_parameters(model) != origin.parameters:
        raise ArtefactError(
            f"{folder}: the weights of {source} are no longer those that were decomposed, or this "
            f"TransformerLens processes them otherwise. {advice}"
        )
    return model


def _loaded(
    record: DecompositionRecord, origin: Origin | None, source: str | Path, device: str
) -> nn.Module:
    """A model in the class and dtype of the base model, processed as `origin` says."""
    base = record.base_model
    model_class = "auto" if Path(source).is_dir() or base.kind == "module" else base.kind
    model: Any = load_model(
        source,
        model_class,  # type: ignore[arg-type]
        device,
        origin.processing if origin else "full" if base.compatibility_mode else "default",
        revision=origin.revision if origin and str(source) == origin.source else None,
        dtype=getattr(torch, base.dtype),
    )
    if base.compatibility_mode and not model.compatibility_mode:
        model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    return model


def _settled(model: Any, record: DecompositionRecord) -> nn.Module:
    """A base model with the settings of the recorded one."""
    base = record.base_model
    if base.default_prepend_bos is not None:
        model.cfg.default_prepend_bos = base.default_prepend_bos
    model.cfg.model_name = base.model_name
    return model  # type: ignore[no-any-return]


def _source(model: nn.Module) -> tuple[str, str | None] | None:
    """A name or directory, and a commit if it is known; `None` if the model was made in Python."""
    kind, cfg = model_kind(model), getattr(model, "cfg", None)
    if kind == "bridge":
        config = getattr(model.original_model, "config", None)
        source = getattr(config, "_name_or_path", "")
    elif kind == "hooked_transformer" and getattr(cfg, "original_architecture", None):
        from transformer_lens.loading_from_pretrained import OFFICIAL_MODEL_NAMES

        name = cfg.model_name  # type: ignore[union-attr]  # without the owner
        source = next((n for n in OFFICIAL_MODEL_NAMES if n.split("/")[-1] == name), "")
    else:
        return None
    if not source:
        return None
    return source, model.__dict__.get("loaded_revision") or _cached_commit(source)


def _cached_commit(name: str) -> str | None:
    """The commit of the main branch that this machine has downloaded, and so has loaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a directory
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def _from(folder: Path, source: Path) -> str:
    """The path of `source`; from `folder` if they are beside each other, and so may be moved."""
    folder, source = folder.absolute(), source.resolve()
    beside = source.is_relative_to(folder.parent.resolve())
    path = os.path.relpath(source, folder.parent.resolve() / folder.name) if beside else source
    path = Path(path).as_posix()
    return path if path.startswith((".", "/")) else f"./{path}"


def _processing(model: nn.Module) -> dict[str, bool]:
    """Which of TransformerLens' options have been applied, or would change nothing."""
    if not getattr(model, "_weights_processed", True):  # a bridge as it came
        return {}
    sites = find_sites(model, "")
    writing = [site.weight for site in sites if site.name.endswith(("attn.o", "mlp.out"))]
    gains = [x for name, x in model.state_dict().items() if _GAIN.search(name)]
    biases = [site.bias for site in sites if site.name.endswith("attn.v")]
    return {
        "fold_ln": all(bool((gain == 1).all()) for gain in gains),
        "center_writing_weights": all(_centred(weight) for weight in writing),
        "center_unembed": all(_centred(s.weight) for s in sites if s.name == "unembed"),
        "fold_value_biases": not any(bool(bias.any()) for bias in biases if bias is not None),
    }


def _centred(weight: Tensor) -> bool:
    """Whether the rows add up to zero, but for rounding; of random ones the ratio is about 1."""
    weight = weight.detach().float()
    return bool(weight.mean(1).square().mean() * weight.shape[1] < (0.05 * weight.std()) ** 2)


def _all_parameters(model: nn.Module) -> str:
    """SHA-256 of all parameters, whatever their names and order.

    Those that are 0 do not count: TransformerLens 3 gives an unembedding without a bias one.
    """
    hashes = {tensor_hash(parameter) for parameter in model.parameters() if parameter.any()}
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()
