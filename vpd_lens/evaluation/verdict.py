"""The verdict on a report, in words: what a decomposition promises, and which of it holds.

Every divergence is read as a share of `report.worst`: the smaller of what ablating everything
costs, and of what a model costs that predicts the same at every position. The bounds are
conventions of this library, not results; `PROMISES` has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vpd_lens.evaluation.report import EvalReport

# Share of L0 that contributes nothing from which the verdict says so.
IDLE_SHARE = 0.1

Status = Literal["holds", "partly", "fails"]


@dataclass(frozen=True)
class Promise:
    """Something that a good decomposition does.

    Attributes:
        name: In a word or two.
        question: What is asked.
        holds: Largest value at which it holds.
        fails: Value above which it does not.
        advice: What to change if it does not.
        value: The share that decides, of `report.worst` or of all subcomponents; `None` where it
            was not measured.
    """

    name: str
    question: str
    holds: float
    fails: float
    advice: str
    value: Callable[[EvalReport], float | None]


@dataclass(frozen=True)
class Finding:
    """What came of a promise: its status, and the figure behind it."""

    promise: Promise
    status: Status
    value: float


def _mode(name: str) -> Callable[[EvalReport], float | None]:
    return lambda report: _share(report, report.modes[name]["kl"])


def _share(report: EvalReport, divergence: float) -> float | None:
    return divergence / report.worst if report.worst > 0 else None


def _attack(report: EvalReport) -> float | None:
    """Mean divergence under the longest attack."""
    longest = max(report.pgd, key=int, default=None)
    return None if longest is None else _share(report, report.pgd[longest]["mean"])


def _aggregation(report: EvalReport) -> float | None:
    """The worst that the needs of any number of other tokens do, switched on together."""
    if report.audit is None:
        return None
    return _share(report, max(e.mean for e in report.audit.aggregation["donors"].values()))


def _share_in_use(report: EvalReport) -> float | None:
    l0 = report.l0[min(report.l0, key=float)]["total"]
    return l0 / sum(report.n_subcomponents.values())


PROMISES = (
    Promise(
        "faithful",
        "Do all subcomponents together do what the weights do?",
        0.01,
        0.05,
        "raise faithfulness.coefficient, or give more n_subcomponents (at least the matrix' rank).",
        _mode("unmasked"),
    ),
    Promise(
        "random masks",
        "May what is unimportant be ablated at random?",
        0.05,
        0.15,
        "train longer, or lower minimality.coefficient.",
        _mode("stochastic"),
    ),
    Promise(
        "importances",
        "Do the importances alone, as masks, keep the output?",
        0.05,
        0.15,
        "train longer, or lower minimality.coefficient.",
        _mode("ci"),
    ),
    Promise(
        "adversary",
        "May what is unimportant be ablated by an adversary?",
        0.25,
        0.5,
        "train longer, with adversary.coefficient above 0 and sources per position.",
        _attack,
    ),
    Promise(
        "company",
        "May what other tokens need be switched on, all together?",
        0.15,
        0.4,
        "train longer, or lower minimality.coefficient.",
        _aggregation,
    ),
    Promise(
        "sparse",
        "Is only a part of the subcomponents in use at a position?",
        0.25,
        0.5,
        "raise minimality.coefficient, or train longer.",
        _share_in_use,
    ),
)


def findings(report: EvalReport) -> list[Finding]:
    """What came of every promise that the report has a figure for, in the order of `PROMISES`."""
    found = []
    for promise in PROMISES:
        value = promise.value(report)
        if value is not None:
            status: Status = "holds" if value <= promise.holds else "partly"
            found.append(Finding(promise, "fails" if value > promise.fails else status, value))
    return found


def in_words(report: EvalReport) -> str:
    """The verdict in a few sentences: can it be trusted, what holds, what does not, what to do."""
    found = findings(report)
    named = {
        s: [f.promise.name for f in found if f.status == s] for s in ("holds", "partly", "fails")
    }
    measured = {finding.promise.name for finding in found}
    missing = [promise.name for promise in PROMISES if promise.name not in measured]
    if named["fails"]:
        opening = "Do not trust this decomposition."
    elif named["partly"]:
        opening = "Trust this decomposition with care."
    elif missing:
        opening = "This decomposition holds as far as it was tried."
    else:
        opening = "This decomposition can be trusted on data like this."
    sentences = [opening]
    for status, verb in (("fails", "Fails"), ("partly", "Holds in part"), ("holds", "Holds")):
        if named[status]:
            sentences.append(f"{verb}: {', '.join(named[status])}.")
    if missing:
        how = {"adversary": "pgd_steps", "company": "audit=True"}
        asked = ", ".join(f"{name} ({how[name]})" if name in how else name for name in missing)
        sentences.append(f"Not measured: {asked}.")
    if (idle := report.idle()) > IDLE_SHARE:
        sentences.append(
            f"{idle:.0%} of what is in use at a position contributes nothing there: it writes less "
            "than a thousandth of its matrix' output."
        )
    advice = dict.fromkeys(f.promise.advice for f in found if f.status == "fails")
    if advice:
        sentences.append("What to change: " + " ".join(s[0].upper() + s[1:] for s in advice))
    return " ".join(sentences)
