"""A harvest on disk: tensors, and a JSON record with their checksums.

| file | content |
|---|---|
| `usage.safetensors` | sums per subcomponent |
| `inputs.safetensors` | counts of input tokens, `[C_total, vocab]` |
| `outputs.safetensors` | masses of output tokens, `[C_total, vocab]` |
| `top.safetensors`, `random.safetensors` | examples, `[C_total, n, 2 context + 1]` |
| `harvest.json` | format version, sites, settings, fingerprint, token strings, place in the data |
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file

from vpd_lens.analysis.harvest.examples import Examples
from vpd_lens.analysis.harvest.result import Harvest, Settings
from vpd_lens.analysis.harvest.token_statistics import TokenTable
from vpd_lens.analysis.harvest.usage import Usage
from vpd_lens.decomposition.masks import Layout
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.files import (
    FORMAT_VERSION,
    atomic_directory,
    existing_directory,
    file_hash,
    read_json,
    read_tensors,
    write_json,
)

_PARTS = {
    "usage": Usage,
    "inputs": TokenTable,
    "outputs": TokenTable,
    "top": Examples,
    "random": Examples,
}


class _Record(BaseModel):
    """The content of `harvest.json`."""

    model_config = ConfigDict(extra="forbid")

    format_version: int
    vpd_lens_version: str
    sites: list[str]
    n_subcomponents: list[int]
    settings: Settings
    fingerprint: str
    n_batches: int
    data_state: dict[str, Any] | None
    strings: list[str]
    sha256: dict[str, str]


def save(harvest: Harvest, path: Path) -> Path:
    """Write a harvest to a directory, whole or not at all.

    Args:
        harvest: The harvest.
        path: The directory; an earlier one there is replaced once the new one is complete.

    Returns:
        The directory.
    """
    with atomic_directory(path) as folder:
        for name in _PARTS:
            tensors = vars(getattr(harvest, name))
            cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_file(cpu, _tensor_file(folder, name))
        record = _Record(
            format_version=FORMAT_VERSION,
            vpd_lens_version=importlib.metadata.version("vpd-lens"),
            sites=list(harvest.layout.names),
            n_subcomponents=list(harvest.layout.sizes),
            settings=harvest.settings,
            fingerprint=harvest.fingerprint,
            n_batches=harvest.n_batches,
            data_state=harvest.data_state,
            strings=list(harvest.strings),
            sha256={name: file_hash(_tensor_file(folder, name)) for name in _PARTS},
        )
        write_json(folder / "harvest.json", record.model_dump(mode="json"))
    return path


def load(path: Path) -> Harvest:
    """Read what `save` wrote.

    Args:
        path: The directory.

    Raises:
        ArtefactError: If a file is missing, damaged, or newer than this library.
    """
    folder = existing_directory(path)
    record = _read_record(folder)
    for name in _PARTS:
        if file_hash(_tensor_file(folder, name)) != record.sha256.get(name):
            raise ArtefactError(
                f"{_tensor_file(folder, name)}: its content does not match the checksum in "
                "harvest.json; the file is truncated or was changed. Restore it from a copy, or "
                "harvest again."
            )
    layout = Layout(tuple(record.sites), tuple(record.n_subcomponents))
    try:
        parts = {
            name: kind(**read_tensors(_tensor_file(folder, name))) for name, kind in _PARTS.items()
        }
    except TypeError as error:
        raise ArtefactError(f"{folder}: its tensors are not those of a harvest: {error}") from None
    if len(parts["usage"].firings) != layout.total:
        raise ArtefactError(f"{folder}: its tensors do not fit the sites in harvest.json.")
    return Harvest(
        layout,
        record.settings,
        record.fingerprint,
        record.strings,
        **parts,
        n_batches=record.n_batches,
        data_state=record.data_state,
    )


def _read_record(folder: Path) -> _Record:
    data = read_json(folder / "harvest.json")
    version = data.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtefactError(
            f"{folder}: format version {version} is newer than this library reads "
            f"({FORMAT_VERSION}). Upgrade vpd-lens."
        )
    try:
        return _Record(**data)
    except (ValidationError, InputError, TypeError) as error:
        raise ArtefactError(
            f"{folder / 'harvest.json'}: damaged, or written by another version ({error})."
        ) from None


def _tensor_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
