"""Sums over one pass of data, stored now and then so that an interruption loses little."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from vpd_lens import storage
from vpd_lens.data import Batch, TokenBatches
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.labels import Labels
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import ArtefactError, ConfigError, InputError

G = TypeVar("G", bound="Gathered")


class GatheredRecord(storage.Record):
    """What is stored of all such sums beside tensors, by the names of attributes."""

    sites: list[str]
    strings: list[str]
    fingerprint: str
    n_batches: int
    data_state: dict[str, Any] | None


@dataclass(repr=False, kw_only=True)
class Gathered(ABC):
    """Sums over the batches so far, which know their decomposition and where to go on.

    All their tensors are stored, by the names of the attributes and keys that lead to them, of
    which the first, or `prefix`, is the file. One that is mostly empty is stored as its entries.
    """

    record_type: ClassVar[type[GatheredRecord]]
    prefix: ClassVar[str] = ""

    settings: BaseModel
    fingerprint: str
    strings: Sequence[str]
    n_batches: int = 0
    data_state: dict[str, Any] | None = None
    labels: Labels = field(default_factory=Labels, compare=False)

    def check(self, decomposition: Decomposition | str) -> None:
        """Refuse a decomposition, or its `fingerprint`, if it is not the one this is of.

        Raises:
            ArtefactError: If they differ.
        """
        other = decomposition if isinstance(decomposition, str) else fingerprint(decomposition)
        if other != self.fingerprint:
            raise ArtefactError(
                f"this {type(self).__name__} is of another decomposition: its fingerprint is "
                f"{self.fingerprint[:12]}..., this decomposition's is {other[:12]}... Load the "
                "decomposition it was made from, or make it anew."
            )

    def moved(self: G, device: torch.device) -> G:
        """The same with its tensors on a device; those that are there already are shared."""
        return _changed(self, lambda _, tensor: tensor.to(device))

    def save(self, path: str | Path) -> Path:
        """Write this to a folder, whole or not at all; an earlier one there is replaced.

        Raises:
            ArtefactError: If the folder cannot be written, or holds something else.
        """
        own = self._own()
        kept = {n: getattr(self, n) for n in self.record_type.model_fields if n not in own}
        files: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in self._tensors().items():
            file, _, part = name.partition("/")
            files[file] |= _entries(part, tensor)
        return storage.write(path, self.record_type(**own, **kept), files)

    @classmethod
    def load(cls: type[G], path: str | Path, vpd: Decomposition | None = None) -> G:
        """Read what `save` wrote.

        Raises:
            ArtefactError: If a file is missing or damaged, or of another decomposition than `vpd`.
        """
        artefact = storage.read(path, cls.record_type)
        files = [name.removesuffix(".safetensors") for name in artefact.files]
        stored = {f"{file}/{n}": t for file in files for n, t in artefact.tensors(file).items()}
        try:
            tensors = _from_entries(stored)
            with torch.device("meta"):
                blank = cls._blank(dict(artefact.record), tensors)
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            raise ArtefactError(
                f"{artefact.folder}: its record and its tensors do not fit ({error!r})."
            ) from None
        shapes = {name: tensor.shape for name, tensor in blank._tensors().items()}
        storage.require_shapes(artefact.folder, tensors, shapes)
        whole = {name: t for name, t in tensors.items() if not t.is_floating_point()}
        found = _changed(
            blank, lambda n, like: whole[n].to(like.dtype) if n in whole else tensors[n], cls.prefix
        )
        if vpd is not None:
            found.check(vpd)
            found.labels = vpd.labels
        return found

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by file and name there: `<file>/<attribute>/<key>`."""
        tensors: dict[str, Tensor] = {}
        _changed(self, tensors.setdefault, self.prefix)
        return tensors

    @abstractmethod
    def _own(self) -> dict[str, Any]:
        """What the record says that is no attribute."""

    @classmethod
    @abstractmethod
    def _blank(cls: type[G], kept: dict[str, Any], tensors: dict[str, Tensor]) -> G:
        """What a record belongs to, with nothing in its tensors, some of whose sizes are given."""


