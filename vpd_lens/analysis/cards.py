"""`card`: everything that is known about one subcomponent, on one page.

What it responds to and what the model predicts there come from a harvest; what it reads and writes,
in tokens, heads, neurons and other subcomponents, from the weights (`directions`); what acts on it
and what it acts on over a data set, from attributions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from vpd_lens.analysis.clustering import Clusters
from vpd_lens.analysis.dataset_attribution import DatasetAttributions
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.analysis.harvest.examples import Example
from vpd_lens.analysis.reads_writes import Directions, Neighbour, TokenEffect
from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.decomposition.labels import Labels
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.rendering import Shown

NAMED = ("name", "friend")  # kinds of lists whose entries are subcomponents


@dataclass(repr=False)
class Card(Shown):
    """What is known about one subcomponent; what is not known is empty or `None`.

    Attributes:
        name: `blocks.0.mlp.out:17`.
        label: What it is called, if it has a label; those of others that it names are in `labels`.
        density: Share of tokens at which it fires.
        mean_importance: Over all tokens.
        fires_at: Tokens where it fires, with their share of its firings.
        predicts: Tokens that the model predicts there, with their mean probability.
        promotes: Tokens whose logits one unit of its activation raises most, directly.
        suppresses: Tokens whose logits it lowers most.
        excited_by: Tokens whose embeddings alone activate it most.
        inhibited_by: Tokens whose embeddings activate it least.
        heads: Share of each head in it, of attention.
        neurons: Neurons of the largest weights, with their signed shares.
        upstream: Earlier subcomponents that write along what it reads; against it, if negative.
        downstream: Later ones that read what it writes.
        alike: Those that write, or read, in the same direction.
        sources: What acts on it over the data set of the attributions.
        targets: What it acts on.
        cluster: Number of the group that it is in.
        friends: Others of the group, with the share of its positions at which each is active.
        examples: Text where it fires most, with importances and activations.
        final_scale: Of the final norm, for which `promotes` and `suppresses` hold.
    """

    name: str
    label: str = ""
    density: float | None = None
    mean_importance: float | None = None
    fires_at: list[TokenEffect] = field(default_factory=list)
    predicts: list[TokenEffect] = field(default_factory=list)
    promotes: list[TokenEffect] = field(default_factory=list)
    suppresses: list[TokenEffect] = field(default_factory=list)
    excited_by: list[TokenEffect] = field(default_factory=list)
    inhibited_by: list[TokenEffect] = field(default_factory=list)
    heads: list[float] | None = None
    neurons: list[tuple[int, float]] | None = None
    upstream: list[Neighbour] = field(default_factory=list)
    downstream: list[Neighbour] = field(default_factory=list)
    alike: list[Neighbour] = field(default_factory=list)
    sources: list[tuple[str, float]] = field(default_factory=list)
    targets: list[tuple[str, float]] = field(default_factory=list)
    cluster: int | None = None
    friends: list[tuple[str, float]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    strings: list[list[str]] = field(default_factory=list)
    final_scale: float = 1.0
    labels: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return asdict(self)

    def summary(self) -> Group:
        """For `rich.print`: figures, a row for every kind of fact, examples."""
        table = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for title, text in self._rows():
            table.add_row(title, Text(text))
        return Group(
            Text.assemble((self.name, "bold"), f"  {self.label}"),
            table,
            *map(self._strip, range(len(self.examples))),
        )

    def __rich__(self) -> Group:
        return self.summary()

    def lists(self) -> list[tuple[str, str, list[tuple[str, float]]]]:
        """What is not empty, each as title, kind of entry, and entries with their values.

        Kinds are `"share"` and `"token"`, whose entries are tokens, with a share or an effect;
        `"part"`, heads and neurons with their shares; and `"name"` and `"friend"`, other
        subcomponents, with an effect or a share.
        """
        found: list[tuple[str, str, Any]] = [
            ("fires at", "share", self.fires_at),
            ("model predicts", "share", self.predicts),
            ("promotes", "token", self.promotes),
            ("suppresses", "token", self.suppresses),
            ("excited by", "token", self.excited_by),
            ("inhibited by", "token", self.inhibited_by),
            ("heads", "part", [(f"{h}", share) for h, share in enumerate(self.heads or [])]),
            ("neurons", "part", [(f"{n}", share) for n, share in self.neurons or []]),
            ("reads from", "name", self.upstream),
            ("is read by", "name", self.downstream),
            ("is like", "name", self.alike),
            ("acted on by", "name", self.sources),
            ("acts on", "name", self.targets),
            (f"cluster {self.cluster}", "friend", self.friends),
        ]
        return [
            (title, kind, [tuple(e) for e in entries]) for title, kind, entries in found if entries
        ]

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        if self.density is not None:
            used = f"at {self.density:.2%} of tokens, mean importance {self.mean_importance:.2g}"
            rows.append(("fires", used))
        shown = {"share": "{0!r} {1:.0%}", "token": "{0!r} {1:+.2f}"}
        shown |= {"part": "{0}: {1:.0%}", "name": "{0} {1:+.2f}", "friend": "{0} {1:.0%}"}
        for title, kind, entries in self.lists():
            if kind in NAMED:
                entries = [(self._named(name), value) for name, value in entries]
            rows.append((title, "  ".join(shown[kind].format(*entry) for entry in entries)))
        return rows

    def _named(self, name: str) -> str:
        return f'{name} "{self.labels[name]}"' if name in self.labels else name

    def _strip(self, number: int) -> Text:
        """An example on one line, brighter the more important the subcomponent is."""
        example, line = self.examples[number], Text("  ", no_wrap=True, overflow="ellipsis")
        for at, string in enumerate(self.strings[number]):
            style = "bold reverse" if at == example.focus else "dim"
            style = "underline" if style == "dim" and example.importance[at] > 0.1 else style
            line.append(repr(string)[1:-1], style)
        return line


class Cards:
    """The cards of a model's subcomponents, by name: `cards["blocks.0.mlp.out:17"]`.

    Args:
        model: A decomposed transformer.
        harvest: What subcomponents respond to (`vpd_lens.harvest`).
        attributions: How they act on each other (`vpd_lens.dataset_attributions`).
        clusters: Which are active together (`vpd_lens.cluster`).
        k: Entries of every list.
        n_examples: Examples of every card.

    Raises:
        ArtefactError: If any of these is of another decomposition.
        InputError: If the model has no known residual stream.
    """

    def __init__(
        self,
        model: nn.Module,
        harvest: Harvest | None = None,
        attributions: DatasetAttributions | None = None,
        clusters: Clusters | None = None,
        *,
        k: int = 8,
        n_examples: int = 3,
    ) -> None:
        if k < 1 or n_examples < 0:
            raise InputError(f"k={k}, n_examples={n_examples}; expected at least 1 and 0.")
        self.vpd = decomposition_of(model)
        for given in (attributions, clusters):
            if given is not None:
                given.check(self.vpd)
        self.directions = Directions(self.vpd, harvest)
        self.harvest, self.attributions, self.clusters = harvest, attributions, clusters
        self.k, self.n_examples = k, n_examples

    @property
    def labels(self) -> Labels:
        """What subcomponents are called, those of the model."""
        return self.vpd.labels

    def check(self, decomposition: str) -> None:
        """Refuse the fingerprint of another decomposition than the model's; an `ArtefactError`."""
        if decomposition != (own := fingerprint(self.vpd)):
            raise ArtefactError(
                f"the cards are of the decomposition {own}, and not of {decomposition}. Make them "
                "from the model that the graph is of."
            )

    def __getitem__(self, name: str) -> Card:
        """The card of one subcomponent; an `InputError` if there is none of that name."""
        card = self._of_weights(name)
        self._harvested(card, *self._checked(name))
        card.label = self.labels.text(name)
        named = {other for _, kind, rows in card.lists() if kind in NAMED for other, _ in rows}
        card.labels = {other: text for other in named if (text := self.labels.text(other))}
        return card

    def weights(self, name: str) -> list[list[Any]]:
        """What pages show of what a subcomponent's weights and attributions say: `Card.lists`."""
        return [
            [title, kind, [[text, float(f"{value:.3g}")] for text, value in entries]]
            for title, kind, entries in self._of_weights(name).lists()
        ]

    def for_page(self, name: str) -> dict[str, Any]:
        """What pages show of a subcomponent: what `Harvest.card` says, and its `weights`."""
        site, index = self._checked(name)
        known = self.harvest is not None and site in self.harvest.layout.names
        found = self.harvest.card(site, index, self.k) if known and self.harvest else None
        return (found or {}) | {"weights": self.weights(name)}

    def _harvested(self, card: Card, site: str, index: int) -> None:
        harvest = self.harvest
        if harvest is None or site not in harvest.layout.names:
            return
        found = harvest.card(site, index, self.k)
        card.density = card.mean_importance = 0.0
        if found is None:  # it never fired
            return
        card.density, card.mean_importance = found["density"], found["mean_importance"]
        card.fires_at, card.predicts = (
            [TokenEffect(row["token"], row["recall"]) for row in found[f"{side}_tokens"]]
            for side in ("input", "output")
        )
        card.examples = harvest.examples(site, index)[: self.n_examples]
        card.strings = [[harvest.strings[t] for t in e.tokens] for e in card.examples]

    def _of_weights(self, name: str) -> Card:
        """What weights and attributions say."""
        (site, index), directions, k = self._checked(name), self.directions, self.k
        card = Card(name, final_scale=directions.final_scale)
        if (logits := directions.logits(site, index)) is not None:
            card.promotes, card.suppresses = directions.extremes(logits, k)
        if (embeddings := directions.embeddings(site, index)) is not None:
            card.excited_by, card.inhibited_by = directions.extremes(embeddings, k)
        card.heads = directions.heads(site, index)
        card.neurons = directions.neurons(site, index, k)
        card.upstream = directions.upstream(site, index, k)
        card.downstream = directions.downstream(site, index, k)
        card.alike = directions.alike(site, index, k)
        if self.attributions is not None and index in self.attributions.alive.get(site, ()):
            card.sources = self.attributions.sources(name, k)
            card.targets = self.attributions.targets(name, k)
        if self.clusters is not None and self.clusters.numbers([name])[0] >= 0:
            cluster = self.clusters.of(name)
            both = zip(cluster.members, cluster.shares, strict=True)
            card.cluster = cluster.number
            card.friends = [(other, share) for other, share in both if other != name][:k]
        return card

    def _checked(self, name: str) -> tuple[str, int]:
        site, _, number = name.rpartition(":")
        layout = self.vpd.layout
        if site not in layout.names or not number.isdecimal():
            raise InputError(
                f"there is no subcomponent {name!r}; names are like '{layout.names[0]}:17', of "
                f"the sites {list(layout.names)}."
            )
        if int(number) >= (size := layout.sizes[layout.names.index(site)]):
            raise InputError(f"{name!r}: {site} has {size} subcomponents, numbered from 0.")
        return site, int(number)


def card(
    model: nn.Module,
    name: str,
    harvest: Harvest | None = None,
    attributions: DatasetAttributions | None = None,
    clusters: Clusters | None = None,
) -> Card:
    """Everything that is known about one subcomponent; `Cards` makes many.

    Args:
        model: A decomposed transformer.
        name: The subcomponent, such as `"blocks.0.mlp.out:17"`.
        harvest: What subcomponents respond to; without it, a card says what the weights say.
        attributions: How they act on each other over a data set.
        clusters: Which are active together.

    Raises:
        ArtefactError: If any of these is of another decomposition.
        InputError: If there is no such subcomponent.

    Examples:
        >>> import vpd_lens
        >>> from vpd_lens.example import example_harvest
        >>> model = vpd_lens.load_example()
        >>> found = vpd_lens.card(model, "blocks.3.mlp.out:60", example_harvest())
        >>> found.promotes[0].token
        'U'
    """
    return Cards(model, harvest, attributions, clusters)[name]
