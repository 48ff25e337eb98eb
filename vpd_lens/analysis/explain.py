"""`explain`: which subcomponents a text needs, where, and what for.

At every token, the causal importances say what the model needs there. Among what is needed, an
effect says what it is needed for: to first order, by how much the log-odds of one token, `log p -
log(1 - p)`, would fall if the subcomponent were ablated at that position and nothing else changed,

    d log-odds(target) / d m_c,t   at masks of 1, the target model itself.

Log-odds, because the probability of a token that is certain hardly moves whatever acts on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from vpd_lens.analysis.cards import Cards
from vpd_lens.analysis.circuits import targets
from vpd_lens.analysis.clustering import Clusters
from vpd_lens.analysis.dataset_attribution import DatasetAttributions
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.masks import NEEDED, Layout
from vpd_lens.errors import InputError
from vpd_lens.rendering import Shown

ORDERS = ("effect", "importance", "size")
_SHALLOW = 6  # blocks; attention and MLPs of more do not fit side by side


class Need(NamedTuple):
    """One subcomponent at one position: its importance, what it writes, and what that does.

    `activation` is `a ||U_c||`, `effect` the fall of the target's log-odds, in nats, if it were
    ablated there, to first order.
    """

    name: str
    importance: float
    activation: float
    effect: float


@dataclass(repr=False, eq=False)
class Explanation(Shown):
    """What `explain` found.

    Attributes:
        strings: The tokens as text.
        importance: Causal importances.
        activation: `a ||U_c||`, the size of what each would write, with the sign of `a`.
        effect: By how much the log-odds of the target would fall without it, in nats.
        target: The token whose probability is explained, as text, and after which position.
        probability: What the model gives it.
        predictions: The likeliest next tokens after every position, with their probabilities.
        layout: The sites and their numbers of subcomponents.
        cards: What is known about each subcomponent.
        threshold: Importance above which a subcomponent counts as needed.
    """

    strings: list[str]
    importance: Float[Tensor, "pos C_total"]
    activation: Float[Tensor, "pos C_total"]
    effect: Float[Tensor, "pos C_total"]
    target: tuple[str, int]
    probability: float
    predictions: list[list[tuple[str, float]]]
    layout: Layout
    cards: Cards
    threshold: float

    def counts(self) -> dict[str, Int[Tensor, " pos"]]:
        """How many subcomponents of every site each position needs."""
        needed = self.layout.split(self.importance > self.threshold)
        return dict(zip(self.layout.names, (part.sum(-1) for part in needed), strict=True))

    def needs(
        self, position: int = -1, k: int | None = 10, by: str = "effect", site: str | None = None
    ) -> list[Need]:
        """The subcomponents that a position needs, those first that matter most.

        Args:
            position: Of the text; negative ones count from its end.
            k: At most so many; `None`: all.
            by: `"effect"`, `"importance"` or `"size"` (importance times activation), the absolute
                value of each.
            site: Of this site only.

        Raises:
            InputError: If there is no such position, order or site.
        """
        position = targets.in_prompt(position, len(self.strings))
        if k is not None and k < 1:
            raise InputError(f"k={k}; expected at least 1, or None for all.")
        if by not in ORDERS:
            raise InputError(f"by={by!r} is not one of {', '.join(ORDERS)}.")
        if site is not None and site not in self.layout.names:
            raise InputError(f"no site named {site!r}; sites: {list(self.layout.names)}.")
        g, a, effect = (x[position] for x in (self.importance, self.activation, self.effect))
        order = {"effect": effect.abs(), "importance": g, "size": (g * a).abs()}[by]
        chosen = (g > self.threshold).nonzero().squeeze(1)
        if site is not None:
            columns = self.layout.columns(site)
            chosen = chosen[(chosen >= columns.start) & (chosen < columns.stop)]
        chosen = chosen[order[chosen].argsort(descending=True, stable=True)][:k]
        values = zip(*(x[chosen].tolist() for x in (g, a, effect)), strict=True)
        names = [self.name(column) for column in chosen.tolist()]
        return [Need(name, *row) for name, row in zip(names, values, strict=True)]

    def name(self, column: int) -> str:
        """The name of a subcomponent, from its column among all."""
        for site, size in zip(self.layout.names, self.layout.sizes, strict=True):
            if column < size:
                return f"{site}:{column}"
            column -= size
        raise IndexError(column)

    def column(self, name: str) -> int:
        """The column of a subcomponent among all; an `InputError` if there is none of that name."""
        site, _, index = name.rpartition(":")
        columns = (
            range(self.layout.total)[self.layout.columns(site)] if site in self.layout.names else ()
        )
        if not index.isdecimal() or int(index) >= len(columns):
            raise InputError(
                f"there is no subcomponent {name!r}; names are like "
                f"'{self.layout.names[0]}:17', of the sites {list(self.layout.names)}."
            )
        return columns[int(index)]

    def to_html(self, path: str | Path, title: str | None = None) -> Path:
        """Write one page that needs no network: tokens by sites, and cards of what they need."""
        from vpd_lens.viz.explain_page import to_html

        return to_html(self, path, title)

    # ---------------------------------------------------------------- showing

    def summary(self, k: int = 8) -> Group:
        """For `rich.print`: how much every token needs, and what matters most for the target."""
        token, position = self.target
        heading = Text.assemble(
            "What the text needs for ", (repr(token), "bold"), f" (probability "
            f"{self.probability:.2f}) after {self.strings[position]!r}",
        )  # fmt: skip
        return Group(heading, self._map(), self._strongest(k))

    def _map(self) -> Table:
        """Numbers of needed subcomponents, tokens by blocks, the fuller the darker."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
        table.add_column("token", no_wrap=True)
        groups = self._groups()
        for name in groups:
            table.add_column(name, justify="right")
        table.add_column("predicts", no_wrap=True, overflow="ellipsis")
        counts = self.counts()
        totals = torch.stack([sum(counts[site] for site in sites) for sites in groups.values()], 1)
        shares = totals / totals.amax(0).clamp(min=1)
        for position, string in enumerate(self.strings):
            cells = [
                Text(str(n), style="bold" if share > 0.5 else "" if share > 0.1 else "dim")
                for n, share in zip(
                    totals[position].tolist(), shares[position].tolist(), strict=True
                )
            ]
            predicted, p = self.predictions[position][0]
            table.add_row(Text(repr(string)), *cells, Text(f"{predicted!r} {p:.2f}"))
        return table

    def _groups(self) -> dict[str, list[str]]:
        """Attention and MLP of every block, or in a deep model whole blocks."""
        blocks = {name.split(".")[1] for name in self.layout.names if name.startswith("blocks.")}
        parts = slice(1, 2 if len(blocks) > _SHALLOW else 3)
        groups: dict[str, list[str]] = {}
        for name in self.layout.names:
            groups.setdefault("\n".join(name.split(".")[parts]) or name, []).append(name)
        return groups

    def _strongest(self, k: int) -> Table:
        """What matters most for the target at any position."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("subcomponent", "at", "g", "effect"):
            right = column in ("g", "effect")
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        heading = "label: fires at → promotes" if self.cards.labels else "fires at → promotes"
        table.add_column(heading, overflow="fold")
        for position, need in self.strongest(k):
            card = self.cards[need.name]
            words = " → ".join(
                " ".join(repr(t.token) for t in tokens[:3])
                for tokens in (card.fires_at, card.promotes)
                if tokens
            )
            figures = f"{need.importance:.2f}", f"{need.effect:+.2f}"
            what = f"{card.label}: {words}" if card.label else words
            table.add_row(need.name, Text(repr(self.strings[position])), *figures, Text(what))
        return table

    def strongest(self, k: int = 10) -> list[tuple[int, Need]]:
        """Positions and needs of the largest absolute effects on the target, in all the text."""
        every = [(at, need) for at in range(len(self.strings)) for need in self.needs(at, k)]
        return sorted(every, key=lambda found: -abs(found[1].effect))[:k]

    def __rich__(self) -> Group:
        return self.summary()


def explain(
    model: nn.Module,
    text: str | Sequence[int] | Tensor,
    target: targets.BehaviourTarget | None = None,
    *,
    position: int = -1,
    harvest: Harvest | None = None,
    attributions: DatasetAttributions | None = None,
    clusters: Clusters | None = None,
    threshold: float = NEEDED,
    prepend_bos: bool | None = None,
) -> Explanation:
    """Which subcomponents a text needs at every token, and which of them matter for a prediction.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        text: Text or token ids of one prompt.
        target: The token, text or id, whose probability effects are of. `None`: the model's
            likeliest one. A `Token` has a position of its own.
        position: After which token of the text the target comes.
        harvest: What subcomponents respond to, for their cards.
        attributions: How they act on each other over a data set, for their cards.
        clusters: Which are active together, for their cards.
        threshold: Importance above which a subcomponent counts as needed.
        prepend_bos: Whether text gets a BOS token; `None`: the model's own default.

    Raises:
        ArtefactError: If the harvest, attributions or clusters are of another decomposition.
        AttachError: If the model carries no decomposition.
        InputError: If the text or the target cannot be used.

    Examples:
        >>> import vpd_lens
        >>> found = vpd_lens.explain(vpd_lens.load_example(), "import os, ")
        >>> print(found)  # doctest: +SKIP
    """
    vpd = targets.explained_decomposition(model)
    if not 0 <= threshold < 1:
        raise InputError(f"threshold={threshold}; expected at least 0 and less than 1.")
    tokens = targets.prompt_tokens(model, text, prepend_bos)
    logits, inputs = vpd.target(tokens[None])
    with torch.no_grad():
        importance = lower_leaky(vpd.pre_importance(inputs))[0]
        activation = torch.cat(
            [
                x[0].float() @ vpd.v(name) * vpd.u(name).norm(dim=1)
                for name, x in zip(vpd.layout.names, inputs, strict=True)
            ],
            dim=-1,
        )
    probabilities = logits[0].float().softmax(-1)
    position, token = _wanted(model, target, position, probabilities)
    effect = _effects(vpd, tokens, position, token)
    best = probabilities.topk(min(3, probabilities.shape[1]))
    predictions = [
        [(targets.token_text(model, t), p) for t, p in zip(ids, values, strict=True)]
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return Explanation(
        strings=[targets.token_text(model, t) for t in tokens.tolist()],
        importance=importance.cpu(),
        activation=activation.cpu(),
        effect=effect.cpu(),
        target=(targets.token_text(model, token), position),
        probability=float(probabilities[position, token]),
        predictions=predictions,
        layout=vpd.layout,
        cards=Cards(model, harvest, attributions, clusters),
        threshold=threshold,
    )


def _wanted(
    model: nn.Module, target: Any, position: int, probabilities: Float[Tensor, "pos vocab"]
) -> tuple[int, int]:
    """Position and token whose log-probability is explained."""
    position = targets.in_prompt(position, len(probabilities))
    if target is None:
        return position, int(probabilities[position].argmax())
    if isinstance(target, str | int) and not isinstance(target, bool):
        target = targets.Token(target, position)
    position, token, other = targets.read_tokens(model, target, *probabilities.shape)
    if other >= 0:
        raise InputError(f"target={target!r}; expected one token, which has a probability.")
    return position, token


@torch.inference_mode(False)
@torch.enable_grad()
def _effects(vpd: Any, tokens: Int[Tensor, " pos"], position: int, token: int) -> Tensor:
    """`d log-odds(token) / d m` at every position, by one backward pass."""
    masks = torch.ones(1, len(tokens), vpd.layout.total, device=vpd.device, requires_grad=True)
    with vpd.undisturbed(), vpd.masked(masks), vpd.frozen_subcomponents():
        logits = vpd.model(tokens[None])[0, position].float()
    others = torch.arange(len(logits), device=logits.device) != token
    log_odds = logits[token] - logits[others].logsumexp(0)
    (found,) = torch.autograd.grad(log_odds, masks)
    return found[0].detach()
