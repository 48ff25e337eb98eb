"""Time to a given quality: training under several settings, in turns, against held-out text.

    python benchmarks/quality.py optimiser.kind=adamw --weights FOLDER --goal 3 200 --goal 2.5 150
    python benchmarks/quality.py a.b=1,c=2 d=3 --weights FOLDER --set compile=true --goal 1.5 120

Decomposes the target of `ideas.py` with its configuration (`preset`) and with every variant of it
(as in `settings.py`). They train in turns, a block of steps each, so that a machine's changing
speed reaches all alike. A goal `PGD L0` is reached at the first evaluation in which 20 steps of
fresh attack leave a KL of at most PGD (mean over starts) while L0 is at most L0; at what training
time is the result. Evaluations are not counted, everything else is: warm-up and compilation too.
Learning rates and exponents follow `--steps`, so that a goal which training would reach in fewer
steps is reached late in more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from ideas import EVALUATED_ROWS, TARGET, configured, figures, load_target, tokens, windows
from pairs import ratio
from rich.console import Console
from rich.table import Table
from settings import variant
from torch import Tensor, nn

import vpd_lens
from vpd_lens.experiments.record import Machine, versions
from vpd_lens.files import file_hash, write_text_atomically
from vpd_lens.training import VPDConfig
from vpd_lens.training.compaction import compact_when_due
from vpd_lens.decomposition.subcomponents import align
from vpd_lens.training.step import Stepper, warm_up_faithfulness

Point = dict[str, Any]


class Run:
    """One setting's training, as `vpd_lens.train` does it, a block of steps at a time.

    Args:
        model: Decomposed.
        config: The setting.
        data: Batches.

    Attributes:
        done: Finished steps.
        seconds: Wall-clock time of training so far.
        cpu_seconds: The same in CPU time of all threads.
        blocks: Wall-clock time of each block.
        curve: What was measured, in order.
    """

    def __init__(self, model: nn.Module, config: VPDConfig, data: Iterator[Tensor]) -> None:
        self.model, self.config, self.data = model, config, data
        self.stepper = Stepper(model.vpd, config)
        self.done = 0
        self.seconds = self.cpu_seconds = 0.0
        self.blocks: list[float] = []
        self.curve: list[Point] = []

    def advance(self, steps: int) -> None:
        """Train for some steps more; the first call prepares."""
        begun, cpu_begun = time.perf_counter(), time.process_time()
        if self.done == 0:
            if self.config.initialisation == "aligned":
                align(self.model.vpd.subcomponents, self.model.vpd.sites)
            warm_up_faithfulness(self.stepper)
        for index in range(self.done, self.done + steps):
            _, importance = self.stepper.step(next(self.data), index)
            compact_when_due(self.stepper, importance, index + 1)
        self.done += steps
        self.blocks.append(time.perf_counter() - begun)
        self.seconds += self.blocks[-1]
        self.cpu_seconds += time.process_time() - cpu_begun

    def look(self, evaluate: Callable[[nn.Module], Point]) -> Point:
        """Measure what there is, outside the training time."""
        times = {"step": self.done, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        self.curve.append(times | evaluate(self.model))
        return self.curve[-1]


def race(
    runs: dict[str, Run], block: int, every: int, evaluate: Callable[[nn.Module], Point]
) -> Iterator[dict[str, Point]]:
    """Train all in turns, and yield what each round of evaluations found, by name.

    Args:
        runs: By name; equally many steps.
        block: Steps of a turn.
        every: Steps between evaluations, a multiple of `block`; the last is at the end.
        evaluate: Measures a decomposed model.
    """
    order = list(runs)
    (steps,) = {run.config.steps for run in runs.values()}
    for start in range(0, steps, block):
        for name in order:
            runs[name].advance(min(block, steps - start))
        order.reverse()
        done = min(start + block, steps)
        if done % every == 0 or done == steps:
            yield {name: run.look(evaluate) for name, run in runs.items()}


def evaluated(held_out: Tensor) -> Callable[[nn.Module], Point]:
    """A measurement on held-out rows: L0, KL under random masks, KL under attacks of 20 steps."""

    def evaluate(model: nn.Module) -> Point:
        found = figures(model, held_out, [20])
        return {"l0": found["l0"], "stochastic": found["kl"]["stochastic"]} | {
            f"pgd20_{name}": value for name, value in found["adversary"]["20"].items()
        }

    return evaluate


def first_reached(curve: Iterable[Point], goal: tuple[float, float]) -> Point | None:
    """The first point within both bounds of a goal, `(PGD-20 KL, L0)`."""
    kl, l0 = goal
    return next((p for p in curve if p["pgd20_mean"] <= kl and p["l0"] <= l0), None)


def summary(runs: dict[str, Run], goals: list[tuple[float, float]]) -> dict[str, Any]:
    """Each run's curve and when it reached the goals, with times relative to the first run's."""
    base = next(iter(runs.values()))
    return {
        name: {
            "curve": run.curve,
            "goals": [arrival(run.curve, base.curve, goal) for goal in goals],
            "training": relative(run.curve[-1], base.curve[-1]),
            "block_seconds": run.blocks,
            "block_ratio": ratio(run.blocks, base.blocks) if len(run.blocks) > 1 else None,
        }
        for name, run in runs.items()
    }


def arrival(own: list[Point], base: list[Point], goal: tuple[float, float]) -> dict[str, Any]:
    """Steps and seconds to a goal, and their ratio to the base's; `None` where not reached."""
    found, other = first_reached(own, goal), first_reached(base, goal)
    return {
        "pgd20": goal[0],
        "l0": goal[1],
        **{name: found and found[name] for name in ("step", "seconds", "cpu_seconds")},
        "ratio": relative(found, other) if found and other else None,
    }


