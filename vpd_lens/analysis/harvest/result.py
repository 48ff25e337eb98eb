"""`Harvest`: what was gathered, and the questions it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from vpd_lens import storage
from vpd_lens.analysis.harvest.examples import Example, Examples, Firings, random_keys, top_keys
from vpd_lens.analysis.harvest.statistics import Summary, TokenStatistic, TokenTable, Usage
from vpd_lens.decomposition import Decomposition, Layout
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import ArtefactError, InputError

_PARTS = ("usage", "inputs", "outputs", "top", "random")


class Settings(BaseModel):
    """What decides a harvest, besides model and data.

    Attributes:
        threshold: A subcomponent fires where its causal importance exceeds this.
        n_top: Top examples of every subcomponent.
        n_random: Random examples of every subcomponent.
        context: Tokens on either side of an example.
        seed: Seed of the random examples.

    Raises:
        InputError: If a value is out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(0.1, ge=0, lt=1)
    n_top: int = Field(10, ge=1)
    n_random: int = Field(20, ge=1)
    context: int = Field(20, ge=0)
    seed: int = Field(0, ge=0)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise InputError(f"{name} is {first['input']!r}: {first['msg'].lower()}.") from None


class HarvestRecord(storage.Record):
    """What is stored of a harvest beside its tables and examples."""

    kind = "harvest"

    sites: list[str]
    n_subcomponents: list[int]
    settings: Settings
    fingerprint: str
    n_batches: int
    data_state: dict[str, Any] | None
    strings: list[str]


