"""`DatasetAttributions`: the summed tables, and the questions they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import Tensor

from vpd_lens import storage
from vpd_lens.analysis.circuits.cut_forward import EMBEDDING
from vpd_lens.analysis.dataset_attribution.nodes import (
    OUTPUT,
    Node,
    Sign,
    find_node,
    ranked,
    strongest_table,
)
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import ArtefactError, InputError

_SMALLEST = 1e-10


class Settings(BaseModel):
    """What decides the attributions, besides model and data.

    Attributes:
        alive_threshold: Mean importance above which a subcomponent is alive.
        absolute: Whether there is an absolute variant.
        frozen: Whether norm scales, attention patterns and gains were held.
        targets: Sites, and `output`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    alive_threshold: float
    absolute: bool
    frozen: bool
    targets: tuple[str, ...]


# Attributes that are tensors by place, and tensors.
_GROUPS = ("alive", "signed", "absolute", "importance", "squares")
_SINGLE = ("token_counts", "logit_squares", "readout")


class _Record(storage.Record):
    """What is stored of `DatasetAttributions` beside tensors, by the names of its attributes."""

    kind = "dataset attributions"

    sites: list[str]
    places: dict[str, tuple[str, ...]]
    strings: list[str]
    settings: Settings
    fingerprint: str
    n_batches: int
    n_positions: int
    data_state: dict[str, Any] | None