def relative(own: Point, base: Point) -> dict[str, float]:
    """The training time until a point, relative to that until another."""
    return {name: own[name] / base[name] for name in ("seconds", "cpu_seconds")}


def show(settings: dict[str, Any]) -> None:
    title = "in turns; in brackets time, and CPU time, relative to the first"
    table = Table("", *settings, title=title)
    found = list(settings.values())
    for goals in zip(*(one["goals"] for one in found), strict=True):
        label = f"PGD-20 <= {goals[0]['pgd20']:g} at L0 <= {goals[0]['l0']:g}"
        table.add_row(label, *map(_reached, goals))
    ends = [one["curve"][-1] for one in found]
    times = [{**end, "ratio": one["training"]} for end, one in zip(ends, found, strict=True)]
    table.add_row("all of training", *map(_reached, times))
    table.add_section()
    table.add_row("L0 at the end", *(f"{end['l0']:.0f}" for end in ends))
    table.add_row("stochastic KL", *(f"{end['stochastic']:.2f}" for end in ends))
    attacks = (f"{end['pgd20_mean']:.2f} ({end['pgd20_max']:.2f})" for end in ends)
    table.add_row("PGD-20 KL (worst)", *attacks)
    Console().print(table)


def _reached(found: dict[str, Any]) -> str:
    if found["step"] is None:
        return "never"
    text = f"step {found['step']}, {found['seconds']:.0f} s"
    if found["ratio"] is None:
        return text
    return f"{text} ({found['ratio']['seconds']:.2f}, {found['ratio']['cpu_seconds']:.2f})"


def prepared(options: argparse.Namespace) -> dict[str, Run]:
    """A run of the preset and one of each variant."""
    runs, stream = {}, tokens(options.weights, "train")
    common = variant(options.set) if options.set else {}
    for text in ("preset", *options.variants):
        changes = common if text == "preset" else common | variant(text)
        config = configured(options.steps, options.seed, changes)
        model = load_target(options.weights)
        counts, importance = config.n_subcomponents, config.importance
        vpd_lens.decompose(model, n_subcomponents=counts, importance=importance, seed=config.seed)
        runs[text] = Run(model, config, windows(stream, config, TARGET["n_ctx"]))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="+", metavar="FIELD=VALUE[,...]")
    parser.add_argument("--set", metavar="FIELD=VALUE[,...]", help="of VPDConfig, in all settings")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument(
        "--goal", type=float, nargs=2, action="append", required=True, metavar=("PGD", "L0")
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--block", type=int, default=50)
    parser.add_argument("--every", type=int, default=100, help="a multiple of --block")
    parser.add_argument("--rows", type=int, default=EVALUATED_ROWS, help="evaluated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.every % options.block:
        parser.error(f"--every {options.every} must be a multiple of --block {options.block}")
    torch.set_num_threads(options.threads)
    goals = [(kl, l0) for kl, l0 in options.goal]
    runs = prepared(options)
    held_out = tokens(options.weights, "eval")[: options.rows * TARGET["n_ctx"]]
    evaluate = evaluated(held_out.view(options.rows, TARGET["n_ctx"]))
    record = {
        "weights": file_hash(options.weights / "model.safetensors"),
        "configs": {name: run.config.model_dump(mode="json") for name, run in runs.items()},
        "rows": options.rows,
        "block": options.block,
        "threads": options.threads,
        "versions": versions(),
        "machine": Machine.this().model_dump(),
    }
    for points in race(runs, options.block, options.every, evaluate):
        for name, point in points.items():
            rounded = {key: round(value, 3) for key, value in point.items()}
            print(name, json.dumps(rounded), flush=True)
        record["settings"] = summary(runs, goals)
        if options.json:
            write_text_atomically(options.json, json.dumps(record, indent=2) + "\n")
    show(record["settings"])


if __name__ == "__main__":
    main()
