"""`intruder`: have the examples of a subcomponent something in common that nobody else's have?

A question is four passages where a thing fires and one, the intruder, where another thing of a
similar density does. A judge who has to find the intruder is right in one of five by chance. It
takes no labels: it asks whether there is anything to label.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest

from vpd_lens.analysis.harvest import Harvest
from vpd_lens.analysis.interpretation.judges import Judge, Question
from vpd_lens.analysis.interpretation.passages import Responses, of_harvest
from vpd_lens.errors import InputError
from vpd_lens.rendering import Shown, titled

SHOWN = 4  # passages where it fires; the fifth is the intruder
CHANCE = 1 / (SHOWN + 1)
_POOL = 5  # things of similar density, at least, from which an intruder is drawn
_ROWS = 12


@dataclass(frozen=True)
class Score:
    """How often a judge was right.

    Attributes:
        right: Answers that were.
        asked: Questions with an answer.
    """

    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """The share of right answers; NaN without any."""
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson interval of 95 %, as if questions were independent."""
        if not self.asked:
            return (0.0, 1.0)
        found = binomtest(self.right, self.asked, CHANCE).proportion_ci(0.95, "wilson")
        return float(found.low), float(found.high)

    @property
    def p_value(self) -> float:
        """How likely chance alone is to be right so often, or more; exact binomial."""
        if not self.asked:
            return 1.0
        return float(binomtest(self.right, self.asked, CHANCE, alternative="greater").pvalue)


@dataclass(repr=False)
class IntruderReport(Shown):
    """What `intruder` found.

    Attributes:
        judge: The judge's name.
        scores: By the name of what was judged.
        unanswered: Questions without an answer, which count nowhere.
    """

    judge: str
    scores: dict[str, Score]
    unanswered: int = 0
    densities: dict[str, float] = field(default_factory=dict)

    @property
    def overall(self) -> Score:
        """All questions together."""
        return _sum(self.scores.values())

    def by(self, group: Callable[[str], str] | None = None) -> dict[str, Score]:
        """Scores together by a function of the name; `None`: the kind of site, such as `mlp.in`."""
        groups: dict[str, list[Score]] = defaultdict(list)
        for name, score in self.scores.items():
            groups[(group or kind_of)(name)].append(score)
        return {name: _sum(scores) for name, scores in groups.items()}

    def __rich__(self) -> Group:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("", "judged", "questions", "right", "95 % interval", "p"):
            table.add_column(heading, justify="right" if heading else "left")
        groups = self.by()
        rows = dict(list(groups.items())[:_ROWS]) if len(groups) > 1 else {}
        counts = defaultdict(int)
        for name in self.scores:
            counts[kind_of(name)] += 1
        for name, score in (rows | {"all": self.overall}).items():
            low, high = score.interval
            judged = counts.get(name, len(self.scores))
            figures = f"{score.accuracy:.1%}", f"{low:.1%} - {high:.1%}", f"{score.p_value:.1g}"
            table.add_row(Text(name), f"{judged:,}", f"{score.asked:,}", *figures)
        parts = [table, Text(f"{self.unanswered:,} questions have no answer.")]
        title = f"Intruders found by {self.judge}; by chance {CHANCE:.0%}"
        return titled(title, *parts[: 1 + bool(self.unanswered)])


