"""One format for all that is saved: a record, tensors, and a checksum of every file.

| file | content |
|---|---|
| `record.json` | `kind`, `format_version`, `vpd_lens_version`; the `record` itself; `files`: the \
SHA-256 of each; `sha256`: that of all this |
| `<name>.safetensors` | tensors by name |
| further files | such as a tokenizer's, listed in `files` too; `README.md` and `labels.json`, \
which people edit, are not |

A folder is written beside its destination, flushed to disk and renamed, so that an interruption
leaves either the old one or the new one. Whatever is wrong with a folder or with the disk is an
`ArtefactError` that names the part. Only the end of this file knows version 1 of the format.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpd_lens.errors import ArtefactError, InputError

FORMAT_VERSION = 2
RECORD = "record.json"
_EDITED = ("README.md", "labels.json")
_RESTORE = "Restore it from a copy, or make it again."


class Record(BaseModel):
    """What an artefact says in JSON; every kind of artefact is a subclass that names its `kind`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="constants", protected_namespaces=()
    )
    kind: ClassVar[str]


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Artefact(Generic[R]):
    """A folder that has been opened: its record is checked, its other files are when read."""

    folder: Path
    record: R
    files: Mapping[str, str]  # the SHA-256 of every other file
    vpd_lens_version: str  # that wrote it

    def file(self, name: str) -> Path:
        """The path of one of its files, once its content has been found to match its checksum."""
        path = self.folder / name
        if name not in self.files:
            raise ArtefactError(f"{path}: {RECORD} lists no checksum of it. {_RESTORE}")
        if file_hash(path) != self.files[name]:
            raise ArtefactError(
                f"{path}: its content does not match its checksum; truncated or changed. {_RESTORE}"
            )
        return path

    def tensors(
        self, name: str, shapes: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Tensor]:
        """Tensors of `<name>.safetensors`, mapped from the file, with the `shapes` if given."""
        path = self.file(f"{name}.safetensors")
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{path}: not readable as safetensors ({error}).") from None
        if shapes is not None:
            require_shapes(path, tensors, shapes)
        return tensors


