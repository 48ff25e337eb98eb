"""`DatasetAttributions`: the summed tables, and the questions they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float64, Int
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING
from vpd_lens.analysis.dataset_attribution.names import Node, find_node
from vpd_lens.analysis.dataset_attribution.ranking import Sign, ranked
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import ArtefactError, InputError

if TYPE_CHECKING:
    from rich.table import Table

OUTPUT = "output"

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
        from vpd_lens.analysis.dataset_attribution.table import table

        return table(self, node, top, absolute)

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
        from vpd_lens.decomposition.saving import fingerprint

        if fingerprint(vpd) != self.fingerprint:
            raise ArtefactError(
                "these dataset attributions are of another decomposition (its V and U have another "
                "hash). Load the decomposition they were made from, or make them again."
            )

    def save(self, path: str | Path) -> Path:
        """Write a directory; see `vpd_lens.analysis.dataset_attribution.store`."""
        from vpd_lens.analysis.dataset_attribution.store import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, vpd: Decomposition | None = None) -> DatasetAttributions:
        """Read what `save` wrote.

        Args:
            path: The directory.
            vpd: The decomposition that it should belong to; `None` does not check.

        Raises:
            ArtefactError: If a file is missing or damaged, or it is of another decomposition.
        """
        from vpd_lens.analysis.dataset_attribution.store import load

        found = load(Path(path))
        if vpd is not None:
            found.check(vpd)
        return found

    def moved(self, device: torch.device) -> DatasetAttributions:
        """The same on a device.

        Args:
            device: Where to.
        """
        from vpd_lens.analysis.dataset_attribution.store import GROUPS, SINGLE

        groups = {g: {n: t.to(device) for n, t in getattr(self, g).items()} for g in GROUPS}
        return replace(self, **groups, **{n: getattr(self, n).to(device) for n in SINGLE})

    def __repr__(self) -> str:
        n_alive = sum(map(len, self.alive.values()))
        entries = sum(table.numel() for table in self.signed.values())
        return (
            f"DatasetAttributions({n_alive} alive subcomponents of {len(self.alive)} sites, "
            f"{len(self.places)} target sites, {entries:,} attributions over {self.n_positions:,} "
            f"tokens{', frozen' * self.settings.frozen})"
        )
