"""`DatasetAttributions`: the summed tables, and the questions they answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int
from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING
from vpd_lens.analysis.gathering import Gathered, GatheredRecord
from vpd_lens.errors import InputError
from vpd_lens.rendering import Shown, titled

OUTPUT = "output"
_SMALLEST, _ALL = 1e-10, slice(None)

Sign = Literal["both", "positive", "negative"]


class Settings(BaseModel):
    """What decides the attributions, besides model and data: arguments of `dataset_attributions`.

    Of these, `targets` are always names of sites, and `output`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    alive_threshold: float
    absolute: bool
    frozen: bool
    targets: tuple[str, ...]


class _Record(GatheredRecord):
    kind = "dataset attributions"

    places: dict[str, tuple[str, ...]]
    settings: Settings
    n_positions: int


@dataclass(repr=False, kw_only=True)
class DatasetAttributions(Shown, Gathered):
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
        labels: What subcomponents are called: the model's, `model.vpd.labels`.
    """

    record_type, prefix = _Record, "attributions/"

    settings: Settings
    alive: dict[str, Int[Tensor, " _n"]]
    places: dict[str, tuple[str, ...]]
    signed: dict[str, Float[Tensor, "_T _n_sources"]]
    absolute: dict[str, Float[Tensor, "_T _n_sources"]]
    importance: dict[str, Float64[Tensor, " _n"]]
    squares: dict[str, Float64[Tensor, " _n"]]
    token_counts: Float64[Tensor, " n_tokens"]
    logit_squares: Float64[Tensor, " vocab"]
    readout: Float[Tensor, "n_axes vocab"]
    n_positions: int = 0

    @classmethod
    def empty(
        cls,
        alive: dict[str, Tensor],
        readout: Float[Tensor, "n_axes vocab"],
        n_tokens: int,
        *,
        places: dict[str, tuple[str, ...]],
        settings: Settings,
        **kept: Any,
    ) -> DatasetAttributions:
        """Attributions over nothing yet."""
        n = {EMBEDDING: n_tokens, **{name: len(index) for name, index in alive.items()}}
        signed = {
            target: torch.zeros(n.get(target, len(readout)), sum(n[place] for place in columns))
            for target, columns in places.items()
        }
        sums = {name: torch.zeros(n[name], dtype=torch.float64) for name in alive}
        return cls(
            settings=settings,
            alive=alive,
            places=places,
            signed=signed,
            absolute={t: x.clone() for t, x in signed.items() if settings.absolute and t != OUTPUT},
            importance=sums,
            squares={name: total.clone() for name, total in sums.items()},
            token_counts=torch.zeros(n_tokens, dtype=torch.float64),
            logit_squares=torch.zeros(readout.shape[1], dtype=torch.float64),
            readout=readout,
            **kept,
        )

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
        """What acts on a node, the strongest first: names and normalised attributions.

        Args:
            node: Its name.
            top: At most so many; `None`: all that are not 0.
            absolute: What changes the size of its activation, whatever the sign of that.
            sign: `"positive"` or `"negative"` values only.
            place: Sources of this site (or `"embed"`) only.

        Raises:
            InputError: If there is no such node or place, or no absolute variant.
        """
        target, row = self._node(node)
        if target not in self.places:
            raise InputError(f"{node!r} was no target; those with sources are {list(self.places)}.")
        rows = slice(row, row + 1)
        found = {p: self._block(target, p, absolute, rows)[0] for p in self.places[target]}
        return self._ranked(found, top, sign, place)

    def targets(
        self,
        node: str,
        top: int | None = 10,
        *,
        absolute: bool = False,
        sign: Sign = "both",
        place: str | None = None,
    ) -> list[tuple[str, float]]:
        """What a node acts on, the strongest first; see `sources`.

        With `absolute`, what it does to the size of the targets' activations; logits are left out.

        Raises:
            InputError: If there is no such node or place, or no absolute variant.
        """
        source, column = self._node(node)
        if source == OUTPUT:
            raise InputError(f"{node!r} is a logit, which acts on nothing; ask for its sources.")
        columns = slice(column, column + 1)
        found = {
            target: self._block(target, source, absolute, columns=columns)[:, 0]
            for target, of_target in self.places.items()
            if source in of_target and not (absolute and target == OUTPUT != place)
        }
        return self._ranked(found, top, sign, place)

    def matrix(
        self, target: str, source: str, *, absolute: bool = False
    ) -> Float[Tensor, "n_targets n_sources"]:
        """All normalised attributions from one place to another.

        Rows and columns are the alive subcomponents of a site (`alive[site]`), or the token ids of
        the target `"output"` and the source `"embed"`.

        Raises:
            InputError: If no gradient leads from one to the other.
        """
        if source not in self.places.get(target, ()):
            raise InputError(
                f"no attributions from {source!r} to {target!r}; sources of each target: "
                f"{self.places}."
            )
        return self._block(target, source, absolute)

    def table(self, node: str, top: int = 10, *, absolute: bool = False) -> Table:
        """A rich table of a node's `top` strongest sources and targets."""
        place = node.partition(":")[0]
        sources = self.sources(node, top, absolute=absolute) if place in self.places else []
        targets = [] if place == OUTPUT else self.targets(node, top, absolute=absolute)
        title = Text(f"{self.labels.named(node)}: {'absolute ' * absolute}attributions")
        table = Table(title=title, title_justify="left")
        for heading in ("source", "target"):
            table.add_column(heading, overflow="fold")
            table.add_column(justify="right")
        for pair in zip_longest(self._shown(sources), self._shown(targets), fillvalue=("", "")):
            table.add_row(*map(Text, sum(pair, ())))  # as Text: brackets in a token are no markup
        return table

    def _shown(self, found: list[tuple[str, float]]) -> Iterator[tuple[str, str]]:
        for name, value in found:
            place, _, index = name.partition(":")
            text = f" {self.strings[int(index)]!r}" if place in (EMBEDDING, OUTPUT) else ""
            yield self.labels.named(name) + text, f"{value:+.3f}"

    def __rich__(self) -> Group:
        table = Table(title="Targets", title_justify="left")
        for heading in ("site", "alive", "what acts on it"):
            right = heading == "alive"
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for target, places in self.places.items():
            alive = str(len(self.alive[target])) if target in self.alive else ""
            table.add_row(target, alive, ", ".join(places))
        return titled(repr(self), table)

    def __repr__(self) -> str:
        n_alive = sum(map(len, self.alive.values()))
        entries = sum(table.numel() for table in self.signed.values())
        return (
            f"DatasetAttributions({n_alive} alive subcomponents of {len(self.alive)} sites, "
            f"{len(self.places)} target sites, {entries:,} attributions over {self.n_positions:,} "
            f"tokens{', frozen' * self.settings.frozen})"
        )

    # ---------------------------------------------------------------- numbers

    def _block(
        self, target: str, source: str, absolute: bool, rows: slice = _ALL, columns: slice = _ALL
    ) -> Float[Tensor, "n_targets n_sources"]:
        """Normalised attributions from some sources at one place to some targets at another."""
        if absolute and not self.settings.absolute:
            raise InputError("absolute=True: these attributions were made with absolute=False.")
        if absolute and target == OUTPUT:
            raise InputError("absolute=True: logits have signed attributions only.")
        table = (self.absolute if absolute else self.signed)[target]
        table = table[:, self._columns(target, source)][:, columns]
        table = self.readout[:, rows].T @ table if target == OUTPUT else table[rows]
        squares = self.logit_squares if target == OUTPUT else self.squares[target]
        rms = (squares[rows] / max(1, self.n_positions)).sqrt().clamp(min=_SMALLEST).float()
        sums = self._weights(source)[columns].clamp(min=_SMALLEST).float()
        return table / sums / rms[:, None]

    def _weights(self, source: str) -> Float64[Tensor, " n_sources"]:
        """What every source at a place counted in all."""
        return self.token_counts if source == EMBEDDING else self.importance[source]

    def _columns(self, target: str, source: str) -> slice:
        before = self.places[target][: self.places[target].index(source)]
        start = sum(len(self._weights(place)) for place in before)
        return slice(start, start + len(self._weights(source)))

    def _ranked(
        self, found: Mapping[str, Tensor], top: int | None, sign: Sign, place: str | None
    ) -> list[tuple[str, float]]:
        """Names and values of some places, the strongest first; what is 0 is left out."""
        if sign not in ("both", "positive", "negative"):
            raise InputError(f"sign={sign!r}; expected 'both', 'positive' or 'negative'.")
        if place is not None and place not in found:
            raise InputError(f"place={place!r}; here are {list(found)}.")
        parts = {name: part for name, part in found.items() if place in (None, name)}
        if not parts:
            return []
        values = torch.cat(list(parts.values()))
        size = {"both": values.abs(), "positive": values, "negative": -values}[sign]
        order = size.argsort(descending=True, stable=True)
        order = order[size[order] > 0][:top].tolist()
        rows = {name: self.alive.get(name, torch.arange(len(part))) for name, part in parts.items()}
        names = [f"{name}:{i}" for name, index in rows.items() for i in index.tolist()]
        return [(names[i], float(values[i])) for i in order]

    # ------------------------------------------------------------------ nodes

    def _node(self, name: str) -> tuple[str, int]:
        """A node's place, and its row there: among the alive subcomponents, or a token id."""
        place, colon, rest = name.partition(":")
        if place in (EMBEDDING, OUTPUT) and colon:
            counted = self.token_counts if place == EMBEDDING else self.logit_squares
            strings = self.strings[: len(counted)]
            if rest.isdecimal():
                if int(rest) >= len(strings):
                    raise InputError(f"token {rest} is not in the vocabulary of {len(strings)}.")
                return place, int(rest)
            same = [token for token, string in enumerate(strings) if string == rest]
            if len(same) != 1:
                raise InputError(
                    f"{len(same)} tokens are written {rest!r}; name one by its id, and mind the "
                    "leading space."
                )
            return place, same[0]
        if place not in self.alive or not rest.isdecimal():
            raise InputError(
                f"no node named {name!r}; names are like 'blocks.0.mlp.in:31' (site:subcomponent), "
                f"'embed:17' and 'output:17' (token id) or 'output: self' (its text). Sites: "
                f"{list(self.alive)}."
            )
        found = (self.alive[place] == int(rest)).nonzero()
        if not len(found):
            raise InputError(
                f"{name!r} is not among the {len(self.alive[place])} alive subcomponents of its "
                f"site; alive[{place!r}] lists them. Lower alive_threshold to include more."
            )
        return place, int(found[0, 0])

    def _own(self) -> dict[str, Any]:
        return {"sites": list(self.alive)}

    @classmethod
    def _blank(cls, kept: dict[str, Any], tensors: dict[str, Tensor]) -> DatasetAttributions:
        none = torch.empty(0, 0)
        alive = {n: tensors.get(f"{cls.prefix}alive/{n}", none) for n in kept.pop("sites")}
        readout, counts = (tensors.get(cls.prefix + n, none) for n in ("readout", "token_counts"))
        return cls.empty(alive, readout, len(counts), **kept)
