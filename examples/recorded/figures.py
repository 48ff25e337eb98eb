"""The figures by which runs are compared, from their records."""

from __future__ import annotations

from recorded.record import RunRecord
from recorded.section import Cell
from vpd_lens.evaluation import EvalReport
from vpd_lens.evaluation.report import headline_attack


def figures(record: RunRecord) -> dict[str, Cell]:
    """One row of a table of runs; `legend` says what the columns are."""
    report = record.report
    robust: dict[str, Cell] = {attack_name(report): attack(report)} if report.pgd else {}
    return {
        "L0": l0(report),
        "alive": int(report.alive["total"]),
        "C": sum(report.n_subcomponents.values()),
        "unmasked": report.modes["unmasked"]["kl"],
        "stochastic": report.modes["stochastic"]["kl"],
        "ci": report.modes["ci"]["kl"],
        **robust,
        "zero": report.modes["zero"]["kl"],
        "min": round(record.training_seconds / 60, 1),
    }


def legend(report: EvalReport) -> str:
    """What the columns of `figures` are."""
    attack = f"{attack_name(report)}: by an adversary of that many steps; " if report.pgd else ""
    return (
        "L0: subcomponents in use per position. alive: in use anywhere. C: all there are. The "
        f"others are the {_MEANINGS[report.divergence]} when the rest is ablated. unmasked: only "
        "the delta is; stochastic: at random; ci: as far as the importances allow; "
        f"{attack}zero: everything. min: minutes of training."
    )


_MEANINGS = {
    "kl": "KL from the original model's next-token distribution, in nats per position,",
    "mse": "mean squared error against the original model's output",
    "custom": "divergence from the original model's output",
}


def l0(report: EvalReport) -> float:
    """Active subcomponents per position, at the first threshold of the evaluation."""
    return next(iter(report.l0.values()))["total"]


def attack_name(report: EvalReport) -> str:
    """What `attack` is called, for example `PGD-20`."""
    return f"PGD-{headline_attack(report)}"


def attack(report: EvalReport) -> float:
    """Divergence under the adversary of the headline; NaN if there was none."""
    steps = headline_attack(report)
    return report.pgd[steps]["mean"] if steps else float("nan")
