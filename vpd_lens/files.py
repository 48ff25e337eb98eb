"""Directories written whole or not at all, and weight hashes.

A directory is written beside its destination, flushed to disk and renamed, so that an
interruption leaves either the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vpd_lens.errors import ArtefactError

FORMAT_VERSION = 1


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an exception.

    Args:
        path: The destination; an existing directory there is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    previous = path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
        temporary.rename(path)
        _flush(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def existing_directory(path: Path) -> Path:
    """`path`, or the previous version if an interruption fell between two renames.

    Raises:
        ArtefactError: If neither exists.
    """
    previous = path.with_name(f".{path.name}.old")
    if path.is_dir():
        return path
    if previous.is_dir():
        return previous
    raise ArtefactError(f"{path}: there is no such directory. Check the path.")


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all, in a directory that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtefactError: If the file is missing, damaged or not an object.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{path}: missing or damaged ({error}). Restore it from a copy."
        ) from None
    if not isinstance(data, dict):
        raise ArtefactError(f"{path}: expected a JSON object, got {type(data).__name__}.")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ArtefactError: If the file is missing, truncated or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path}: missing, truncated or damaged ({error}).") from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        ArtefactError: If it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error}).") from None


def weight_hash(weight: Tensor) -> str:
    """SHA-256 of a weight's values in row order, in its own dtype."""
    raw = weight.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(raw.view(torch.uint8).numpy().tobytes()).hexdigest()
