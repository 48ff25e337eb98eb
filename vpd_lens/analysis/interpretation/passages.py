"""Text with the places where something fires: what prompts show and judges are asked about.

Nothing here knows what fires. `of_harvest` makes passages of subcomponents and `of_groups` of
clusters of them; whoever has examples of something else, such as the latents of a transcoder,
makes `Responses` of them and is judged by the same judges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vpd_lens.analysis.harvest import Example, Harvest
from vpd_lens.errors import InputError

_NO_TEXT = re.compile(r"<\d+>")  # what a token is called if there is no tokenizer


@dataclass(frozen=True)
class Passage:
    """A piece of text, and where something fires in it.

    Attributes:
        tokens: The text, token by token.
        fires: Places where it fires, in order.
        focus: The place that the passage was chosen for, one of those.
    """

    tokens: tuple[str, ...]
    fires: tuple[int, ...]
    focus: int

    def __post_init__(self) -> None:
        places = range(len(self.tokens))
        if self.focus not in self.fires or not all(place in places for place in self.fires):
            raise InputError(
                f"focus={self.focus}, fires={self.fires} in {len(self.tokens)} tokens; expected "
                "places of tokens, and the focus to be one of those where it fires."
            )

    def marked(self, before: str = "[[", after: str = "]]") -> str:
        """The text with every token where it fires between two marks."""
        fires = {*self.fires}
        shown = (f"{before}{t}{after}" if i in fires else t for i, t in enumerate(self.tokens))
        return "".join(shown)

    def near(self, before: int, after: int) -> str:
        """The text around the focus, so many tokens on either side."""
        return "".join(self.tokens[max(0, self.focus - before) : self.focus + after + 1])


@dataclass(frozen=True)
class Responses:
    """What one thing responds to: how often it fires, and where, as far as there are examples."""

    density: float
    passages: tuple[Passage, ...]


def of_harvest(harvest: Harvest, kind: str = "random") -> dict[str, Responses]:
    """The responses of all subcomponents that fired, by name.

    Args:
        harvest: What was gathered.
        kind: `"random"` examples, drawn from all firings, or `"top"` ones.

    Raises:
        InputError: If the harvest has no text, or nothing fired.
    """
    require_text(harvest)
    found = {}
    for site in harvest.layout.names:
        for row in harvest.table(site):
            if row.density:
                examples = harvest.examples(site, row.index, kind)
                passages = tuple(passage(harvest, example) for example in examples)
                found[f"{site}:{row.index}"] = Responses(row.density, passages)
    return found


def of_groups(
    responses: Mapping[str, Responses],
    groups: Mapping[str, Sequence[str]],
    densities: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Responses]:
    """The responses of groups, such as clusters, which fire where any member does.

    A passage shows where one member fires. Members have passages in proportion to how often they
    fire; as many in all as the member that has most.

    Args:
        responses: Of the members.
        groups: Names of the members by that of the group; those that never fired are left out.
        densities: How often each group fires. `None`: as if members fired independently.
        seed: Of the choice of passages.

    Raises:
        InputError: If no member of any group has responses.
    """
    rng, found = np.random.default_rng(seed), {}
    for name, members in groups.items():
        known = [responses[member] for member in members if member in responses]
        if not known:
            continue
        pool = [(r.density / len(r.passages), p) for r in known for p in r.passages]
        weights = np.array([weight for weight, _ in pool])
        size = max(len(r.passages) for r in known)
        chosen = rng.choice(len(pool), size, replace=False, p=weights / weights.sum())
        density = 1 - math.prod(1 - r.density for r in known)
        density = density if densities is None else densities[name]
        found[name] = Responses(density, tuple(pool[i][1] for i in chosen))
    if not found:
        raise InputError("no member of these groups has responses; name subcomponents that fired.")
    return found


def passage(harvest: Harvest, example: Example) -> Passage:
    """An example of a harvest; it fires above the harvest's threshold."""
    above = enumerate(example.importance)
    fires = {i for i, g in above if g > harvest.settings.threshold} | {example.focus}
    strings = tuple(harvest.strings[token] for token in example.tokens)
    return Passage(strings, tuple(sorted(fires)), example.focus)


def require_text(harvest: Harvest) -> None:
    """Refuse a harvest that nobody could read; an `InputError`."""
    if not harvest.usage.firings.any():
        raise InputError(
            "nothing fired in this harvest, so there are no examples; harvest more text, or with a "
            "lower threshold."
        )
    if all(_NO_TEXT.fullmatch(string) for string in harvest.strings):
        raise InputError(
            "this harvest has token ids and no text, because its model had no tokenizer. Give the "
            "model one, and harvest again."
        )