def _changed(value: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """A copy with the tensors that `change` makes of the names and tensors here."""
    if isinstance(value, Tensor):
        return change(name.removesuffix("/"), value)
    if is_dataclass(value):
        return replace(value, **_changed(vars(value), change, name))
    if isinstance(value, dict):
        return {key: _changed(part, change, f"{name}{key}/") for key, part in value.items()}
    return value


def _entries(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor to be stored: as it is, or if three quarters are empty, its other entries.

    Of every row how many there are, and the column and value of each, whole numbers in as few bytes
    as hold them. Empty is 0, or -1 in a table that has more of those.
    """
    if tensor.ndim < 2 or not tensor.numel():
        return {name: tensor}
    rows = tensor.reshape(len(tensor), -1)
    zeros, ones = (int((rows == value).sum()) for value in (0, -1))
    if 4 * max(zeros, ones) < 3 * rows.numel():  # the places of more would not fit into memory
        return {name: tensor}
    fill = -1 if ones > zeros else 0
    row, column = (rows != fill).nonzero(as_tuple=True)
    return {
        f"{name}@shape": torch.tensor([*tensor.shape, fill]),
        f"{name}@counts": _short(row.bincount(minlength=len(rows))),
        f"{name}@columns": _short(column),
        f"{name}@values": _short(rows[row, column]),
    }


def _short(values: Tensor) -> Tensor:
    """Whole numbers in the fewest bytes that hold them; others as they are."""
    if values.is_floating_point() or not values.numel():
        return values
    low, high = (int(x) for x in values.aminmax())
    kinds = (torch.int8, torch.int16, torch.int32)
    fits = (k for k in kinds if torch.iinfo(k).min <= low and high <= torch.iinfo(k).max)
    return values.to(next(fits, values.dtype))


def _from_entries(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of which `_entries` were stored, and all others."""
    tensors = {name: tensor for name, tensor in stored.items() if "@" not in name}
    for name in (key.removesuffix("@shape") for key in stored if key.endswith("@shape")):
        counts, columns, values = (stored[f"{name}@{x}"] for x in ("counts", "columns", "values"))
        *shape, fill = stored[f"{name}@shape"].tolist()
        rows = torch.full((len(counts), math.prod(shape[1:])), fill, dtype=values.dtype)
        row = torch.arange(len(counts)).repeat_interleave(counts.long())
        rows[row, columns.long()] = values
        tensors[name] = rows.view(shape)
    return tensors


def gather(
    result: G,
    add: Callable[[G, Batch], None],
    batches: TokenBatches,
    n_batches: int,
    output: str | Path | None,
    save_every: float,
    device: torch.device,
) -> G:
    """`add` batches to a result, on a device, until it has `n_batches` or the data ends.

    It is written to `output`, if that is given, at the end and every `save_every` seconds, and
    returned on the CPU.
    """
    result, last = result.moved(device), time.monotonic()
    while result.n_batches < n_batches and (batch := next(batches, None)) is not None:
        add(result, batch.to(device))
        result.data_state = batches.state_dict()
        if output is not None and time.monotonic() - last >= save_every:
            result.save(output)
            # Measured from the end, so that slow writing never takes most of the time.
            last = time.monotonic()
    if output is not None:
        result.save(output)
    return result.moved(torch.device("cpu"))


def check_output(n_batches: int, output: str | Path | None, resume: bool) -> None:
    """Refuse to go on from nothing, and to write over what is stored in `output`."""
    if n_batches < 1:
        raise InputError(f"n_batches is {n_batches}; expected at least 1.")
    if resume and output is None:
        raise InputError("resume=True needs output=..., the directory to go on from.")
    if output is not None and not resume and (there := storage.kind_of(Path(output))) is not None:
        raise ConfigError(
            f"output={str(output)!r} already holds a {there}. Pass resume=True to continue it, or "
            "another directory."
        )


def check_same(
    output: str | Path | None, then: BaseModel, now: BaseModel, others: Sequence[str] = ()
) -> None:
    """Refuse to go on with other settings, or where `others` names further differences."""
    pairs = [(name, getattr(then, name), value) for name, value in now]
    different = [f"{name} was {old!r} and is {new!r}" for name, old, new in pairs if old != new]
    if different := [*different, *others]:
        raise ArtefactError(
            f"{output}: this was started with other arguments: {'; '.join(different)}. Resume with "
            "the same ones, or choose a new output directory."
        )


def check_size(empty: Callable[[], Gathered], limit: float, advice: str) -> str:
    """Refuse a result whose own tensors take more than `limit` GiB, before it is made.

    Returns:
        How much memory they take, in words.
    """
    with torch.device("meta"):
        made = {name: x for name, x in empty()._tensors().items() if x.is_meta}
    total = sum(x.nbytes for x in made.values()) / 2**30
    if total > limit:
        largest = sorted(made, key=lambda name: -made[name].nbytes)[:3]
        listed = ", ".join(f"{name}: {made[name].nbytes / 2**30:.2g} GiB" for name in largest)
        raise InputError(
            f"the tables take {total:.2g} GiB ({listed}, ...), more than memory_limit={limit:g}; "
            f"{limit / total:.1%} of that fits. {advice}, or raise memory_limit."
        )
    return f"the tables take {total:.2g} GiB"


def chosen(
    argument: str, names: Sequence[str] | None, every: str | None, available: tuple[str, ...]
) -> tuple[str, ...]:
    """Those of the available names that a user asks for, in their own order."""
    if names == every:
        return available
    if isinstance(names, str) or not names or not {*names} <= {*available}:
        raise InputError(
            f"{argument}={names!r}; expected {every!r} or a list of some of {list(available)}."
        )
    return tuple(name for name in available if name in names)


def origin(vpd: Decomposition, vocabulary: int) -> dict[str, Any]:
    """What every result says of its decomposition and of its model's tokens."""
    tokenizer = getattr(vpd.model, "tokenizer", None)
    strings = token_strings(tokenizer, vocabulary)
    return {"fingerprint": fingerprint(vpd), "strings": strings, "labels": vpd.labels}


def token_strings(tokenizer: Any, vocabulary: int) -> list[str]:
    """The text of every token id, leading spaces included.

    A part of a character, which has no text of its own, is written as in the vocabulary; an id
    without any text or tokenizer in angle brackets. Models may have more ids than their tokenizer.
    """
    strings = [f"<{token}>" for token in range(vocabulary)]
    if tokenizer is None:
        return strings
    ids = list(range(min(len(tokenizer), vocabulary)))
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    for i, text, piece in zip(ids, texts, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            strings[i] = piece or strings[i]
        else:  # SentencePiece drops the space in front of the first token that it decodes
            dropped = (piece or "").startswith("▁") and not text.startswith(" ")
            strings[i] = " " * dropped + text
    return strings