@dataclass(repr=False)
class DatasetAttributions:
    """Which subcomponents act on which, summed over data.

    Made by `dataset_attributions`, or read with `DatasetAttributions.load`. Nodes have names:
    `blocks.0.mlp.in:31`, `embed:17` and `output:17` (token ids), or `embed: self` and
    `output: self` (their text).

    Attributes:
        alive: Subcomponents that are sources and targets, by site.
        places: Where the sources of each target site (or `output`) are, in the order of columns.
        signed: Sums `(d a_t / d a_s) a_s g_s`, `[T, n_sources]` by target site. The rows of
            `output` are the axes that `readout` turns into logits.
        absolute: The same with `|a_t|` in the place of `a_t`; not for `output`.
        importance: Sum of the importances of each alive subcomponent, by site.
        squares: Sum of their squared activations.
        token_counts: How often each token occurred.
        logit_squares: Sum of squared logits of each token.
        readout: `[n_axes, vocab]`, the unembedding.
        strings: Text of every token id.
        settings: How they were made.
        fingerprint: Of the decomposition (`vpd_lens.decomposition.saving.fingerprint`).
        n_batches: Batches so far.
        n_positions: Positions so far.
        data_state: Where in the data to go on.
    """

    alive: dict[str, Int[Tensor, " _n"]]
    places: dict[str, tuple[str, ...]]
    signed: dict[str, Float[Tensor, "_T _n_sources"]]
    absolute: dict[str, Float[Tensor, "_T _n_sources"]]
    importance: dict[str, Float64[Tensor, " _n"]]
    squares: dict[str, Float64[Tensor, " _n"]]
    token_counts: Float64[Tensor, " n_tokens"]
    logit_squares: Float64[Tensor, " vocab"]
    readout: Float[Tensor, "n_axes vocab"]
    strings: Sequence[str]
    settings: Settings
    fingerprint: str
    n_batches: int = 0
    n_positions: int = 0
    data_state: dict[str, Any] | None = None

    # ---------------------------------------------------------------- looking

    def sources(
        self,
        node: str,
        top: int | None = 10,
        *,
        absolute: bool = False,
        sign: Sign = "both",
        place: str | None = None,
    ) -> list[tuple[str, float]]:
        """What acts on a node, the strongest first.

        Args:
            node: Its name.
            top: At most so many; `None`: all that are not 0.
            absolute: What changes the size of its activation, whatever the sign of that.
            sign: `"positive"` or `"negative"` values only.
            place: Sources of this site (or `"embed"`) only.

        Returns:
            Names and normalised attributions.

        Raises:
            InputError: If there is no such node or place, or no absolute variant.
        """
        target = self._node(node)
        columns = self.places.get(target.place)
        if columns is None:
            raise InputError(f"{node!r} was no target; those with sources are {list(self.places)}.")
        table = self._table(target.place, absolute)
        is_logit = target.place == OUTPUT
        row = self.readout[:, target.row] @ table if is_logit else table[target.row]
        row = row / self._target_scale(target.place)[target.row]
        parts = row.split([self._n_sources(p) for p in columns])
        found = {p: part / self._source_scale(p) for p, part in zip(columns, parts, strict=True)}
        return ranked(found, self.alive, top, sign, place)

    def targets(
        self,
        node: str,
        top: int | None = 10,
        *,
        absolute: bool = False,
        sign: Sign = "both",
        place: str | None = None,
    ) -> list[tuple[str, float]]:
        """What a node acts on, the strongest first.

        Args:
            node: Its name.
            top: At most so many; `None`: all that are not 0.
            absolute: What changes the size of the targets' activations; logits are left out.
            sign: `"positive"` or `"negative"` values only.
            place: Targets of this site (or `"output"`) only.

        Returns:
            Names and normalised attributions.

        Raises:
            InputError: If there is no such node or place, or no absolute variant.
        """
        source = self._node(node)
        if source.place == OUTPUT:
            raise InputError(f"{node!r} is a logit, which acts on nothing; ask for its sources.")
        found = {}
        for name, columns in self.places.items():
            left_out = absolute and name == OUTPUT and place != OUTPUT
            if source.place not in columns or left_out:
                continue
            table = self._table(name, absolute)
            column = table[:, self._columns(name, source.place)][:, source.row]
            column = self.readout.T @ column if name == OUTPUT else column
            found[name] = column / self._target_scale(name)
        scale = self._source_scale(source.place)[source.row]
        return ranked({n: v / scale for n, v in found.items()}, self.alive, top, sign, place)

    def matrix(
        self, target: str, source: str, *, absolute: bool = False
    ) -> Float[Tensor, "n_targets n_sources"]:
        """All normalised attributions from one place to another.

        Args:
            target: A site, or `"output"` for all tokens of the vocabulary.
            source: A site, or `"embed"` for all tokens.
            absolute: The absolute variant.

        Returns:
            Rows and columns are the alive subcomponents (`alive[site]`), or token ids.

        Raises:
            InputError: If no gradient leads from one to the other.
        """
        if source not in self.places.get(target, ()):
            raise InputError(
                f"no attributions from {source!r} to {target!r}; sources of each target: "
                f"{self.places}."
            )
        table = self._table(target, absolute)[:, self._columns(target, source)]
        table = self.readout.T @ table if target == OUTPUT else table
        return table / self._source_scale(source) / self._target_scale(target)[:, None]

    def table(self, node: str, top: int = 10, *, absolute: bool = False) -> Table:
        """A rich table of a node's strongest sources and targets.

        Args:
            node: Its name.
            top: Number of rows.
            absolute: The absolute variant.
        """
        kind = "absolute attributions" if absolute else "attributions"
        place = node.partition(":")[0]
        sources = self.sources(node, top, absolute=absolute) if place in self.places else []
        targets = [] if place == OUTPUT else self.targets(node, top, absolute=absolute)
        return strongest_table(f"{node}: {kind}", sources, targets, self.strings)

    # ---------------------------------------------------------------- numbers

    def _node(self, name: str) -> Node:
        return find_node(name, self.alive, self.strings, len(self.token_counts), self.readout)

    def _table(self, target: str, absolute: bool) -> Tensor:
        if absolute and not self.settings.absolute:
            raise InputError("absolute=True: these attributions were made with absolute=False.")
        if absolute and target == OUTPUT:
            raise InputError("absolute=True: logits have signed attributions only.")
        return (self.absolute if absolute else self.signed)[target]

    def _n_sources(self, place: str) -> int:
        return len(self.token_counts) if place == EMBEDDING else len(self.alive[place])

    def _columns(self, target: str, source: str) -> slice:
        before = self.places[target][: self.places[target].index(source)]
        start = sum(map(self._n_sources, before))
        return slice(start, start + self._n_sources(source))

    def _source_scale(self, place: str) -> Tensor:
        sums = self.token_counts if place == EMBEDDING else self.importance[place]
        return sums.clamp(min=_SMALLEST).float()

    def _target_scale(self, place: str) -> Tensor:
        squares = self.logit_squares if place == OUTPUT else self.squares[place]
        return (squares / max(1, self.n_positions)).sqrt().clamp(min=_SMALLEST).float()

    # ---------------------------------------------------------------- storing

    def check(self, vpd: Decomposition) -> None:
        """Refuse another decomposition than the one these are of.

        Args:
            vpd: The decomposition.

        Raises:
            ArtefactError: If it is another.
        """
        if fingerprint(vpd) != self.fingerprint:
            raise ArtefactError(
                "these dataset attributions are of another decomposition (its V and U have another "
                "hash). Load the decomposition they were made from, or make them again."
            )

    def save(self, path: str | Path) -> Path:
        """Write them to a folder, whole or not at all.

        Args:
            path: The folder; earlier attributions there are replaced.

        Raises:
            ArtefactError: If the folder cannot be written, or holds something else.
        """
        kept = {name: getattr(self, name) for name in _Record.model_fields if name != "sites"}
        tensors = {f"{g}/{name}": t for g in _GROUPS for name, t in getattr(self, g).items()}
        tensors |= {name: getattr(self, name) for name in _SINGLE}
        record = _Record(sites=list(self.alive), **kept)
        return storage.write(path, record, {"attributions": tensors})

    @classmethod
    def load(cls, path: str | Path, vpd: Decomposition | None = None) -> DatasetAttributions:
        """Read what `save` wrote.

        Args:
            path: The folder.
            vpd: The decomposition that it should belong to; `None` does not check.

        Raises:
            ArtefactError: If a file is missing or damaged, or it is of another decomposition.
        """
        artefact = storage.read(path, _Record)
        tensors, record = artefact.tensors("attributions"), artefact.record
        order = [*record.sites, OUTPUT]
        groups = {
            g: {n: tensors.pop(f"{g}/{n}") for n in order if f"{g}/{n}" in tensors} for g in _GROUPS
        }
        kept = {name: getattr(record, name) for name in _Record.model_fields if name != "sites"}
        try:
            found = cls(**groups, **tensors, **kept)
            shapes = found._shapes()
        except (TypeError, KeyError) as error:
            raise ArtefactError(
                f"{path}: its tensors are not those of dataset attributions ({error}). Make them "
                "again."
            ) from None
        for group, expected in shapes.items():
            storage.require_shapes(artefact.folder, getattr(found, group), expected)
        if vpd is not None:
            found.check(vpd)
        return found

    def _shapes(self) -> dict[str, dict[str, list[int]]]:
        """What follows from the alive subcomponents, places and vocabularies."""
        n_alive = {name: [len(index)] for name, index in self.alive.items()}
        tables = {
            target: [
                len(self.alive.get(target, self.readout)),
                sum(map(self._n_sources, places)),
            ]
            for target, places in self.places.items()
        }
        absolute = {n: size for n, size in tables.items() if n != OUTPUT}
        return {
            "signed": tables,
            "absolute": absolute if self.settings.absolute else {},
            "importance": n_alive,
            "squares": n_alive,
        }

    def moved(self, device: torch.device) -> DatasetAttributions:
        """The same on a device.

        Args:
            device: Where to.
        """
        groups = {g: {n: t.to(device) for n, t in getattr(self, g).items()} for g in _GROUPS}
        return replace(self, **groups, **{n: getattr(self, n).to(device) for n in _SINGLE})

    def __repr__(self) -> str:
        n_alive = sum(map(len, self.alive.values()))
        entries = sum(table.numel() for table in self.signed.values())
        return (
            f"DatasetAttributions({n_alive} alive subcomponents of {len(self.alive)} sites, "
            f"{len(self.places)} target sites, {entries:,} attributions over {self.n_positions:,} "
            f"tokens{', frozen' * self.settings.frozen})"
        )
