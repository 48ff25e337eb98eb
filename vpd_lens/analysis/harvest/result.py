"""`Harvest`: what was gathered, and the questions it answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vpd_lens.analysis.gathering import Gathered, GatheredRecord
from vpd_lens.analysis.harvest.examples import Example, Examples, Firings, random_keys, top_keys
from vpd_lens.analysis.harvest.statistics import Summary, TokenStatistic, TokenTable, Usage
from vpd_lens.decomposition import Layout
from vpd_lens.decomposition.labels import Labels
from vpd_lens.errors import InputError
from vpd_lens.rendering import Shown, titled


class Settings(BaseModel):
    """What decides a harvest, besides model and data: arguments of `vpd_lens.harvest`.

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
            text = f"{first['loc'][0]} is {first['input']!r}: {first['msg'].lower()}."
            raise InputError(text) from None


class HarvestRecord(GatheredRecord):
    """What is stored of a harvest beside its tables and examples."""

    kind = "harvest"

    n_subcomponents: list[int]
    settings: Settings


@dataclass(repr=False, kw_only=True)
class Harvest(Shown, Gathered):
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
        labels: What subcomponents are called: the model's, `model.vpd.labels`, if the harvest was
            made from it or loaded with it.
    """

    record_type = HarvestRecord

    layout: Layout
    settings: Settings
    usage: Usage
    inputs: TokenTable
    outputs: TokenTable
    top: Examples
    random: Examples

    def __post_init__(self) -> None:
        if not self.labels.sizes:
            sizes = dict(zip(self.layout.names, self.layout.sizes, strict=True))
            self.labels = Labels(self.fingerprint, sizes)

    @classmethod
    def empty(
        cls, layout: Layout, vocabularies: tuple[int, int], *, settings: Settings, **kept: Any
    ) -> Harvest:
        """A harvest of nothing yet, for numbers of input and of output tokens."""
        c = layout.total
        return cls(
            layout=layout,
            settings=settings,
            usage=Usage.empty(c),
            inputs=TokenTable.empty(c, vocabularies[0], torch.int32),
            outputs=TokenTable.empty(c, vocabularies[1], torch.float32),
            top=Examples.empty(c, settings.n_top, settings.context),
            random=Examples.empty(c, settings.n_random, settings.context),
            **kept,
        )

    def add(self, firings: Firings, probabilities: Float[Tensor, "batch pos vocab"]) -> None:
        """Gather one batch, with the target model's next-token probabilities on it."""
        self.usage.add(firings)
        self.inputs.count(firings)
        self.outputs.add_mass(firings, probabilities)
        self.top.offer(firings, top_keys(firings), one_per_sequence=True)
        self.random.offer(firings, random_keys(firings, self.settings.seed, self.n_batches))
        self.n_batches += 1

    # ---------------------------------------------------------------- looking

    @property
    def n_positions(self) -> int:
        """Positions gathered so far."""
        return int(self.usage.n_positions)

    def table(self, site: str) -> list[Summary]:
        """How much every subcomponent of a site is used, those with the largest mean CI first.

        `pandas.DataFrame(harvest.table(site))` makes a data frame of the named tuples.

        Raises:
            InputError: If there is no such site.
        """
        return self.usage.summaries(self._columns(site))

    def examples(self, site: str, index: int, kind: str = "top") -> list[Example]:
        """Text where a subcomponent fires.

        Of `kind` `"top"`, those with the largest importance, then absolute activation, one per
        sequence, the largest first; `"random"` ones are drawn uniformly from all its firings.

        Raises:
            InputError: If there is no such subcomponent or kind.
        """
        if kind not in ("top", "random"):
            raise InputError(f"kind={kind!r}; expected 'top' or 'random'.")
        return (self.top if kind == "top" else self.random).of(self._row(site, index))

    def tokens(
        self,
        site: str,
        index: int,
        side: str = "input",
        k: int = 10,
        by: str = "information",
        min_count: float = 0.0,
    ) -> list[TokenStatistic]:
        """The `k` tokens that go most with the firing of a subcomponent, the largest first.

        `side` `"input"` is the token at the position where it fires, `"output"` the target model's
        next-token probabilities there. `by` is `"information"` (recall times PMI), `"recall"`,
        `"precision"` or `"pmi"`. Tokens of a weight below `min_count` there are left out.

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

        Returns:
            `density`, `mean_importance`, `examples` (top ones: `tokens` as text, `importance`,
            `activation`, `focus`), `k` `input_tokens` and `output_tokens` (`token` as text,
            `recall`, `pmi`; ordered by recall times PMI). `None` if it never fired.

        Raises:
            InputError: If there is no such subcomponent.
        """
        row = self._row(site, index)
        if not self.usage.firings[row]:
            return None
        card: dict[str, Any] = {
            "density": float(self.usage.firings[row]) / self.n_positions,
            "mean_importance": float(self.usage.importance[row]) / self.n_positions,
            "examples": [
                example._replace(tokens=[self.strings[i] for i in example.tokens])._asdict()
                for example in self.examples(site, index)
            ],
        }
        for side in ("input", "output"):
            card[f"{side}_tokens"] = [
                {"token": self.strings[t.token], "recall": t.recall, "pmi": t.pmi}
                for t in self.tokens(site, index, side, k)
            ]
        return card

    def trimmed(self, n_tokens: int = 20) -> Harvest:
        """A small copy to be shared: of every subcomponent, `n_tokens` on each side.

        They are those of most information; the others' weights there become 0. Importances and
        activations of examples are rounded to fp16. It cannot be resumed.
        """
        top, random = (
            replace(e, importance=e.importance.half(), activation=e.activation.half())
            for e in (self.top, self.random)
        )
        sides = (self.inputs, self.outputs)
        inputs, outputs = (side.trimmed(self.usage.firings, n_tokens) for side in sides)
        kept = {"inputs": inputs, "outputs": outputs, "top": top, "random": random}
        return replace(self, **kept, data_state=None)

    def __rich__(self) -> Group:
        table = Table(title="Sites", title_justify="left")
        table.add_column("site", overflow="fold")
        for heading in ("C", "fired", "firing at a token", "most important", "fires at"):
            right = heading not in ("most important", "fires at")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for site, size in zip(self.layout.names, self.layout.sizes, strict=True):
            firings, most = self.usage.firings[self._columns(site)], self.table(site)[0]
            seen = self.tokens(site, most.index, k=3) if firings[most.index] else []
            fired, density = int((firings > 0).sum()), float(firings.sum()) / self.n_positions
            texts = Text("  ".join(repr(self.strings[at.token]) for at in seen))
            table.add_row(site, str(size), str(fired), f"{density:.1f}", f":{most.index}", texts)
        return titled(repr(self), table)

    def __repr__(self) -> str:
        alive = int((self.usage.firings > 0).sum())
        return (
            f"Harvest({self.layout.n_sites} sites, {alive} of {self.layout.total} subcomponents "
            f"fired, {self.n_positions} tokens, threshold {self.settings.threshold:g}"
            + (f", {len(self.labels)} labelled)" if self.labels else ")")
        )

    def _columns(self, site: str) -> slice:
        if site not in self.layout.names:
            raise InputError(f"no site named {site!r}; sites: {list(self.layout.names)}.")
        return self.layout.columns(site)

    def _row(self, site: str, index: int) -> int:
        rows = range(self.layout.total)[self._columns(site)]
        if not 0 <= index < len(rows):
            raise InputError(
                f"index is {index}, but {site} has {len(rows)} subcomponents, numbered from 0."
            )
        return rows[index]

    def _own(self) -> dict[str, Any]:
        return {"sites": self.layout.names, "n_subcomponents": self.layout.sizes}

    @classmethod
    def _blank(cls, kept: dict[str, Any], tensors: dict[str, Tensor]) -> Harvest:
        layout = Layout(tuple(kept.pop("sites")), tuple(kept.pop("n_subcomponents")))
        n_in, n_out = (len(tensors.get(f"{x}puts/everywhere", ())) for x in ("in", "out"))
        return cls.empty(layout, (n_in, n_out), **kept)