def require_shapes(
    where: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Check that tensors have exactly the names and shapes expected; the message names one."""
    for name in sorted(shapes.keys() | tensors.keys()):
        got = list(tensors[name].shape) if name in tensors else "missing"
        expected = list(shapes[name]) if name in shapes else "no such tensor"
        if got != expected:
            raise ArtefactError(
                f"{where}: its tensors do not fit its record: {name!r} is {got}, expected "
                f"{expected}. They were changed, or belong to something else."
            )


def write(
    path: str | Path,
    record: Record,
    tensors: Mapping[str, Mapping[str, Tensor]],
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Write an artefact, whole or not at all; returns its folder.

    An earlier one of the same kind is replaced once this one is complete; anything else is left as
    it was, with an error. `tensors` are those of each `<name>.safetensors`; `beside` writes further
    files into the folder that it is given.
    """
    path = Path(path)
    with disk_errors(path):
        _require_replaceable(path, record.kind)
    try:
        fields = record.model_dump(mode="json")
    except ValueError as error:
        raise InputError(
            f"this {record.kind} cannot be written as JSON ({error}). Use numbers, text and lists."
        ) from None
    with atomic_folder(path) as folder:
        for name, part in tensors.items():
            save_file(_plain(part), folder / f"{name}.safetensors")
        if beside is not None:
            beside(folder)
        written = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [file.relative_to(folder).as_posix() for file in written]
        content = {
            "kind": record.kind,
            "format_version": FORMAT_VERSION,
            "vpd_lens_version": importlib.metadata.version("vpd-lens"),
            "record": fields,
            "files": {name: file_hash(folder / name) for name in names if name not in _EDITED},
        }
        write_json(folder / RECORD, {**content, "sha256": _digest(content)})
        for file in written:  # safetensors lets nobody else read what it writes
            shutil.copymode(folder / RECORD, file)
    return path


def read(path: str | Path, record_type: type[R]) -> Artefact[R]:
    """Open an artefact, or that inside the output of a training run, and check its record."""
    kind = record_type.kind
    folder = folder_of(Path(path), kind)
    file = folder / (RECORD if (folder / RECORD).is_file() else _VERSION_1[kind][0])
    content = read_json(file)
    version = content.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise ArtefactError(
            f"{file}: format version {version!r}, which is newer than this library reads "
            f"({FORMAT_VERSION}). Upgrade vpd-lens."
        )
    try:
        if version == 1:
            content = _from_version_1(folder, kind, content)
        elif content.pop("sha256") != _digest(content):
            raise ArtefactError(f"{file}: does not match its own checksum. {_RESTORE}")
        record = record_type.model_validate(content["record"])
        artefact = Artefact(folder, record, content["files"], content["vpd_lens_version"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = _problems(error) if isinstance(error, ValidationError) else repr(error)
        raise ArtefactError(f"{file}: damaged, or changed by hand: {found}.") from None
    for name in sorted({p.name for p in folder.glob("*.safetensors")} - artefact.files.keys()):
        artefact.file(name)  # an error: it is not listed
    for name in artefact.files:
        if not (folder / name).is_file():
            raise ArtefactError(f"{folder / name}: missing. {_RESTORE}")
    return artefact


def existing_folder(path: Path) -> Path:
    """`path`, or the previous version if an interruption fell between two renames."""
    for folder in (path, path.with_name(f".{path.name}.old")):
        if os.path.isdir(folder):  # unlike Path.is_dir, False if the name is too long
            return folder
    raise ArtefactError(f"{path}: there is no such directory. Check the path.")


def kind_of(folder: Path) -> str | None:
    """What kind of artefact a folder holds; `None` if none."""
    if (folder / RECORD).is_file():
        return str(read_json(folder / RECORD).get("kind"))
    for kind, (name, *_) in _VERSION_1.items():
        file = folder / name
        if file.is_file() and "format_version" in read_json(file):  # others have a config.json, too
            return kind
    return None


def folder_of(path: Path, kind: str) -> Path:
    """Where an artefact of a kind is: in `path`, or inside the output of a training run there."""
    folder = existing_folder(path)
    found = kind_of(folder)
    if found == kind:
        return folder
    what = f" It holds a {found}." if found is not None else ""
    for part in ("decomposition", "checkpoint") if found is None else ():  # of a run's output
        if kind_of(folder / part) == part == kind:
            return folder / kind
        if kind_of(folder / part) == part:
            what = " It is a run that is not finished: train on with resume=True."
    raise ArtefactError(f"{path}: there is no {kind} in it.{what}")


def _require_replaceable(path: Path, kind: str) -> None:
    try:
        empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
        if empty or (path.is_dir() and kind_of(path) == kind):
            return
    except ArtefactError:
        return  # a damaged one of ours
    raise ArtefactError(
        f"{path}: something else is there, which writing a {kind} would delete. Name another "
        "place, or delete it."
    )


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and contiguous; copies only of what shares memory, which safetensors refuses."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    owner = {t.untyped_storage().data_ptr(): name for name, t in plain.items()}
    shared = {n: t.clone() for n, t in plain.items() if owner[t.untyped_storage().data_ptr()] != n}
    return plain | shared


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _problems(error: ValidationError) -> str:
    words = {"extra_forbidden": "there is no such field", "missing": "the field is missing"}
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'record'}: "
        f"{words.get(problem['type'], problem['msg'])}"
        for problem in error.errors()[:5]
    )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Where to make what replaces `path` if the block raises nothing; otherwise nothing is left."""
    temporary, previous = (path.with_name(f".{path.name}.{end}") for end in ("new", "old"))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                _flush(file)
            if temporary.is_dir() and path.exists():
                shutil.rmtree(previous, ignore_errors=True)
                path.rename(previous)
            temporary.replace(path)
            _flush(path.parent)
            shutil.rmtree(previous, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if temporary.is_file():
                temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that replaces `path` if the block raises no exception."""
    with _replacing(path) as temporary:
        temporary.mkdir()
        yield temporary


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all, in a folder that is made if need be."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON; see `write_text`."""
    write_text(path, json.dumps(data, indent=1) + "\n")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Make an error of the operating system one that says what could not be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); what was "
            "there is as before. Free some space, or name another place."
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: missing or damaged ({error}). {_RESTORE}") from None
    if not isinstance(data, dict):
        raise ArtefactError(f"{path}: expected a JSON object, got {type(data).__name__}.")
    return data


def file_hash(path: Path, block_size: int = 1 << 20) -> str:
    """SHA-256 of a file, read block by block."""
    digest, block = hashlib.sha256(), memoryview(bytearray(block_size))
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(block):
                digest.update(block[:size])
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values in row order, in its own dtype."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()


# Version 1 of the format, which vpd_lens 0.1 wrote.
# Of every kind: its record, and the file whose checksum is all of `sha256` if that is a text.
_VERSION_1 = {
    "decomposition": ("config.json", None),
    "checkpoint": ("checkpoint.json", "state.safetensors"),
    "graph": ("graph.json", "graph.safetensors"),
    "harvest": ("harvest.json", None),
    "dataset attributions": ("attributions.json", "attributions.safetensors"),
    "model": ("model.json", None),  # read by `vpd_lens.models`
}


def _from_version_1(folder: Path, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    _, file = _VERSION_1[kind]
    envelope = ("format_version", "vpd_lens_version", "sha256")
    record = {name: value for name, value in content.items() if name not in envelope}
    if kind == "decomposition":
        record |= {name: read_json(folder / f"{name}.json") for name in ("base_model", "metrics")}
    if kind == "graph":
        for output in record["outputs"]:
            output["tokens"] = dict(output["tokens"])  # pairs, and no weights: those are lost
    hashes = {file: content["sha256"]} if file else dict(content["sha256"])
    if kind == "harvest":
        hashes = {f"{name}.safetensors": value for name, value in hashes.items()}
    return {"vpd_lens_version": "0.1.0", "record": record, "files": hashes}
