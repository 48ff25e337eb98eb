"""`label`: names for subcomponents by a language model, from what a harvest says of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict
from rich.console import Group
from rich.text import Text

from vpd_lens.analysis.cards import Cards
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.analysis.interpretation.endpoint import Endpoint, Prompt, Spent, ask
from vpd_lens.analysis.interpretation.evidence import WORDS, prompt
from vpd_lens.analysis.interpretation.passages import require_text
from vpd_lens.decomposition.labels import HAND, Label, Labels
from vpd_lens.errors import InputError
from vpd_lens.progress import Progress
from vpd_lens.rendering import Shown


def _short(text: str) -> str:
    if not 1 <= len(text.split()) <= WORDS:
        raise ValueError(f"a label of {len(text.split())} words, expected 1 to {WORDS}")
    return text


class Named(BaseModel):
    """What a model answers."""

    model_config = ConfigDict(extra="forbid")

    reasoning: str
    label: Annotated[str, AfterValidator(_short)]


@dataclass(repr=False)
class LabelRun(Shown):
    """What `label` did, or with `dry_run` would do.

    Attributes:
        labels: All labels, those from before included.
        wanted: Names that were to be labelled.
        done: Those of them that are, by this call.
        failed: Why others are not, by name; the rest was over the budget.
        estimate: What all of them take at most, about: requests, tokens, US dollars.
        spent: What was asked and answered.
        minutes: How long all of them take at least, by the allowed rate.
    """

    labels: Labels
    wanted: list[str]
    estimate: Spent
    minutes: float
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)

    def __rich__(self) -> Group:
        lines = [
            f"{len(self.done):,} of {len(self.wanted):,} labelled, {len(self.failed):,} failed; "
            f"{_words(self.spent)}.",
            f"All of them: at most {_words(self.estimate)}, in {self.minutes:.0f} minutes or more.",
        ]
        shown = [self.labels.named(name) for name in self.done[:10]]
        shown += [f"{name}: {reason}" for name, reason in list(self.failed.items())[:10]]
        return Group(*map(Text, lines + shown))


def _words(spent: Spent) -> str:
    cost = f", {spent.cost:.2f} US dollars" if spent.cost else ""
    return (
        f"{spent.requests:,} requests, {spent.input_tokens:,} tokens of input and "
        f"{spent.output_tokens:,} of output{cost}"
    )


def label(
    harvest: Harvest,
    endpoint: Endpoint | str,
    names: Iterable[str] | None = None,
    *,
    n: int | None = None,
    again: bool = False,
    cards: Cards | None = None,
    n_examples: int = 30,
    save: str | Path | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> LabelRun:
    """Let a language model name subcomponents, from what a harvest says of them.

    Labels go into `harvest.labels`, the model's own if the harvest was made from it or loaded with
    it, each as its answer comes, and to their file if they have one: call again to go on. Labels by
    hand are never replaced. What fails or is over the budget has no label, and the result says why.

    Args:
        harvest: What subcomponents respond to.
        endpoint: Whom to ask, and how much; a text is the name of a model, with default limits.
        names: Of subcomponents; `None`: all that fired, those first that fire most.
        n: Label so many at most.
        again: Also those that a model has labelled before.
        cards: To tell the model, too, what the weights read and write.
        n_examples: Examples shown of each, top ones first.
        save: The file of the labels, or the folder of the saved decomposition, of which those that
            are there are kept; `None`: theirs.
        dry_run: Ask nothing, and say how much it would take.
        progress: Show how far it is and how long it will still take.

    Raises:
        ArtefactError: If the cards are of another decomposition, or the labels cannot be written.
        EndpointError: If the endpoint refuses, or fails many times in a row. What was labelled
            before is kept.
        InputError: If a name has no examples, the harvest has no text, or there is no key.

    Examples:
        >>> import vpd_lens
        >>> from vpd_lens.example import example_harvest
        >>> run = vpd_lens.label(example_harvest(), "some-model", n=3, dry_run=True)
        >>> run.estimate.requests
        3
    """
    if isinstance(endpoint, str):
        endpoint = Endpoint(model=endpoint)
    if n_examples < 1 or (n is not None and n < 0):
        raise InputError(f"n_examples={n_examples}, n={n}; expected at least 1 and at least 0.")
    require_text(harvest)
    if cards is not None:
        cards.check(harvest.fingerprint)
    labels, fired = harvest.labels, _fired(harvest)
    if save is not None and not dry_run:
        labels.join(save)
    wanted = list(fired if names is None else names)
    if silent := [name for name in wanted if name not in fired]:
        raise InputError(
            f"{silent[0]!r} has no examples in this harvest: it never fired, or is no "
            f"subcomponent of {list(harvest.layout.names)}."
        )
    wanted = [name for name in wanted if _open(labels.get(name), again)][:n]
    prompts = {name: prompt(harvest, name, cards, n_examples) for name in wanted}
    run = LabelRun(labels, wanted, *_estimate(endpoint, prompts))
    if dry_run or not wanted:
        return run
    with Progress("Labelling", len(wanted), show=progress, cost=_words(run.estimate)) as bar:
        for name, reply in ask(endpoint, prompts, Named, run.spent):
            bar.advance()
            if reply.answer is None:
                run.failed[name] = reply.reason
                continue
            found = reply.answer
            labels.set(name, found.label, found.reasoning, endpoint.model)
            run.done.append(name)
            if labels.path is not None:
                labels.save()
    return run


def _fired(harvest: Harvest) -> list[str]:
    """Names of those that fired, those first that fire most."""
    rows = [(row, site) for site in harvest.layout.names for row in harvest.table(site)]
    rows.sort(key=lambda found: -found[0].density)
    return [f"{site}:{row.index}" for row, site in rows if row.density]


def _open(label: Label | None, again: bool) -> bool:
    return label is None or (again and label.source != HAND)


def _estimate(endpoint: Endpoint, prompts: dict[str, Prompt]) -> tuple[Spent, float]:
    spent = Spent()
    for one in prompts.values():
        spent.add(endpoint, one.tokens, endpoint.max_answer_tokens, 1)
    return spent, len(prompts) / endpoint.requests_per_minute