def intruder(
    responses: Harvest | Mapping[str, Responses],
    judge: Judge,
    names: Iterable[str] | None = None,
    *,
    n: int | None = None,
    n_questions: int = 5,
    seed: int = 0,
) -> IntruderReport:
    """Ask a judge to find the passage that does not belong, about subcomponents, clusters, ...

    An intruder is a passage of another thing, drawn from those whose density is at most twice as
    large or as small, or the five nearest. Nothing says that what is judged does not fire there
    too, so accuracies are a little too low.

    Args:
        responses: A harvest, whose random examples are used; or `Responses` by name, of anything.
        judge: `TokenJudge()`, `EmbeddingJudge(embed)`, `EndpointJudge(endpoint)`, or your own.
        names: What to judge; `None`: all with four passages or more.
        n: Judge so many at most, drawn at random.
        n_questions: About each.
        seed: Of what is drawn.

    Raises:
        EndpointError: If the judge is an endpoint that refuses, or fails many times in a row.
        InputError: If there are too few passages, the harvest has no text, or nothing is asked for.

    Examples:
        >>> import vpd_lens
        >>> from vpd_lens.analysis.interpretation import TokenJudge
        >>> from vpd_lens.example import example_harvest
        >>> report = vpd_lens.intruder(example_harvest(), TokenJudge(), n=20)
        >>> report.overall.asked
        100
    """
    if n_questions < 1 or (n is not None and n < 1):
        raise InputError(f"n_questions={n_questions}, n={n}; expected at least 1.")
    known = of_harvest(responses) if isinstance(responses, Harvest) else dict(responses)
    enough = [name for name, found in known.items() if len(found.passages) >= SHOWN]
    wanted = enough if names is None else list(names)
    if few := [name for name in wanted if name not in {*enough}]:
        raise InputError(f"{few[0]!r} has fewer than {SHOWN} passages, or is not among these.")
    if not wanted or len(known) < 2:
        raise InputError(
            f"{len(wanted)} of {len(known)} things have {SHOWN} passages or more; at least one of "
            "them is needed, and another to draw intruders from."
        )
    rng = np.random.default_rng(seed)
    if n is not None and n < len(wanted):
        wanted = [wanted[i] for i in sorted(rng.choice(len(wanted), n, replace=False))]
    pools = _pools(known, wanted)
    asked = [name for name in wanted for _ in range(n_questions)]
    drawn = [_question(known, name, pools[name], rng) for name in asked]
    chosen = judge.choose([question for question, _ in drawn])
    right, answered = defaultdict(int), defaultdict(int)
    for name, (_, place), choice in zip(asked, drawn, chosen, strict=True):
        right[name] += choice == place
        answered[name] += choice is not None
    scores = {name: Score(right[name], answered[name]) for name in wanted}
    unanswered = len(asked) - sum(answered.values())
    return IntruderReport(judge.name, scores, unanswered, {n: known[n].density for n in wanted})


def kind_of(name: str) -> str:
    """What a name is of, whatever block: `mlp.in`, `attn.q`, `cluster`."""
    return re.sub(r"^blocks\.\d+\.", "", name.rpartition(":")[0] or name)


def _pools(known: Mapping[str, Responses], wanted: Iterable[str]) -> dict[str, list[str]]:
    """Others of similar density, by name, from which intruders are drawn."""
    names = np.array([name for name, found in known.items() if found.passages])
    logs = np.log([known[name].density for name in names])
    pools = {}
    for name in wanted:
        far = np.abs(logs - math.log(known[name].density))
        far[names == name] = np.inf
        within = max(math.log(2), np.sort(far)[min(_POOL, len(far) - 1) - 1])
        pools[name] = names[(far <= within) & np.isfinite(far)].tolist()
    return pools


def _question(
    known: Mapping[str, Responses], name: str, pool: list[str], rng: np.random.Generator
) -> tuple[Question, int]:
    """Five passages, and the place of the intruder among them."""
    own, other = known[name].passages, known[pool[rng.integers(len(pool))]].passages
    passages = [own[i] for i in rng.choice(len(own), SHOWN, replace=False)]
    place = int(rng.integers(SHOWN + 1))
    passages.insert(place, other[rng.integers(len(other))])
    return tuple(passages), place


def _sum(scores: Iterable[Score]) -> Score:
    pairs = [(score.right, score.asked) for score in scores]
    return Score(*(sum(column) for column in zip(*pairs, strict=True))) if pairs else Score(0, 0)