@dataclass(repr=False)
class Harvest:
    """What every subcomponent responds to, gathered from a stream of batches.

    Made by `vpd_lens.analysis.harvest.harvest`, or read with `Harvest.load`.

    Attributes:
        layout: The sites and their numbers of subcomponents.
        settings: Threshold, numbers of examples, context and seed.
        fingerprint: Of the decomposition (`vpd_lens.decomposition.saving.fingerprint`).
        strings: Text of every token id.
        usage: How much every subcomponent is used.
        inputs: Tokens at the positions where it fires.
        outputs: The target model's next-token probabilities there.
        top: Its top examples.
        random: Its random examples.
        n_batches: Batches gathered so far.
        data_state: Where in the data to go on.
    """

    layout: Layout
    settings: Settings
    fingerprint: str
    strings: Sequence[str]
    usage: Usage
    inputs: TokenTable
    outputs: TokenTable
    top: Examples
    random: Examples
    n_batches: int = 0
    data_state: dict[str, Any] | None = field(default=None)

    @classmethod
    def empty(
        cls,
        layout: Layout,
        settings: Settings,
        fingerprint: str,
        strings: Sequence[str],
        vocabularies: tuple[int, int],
        device: torch.device,
    ) -> Harvest:
        """A harvest of nothing yet, for numbers of input and of output tokens."""
        c, n = layout.total, settings
        return cls(
            layout,
            settings,
            fingerprint,
            strings,
            Usage.empty(c, device),
            TokenTable.empty(c, vocabularies[0], torch.int32, device),
            TokenTable.empty(c, vocabularies[1], torch.float32, device),
            Examples.empty(c, n.n_top, n.context, device),
            Examples.empty(c, n.n_random, n.context, device),
        )

    def add(
        self,
        tokens: Int[Tensor, "batch pos"],
        importance: Float[Tensor, "batch pos C_total"],
        activation: Float[Tensor, "batch pos C_total"],
        probabilities: Float[Tensor, "batch pos vocab"],
        real: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Gather one batch.

        Args:
            tokens: The model's input.
            importance: Causal importances on it.
            activation: Activations `a ||U_c||`.
            probabilities: The target model's next-token probabilities.
            real: False at pads, which count nowhere; `None`: there are none.
        """
        firings = Firings.of(tokens, importance, activation, self.settings.threshold, real)
        self.usage.add(firings)
        self.inputs.count(firings)
        self.outputs.add_mass(firings, probabilities)
        self.top.offer(firings, top_keys(firings), one_per_sequence=True)
        self.random.offer(firings, random_keys(firings, self.settings.seed, self.n_batches))
        self.n_batches += 1

    def moved(self, device: torch.device) -> Harvest:
        """This harvest with its tables and buffers on a device."""
        moved = {
            name: replace(part, **{key: x.to(device) for key, x in vars(part).items()})
            for name, part in self._parts().items()
        }
        return replace(self, **moved)

    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PARTS}

    # ---------------------------------------------------------------- looking

    @property
    def n_positions(self) -> int:
        """Positions gathered so far."""
        return int(self.usage.n_positions)

    def table(self, site: str) -> list[Summary]:
        """How much every subcomponent of a site is used, those with the largest mean CI first.

        The rows are named tuples: `pandas.DataFrame(harvest.table(site))` makes a data frame.

        Args:
            site: Name of the site.

        Raises:
            InputError: If there is no such site.
        """
        return self.usage.summaries(self._columns(site))

    def examples(self, site: str, index: int, kind: str = "top") -> list[Example]:
        """Text where a subcomponent fires.

        Args:
            site: Name of the site.
            index: Number of the subcomponent within it.
            kind: `"top"`: the largest importances, then absolute activations, one per sequence,
                the largest first; `"random"`: uniformly drawn from all its firings.

        Raises:
            InputError: If there is no such subcomponent or kind.
        """
        if kind not in ("top", "random"):
            raise InputError(f"kind={kind!r}; expected 'top' or 'random'.")
        chosen = self.top if kind == "top" else self.random
        return chosen.of(self._row(site, index))

    def tokens(
        self,
        site: str,
        index: int,
        side: str = "input",
        k: int = 10,
        by: str = "information",
        min_count: float = 0.0,
    ) -> list[TokenStatistic]:
        """Tokens that go with the firing of a subcomponent.

        Args:
            site: Name of the site.
            index: Number of the subcomponent within it.
            side: `"input"`, the token at the position where it fires, or `"output"`, the target
                model's next-token probabilities there.
            k: Number of tokens.
            by: Order: `"information"` (recall times PMI), `"recall"`, `"precision"` or `"pmi"`.
            min_count: Leave out tokens with less weight at its firings.

        Returns:
            The largest first; empty if it never fired.

        Raises:
            InputError: If there is no such subcomponent, side or order.
        """
        if side not in ("input", "output"):
            raise InputError(f"side={side!r}; expected 'input' or 'output'.")
        row = self._row(site, index)
        table = self.inputs if side == "input" else self.outputs
        return table.largest(row, int(self.usage.firings[row]), k, by, min_count)

    def card(self, site: str, index: int, k: int = 10) -> dict[str, Any] | None:
        """Everything about one subcomponent, as JSON-serialisable values.

        Args:
            site: Name of the site.
            index: Number of the subcomponent within it.
            k: Number of input tokens and of output tokens.

        Returns:
            `density`, `mean_importance`, `examples` (top ones: `tokens` as text, `importance`,
            `activation`, `focus`), `input_tokens` and `output_tokens` (`token` as text, `recall`,
            `pmi`; ordered by recall times PMI). `None` if it never fired.

        Raises:
            InputError: If there is no such subcomponent.
        """
        row = self._row(site, index)
        if not self.usage.firings[row]:
            return None
        return {
            "density": float(self.usage.firings[row]) / self.n_positions,
            "mean_importance": float(self.usage.importance[row]) / self.n_positions,
            "examples": [
                example._replace(tokens=[self.strings[i] for i in example.tokens])._asdict()
                for example in self.examples(site, index)
            ],
            "input_tokens": self._card_tokens(self.tokens(site, index, "input", k)),
            "output_tokens": self._card_tokens(self.tokens(site, index, "output", k)),
        }

    def check(self, fingerprint: str) -> None:
        """Refuse another decomposition than the one that was harvested.

        Args:
            fingerprint: The other's, from `vpd_lens.decomposition.saving.fingerprint`.

        Raises:
            ArtefactError: If they differ.
        """
        if fingerprint != self.fingerprint:
            raise ArtefactError(
                f"this harvest belongs to another decomposition: its fingerprint is "
                f"{self.fingerprint[:12]}..., this decomposition's is {fingerprint[:12]}... Load "
                "the decomposition it was made from, or harvest this one."
            )

    # ----------------------------------------------------------------- storing

    def save(self, path: str | Path) -> Path:
        """Write this harvest to a folder, whole or not at all.

        Args:
            path: The folder; an earlier harvest there is replaced.

        Raises:
            ArtefactError: If the folder cannot be written, or holds something else.
        """
        record = HarvestRecord(
            sites=list(self.layout.names),
            n_subcomponents=list(self.layout.sizes),
            settings=self.settings,
            fingerprint=self.fingerprint,
            n_batches=self.n_batches,
            data_state=self.data_state,
            strings=list(self.strings),
        )
        return storage.write(path, record, {name: vars(p) for name, p in self._parts().items()})

    @classmethod
    def load(cls, path: str | Path, vpd: Decomposition | None = None) -> Harvest:
        """Read a harvest.

        Args:
            path: The folder that `save` wrote.
            vpd: The decomposition that it should belong to; `None` does not check.

        Raises:
            ArtefactError: If a file is missing or damaged, or it belongs to another decomposition.
        """
        artefact = storage.read(path, HarvestRecord)
        record, tensors = artefact.record, {name: artefact.tensors(name) for name in _PARTS}
        n_input, n_output = (
            len(tensors[side].get("everywhere", ())) for side in ("inputs", "outputs")
        )
        harvest = cls.empty(
            Layout(tuple(record.sites), tuple(record.n_subcomponents)),
            record.settings,
            record.fingerprint,
            record.strings,
            (n_input, n_output),
            torch.device("meta"),
        )
        for name, part in harvest._parts().items():
            shapes = {key: tensor.shape for key, tensor in vars(part).items()}
            storage.require_shapes(artefact.folder, tensors[name], shapes)
            setattr(harvest, name, type(part)(**tensors[name]))
        harvest.n_batches, harvest.data_state = record.n_batches, record.data_state
        if vpd is not None:
            harvest.check(fingerprint(vpd))
        return harvest

    def __repr__(self) -> str:
        alive = int((self.usage.firings > 0).sum())
        return (
            f"Harvest({self.layout.n_sites} sites, {alive} of {self.layout.total} subcomponents "
            f"fired, {self.n_positions} tokens, threshold {self.settings.threshold:g})"
        )

    def _card_tokens(self, found: list[TokenStatistic]) -> list[dict[str, Any]]:
        return [{"token": self.strings[s.token], "recall": s.recall, "pmi": s.pmi} for s in found]

    def _columns(self, site: str) -> slice:
        if site not in self.layout.names:
            raise InputError(f"no site named {site!r}; sites: {list(self.layout.names)}.")
        return self.layout.columns(site)

    def _row(self, site: str, index: int) -> int:
        columns = self._columns(site)
        if not 0 <= index < columns.stop - columns.start:
            raise InputError(
                f"index is {index}, but {site} has {columns.stop - columns.start} subcomponents, "
                "numbered from 0."
            )
        return columns.start + index
