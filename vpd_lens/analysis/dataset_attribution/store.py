"""Dataset attributions on disk.

| file | content |
|---|---|
| `attributions.safetensors` | tables and sums, as `<attribute>/<site>` or `<attribute>` |
| `attributions.json` | format version, places, settings, fingerprint, tokens, place in the data |
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING
from vpd_lens.analysis.dataset_attribution.result import OUTPUT, DatasetAttributions, Settings
from vpd_lens.errors import ArtefactError
from vpd_lens.files import (
    FORMAT_VERSION,
    atomic_directory,
    existing_directory,
    file_hash,
    read_json,
    read_tensors,
    write_json,
)

GROUPS = ("alive", "signed", "absolute", "importance", "squares")
SINGLE = ("token_counts", "logit_squares", "readout")

_TENSORS, _RECORD = "attributions.safetensors", "attributions.json"


class _Record(BaseModel):
    """The content of `attributions.json`."""

    model_config = ConfigDict(extra="forbid")

    format_version: int
    vpd_lens_version: str
    sites: list[str]
    places: dict[str, tuple[str, ...]]
    strings: list[str]
    settings: Settings
    fingerprint: str
    n_batches: int
    n_positions: int
    data_state: dict[str, Any] | None
    sha256: str


def save(result: DatasetAttributions, path: Path) -> Path:
    """Write a directory, whole or not at all.

    Args:
        result: The attributions.
        path: The directory; an earlier one there is replaced once the new one is complete.

    Returns:
        The directory.
    """
    tensors = {f"{g}/{name}": t for g in GROUPS for name, t in getattr(result, g).items()}
    tensors |= {name: getattr(result, name) for name in SINGLE}
    with atomic_directory(path) as folder:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, folder / _TENSORS)
        record = _Record(
            format_version=FORMAT_VERSION,
            vpd_lens_version=importlib.metadata.version("vpd-lens"),
            sites=list(result.alive),
            places=result.places,
            strings=list(result.strings),
            settings=result.settings,
            fingerprint=result.fingerprint,
            n_batches=result.n_batches,
            n_positions=result.n_positions,
            data_state=result.data_state,
            sha256=file_hash(folder / _TENSORS),
        )
        write_json(folder / _RECORD, record.model_dump(mode="json"))
    return path


def load(path: Path) -> DatasetAttributions:
    """Read what `save` wrote.

    Args:
        path: The directory.

    Raises:
        ArtefactError: If a file is missing, damaged, or newer than this library.
    """
    folder = existing_directory(path)
    record = _read_record(folder)
    if file_hash(folder / _TENSORS) != record.sha256:
        raise ArtefactError(
            f"{folder / _TENSORS}: its content does not match the checksum in {_RECORD}; the file "
            "is truncated or was changed. Restore it from a copy, or make it again."
        )
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in GROUPS}
    single: dict[str, Tensor] = {}
    for key, tensor in read_tensors(folder / _TENSORS).items():
        group, slash, name = key.partition("/")
        (groups.get(group, single) if slash else single)[name if slash else key] = tensor
    order = [*record.sites, OUTPUT]
    sorted_groups = {g: {n: part[n] for n in order if n in part} for g, part in groups.items()}
    kept = (
        "places",
        "strings",
        "settings",
        "fingerprint",
        "n_batches",
        "n_positions",
        "data_state",
    )
    try:
        result = DatasetAttributions(
            **sorted_groups, **single, **{name: getattr(record, name) for name in kept}
        )
        _check_shapes(result)
    except (TypeError, KeyError, ValueError) as error:
        raise ArtefactError(
            f"{folder}: its tensors are not those of dataset attributions ({error}). Make them "
            "again."
        ) from None
    return result


def _check_shapes(result: DatasetAttributions) -> None:
    n_axes = len(result.readout)
    for target, places in result.places.items():
        sizes = [
            len(result.token_counts) if p == EMBEDDING else len(result.alive[p]) for p in places
        ]
        expected = (len(result.alive[target]) if target in result.alive else n_axes, sum(sizes))
        for table in (result.signed, result.absolute):
            if target in table and table[target].shape != expected:
                raise ValueError(f"{target} has {tuple(table[target].shape)}, not {expected}")


def _read_record(folder: Path) -> _Record:
    data = read_json(folder / _RECORD)
    version = data.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtefactError(
            f"{folder}: format version {version} is newer than this library reads "
            f"({FORMAT_VERSION}). Upgrade vpd-lens."
        )
    try:
        return _Record(**data)
    except (ValidationError, TypeError) as error:
        raise ArtefactError(
            f"{folder / _RECORD}: damaged, or written by another version ({error})."
        ) from None
