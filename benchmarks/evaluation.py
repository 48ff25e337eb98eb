"""What each part of an evaluation costs on one batch, beside one forward of the target.

    python benchmarks/evaluation.py --configuration S --model hooked_transformer
    python benchmarks/evaluation.py --configuration M --weights FOLDER --json out.json

Every round runs the target, undecomposed and without gradients, then all parts of
`vpd_lens.evaluate` in its order, then `vpd_lens.evaluate` itself: the parts should add up to it.
The adversary is one start of 20 steps; a full report has three starts, and more steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pairs import ratio
from rich.console import Console
from rich.progress import track
from rich.table import Table
from step import CONFIGURATIONS, batches, build, load_weights, preset, stepper_for
from torch import Tensor, nn

import vpd_lens
from vpd_lens.data import Batch
from vpd_lens.decomposition import Divergence
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.modes import masks_of
from vpd_lens.evaluation.metrics import (
    Sparsity,
    delta_sizes,
    hidden_errors,
    next_token_cross_entropy,
    pgd_curve,
    reported_modes,
)

THRESHOLDS = (0.0, 0.01, 0.1, 0.5)
ROUNDING = (0.0, 0.1, 0.5)
PGD_STEPS = 20
ONCE = "sizes of the deltas"  # per evaluation, not per batch
FORWARD, WHOLE, SUM = "one forward of the target", "vpd_lens.evaluate", "all parts"


class Clock:
    """Milliseconds of the parts of one round, by name."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block."""
        begun = time.perf_counter()
        yield
        self.ms[name] = 1e3 * (time.perf_counter() - begun)


def parts(model: nn.Module, batch: Tensor, clock: Clock, seed: int = 0) -> dict[str, float]:
    """Everything that `vpd_lens.evaluate` computes on a batch, timed; the figures of its report."""
    vpd = model.vpd
    generator = torch.Generator(device=vpd.device).manual_seed(seed)
    sparsity = Sparsity(vpd.layout, THRESHOLDS, vpd.device)
    found: dict[str, float] = {}
    with clock.part("target with its sites' inputs"):
        output, inputs = vpd.target(batch)
        divergence = Divergence(output, vpd.divergence)
    with clock.part("causal importances"), torch.no_grad():
        importance = lower_leaky(vpd.pre_importance(inputs))
    with clock.part("L0, alive, histogram"):
        sparsity.add(importance)
        found["l0"] = sparsity.l0()["0"]["total"]
    with clock.part("cross-entropy of the target"):
        next_token_cross_entropy(output, batch)
    for name, (mode, threshold) in reported_modes(ROUNDING).items():
        hidden = mode in ("stochastic", "ci")
        with clock.part(f"masks: {name}"), torch.no_grad():
            masks = masks_of(mode, importance, vpd.layout, generator, threshold)
            masked, outputs = (
                vpd.run_recording(masks, batch) if hidden else (vpd.run(masks, batch), [])
            )
            found[name] = float(divergence(masked))
            next_token_cross_entropy(masked, batch)
        if hidden:
            with clock.part(f"hidden error: {name}"):
                hidden_errors(vpd, inputs, outputs)
    with clock.part(f"adversary, {PGD_STEPS} steps"):
        curve = pgd_curve(vpd, Batch(batch), importance, divergence, (PGD_STEPS,), 0.1, generator)
        found["pgd"] = curve[PGD_STEPS]
    with clock.part(ONCE):
        delta_sizes(vpd)
    return found


def whole(model: nn.Module, batch: Tensor) -> vpd_lens.EvalReport:
    """The same by the public function."""
    return vpd_lens.evaluate(
        model,
        batch,
        batch_size=len(batch),
        n_batches=1,
        thresholds=THRESHOLDS,
        rounding=ROUNDING,
        pgd_steps=(PGD_STEPS,),
        pgd_restarts=1,
        progress=False,
    )


def measure(name: str, kind: str, folder: Path | None, rounds: int) -> dict[str, Any]:
    """Milliseconds of every part, and their ratios to a forward of the target, in turns."""
    target = build(name, kind)
    if folder is not None:
        load_weights(target, folder)
    model = copy.deepcopy(target)
    stepper_for(name, model, preset(name))
    times: dict[str, list[float]] = {}
    for index, batch in enumerate(track(batches(name, folder, rounds + 1), transient=True)):
        clock = Clock()
        with clock.part(FORWARD), torch.no_grad():
            target(batch)
        parts(model, batch, clock)
        clock.ms[SUM] = sum(clock.ms.values()) - clock.ms[FORWARD]
        with clock.part(WHOLE):
            whole(model, batch)
        if index > 0:  # the first warms up
            for part, milliseconds in clock.ms.items():
                times.setdefault(part, []).append(milliseconds)
    return {
        "configuration": name,
        "model": kind,
        "trained_weights": folder is not None,
        "parts": {
            part: {
                "ms": statistics.median(own),
                "forwards": ratio(own, times[FORWARD]),
                "share": ratio(own, times[SUM])["median"],
            }
            for part, own in times.items()
        },
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }


def show(result: dict[str, Any]) -> None:
    title = f"{result['configuration']} on {result['model']}, {result['threads']} thread(s)"
    table = Table("part", "ms", "/ one forward", "quartiles", "share", title=title)
    for name, part in result["parts"].items():
        if name in (SUM, "target with its sites' inputs"):
            table.add_section()
        forwards = part["forwards"]
        spread = f"{forwards['low']:.1f} to {forwards['high']:.1f}"
        share = "" if name in (FORWARD, WHOLE) else f"{part['share']:.0%}"
        table.add_row(name, f"{part['ms']:.1f}", f"{forwards['median']:.1f}", spread, share)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configuration", choices=CONFIGURATIONS, default="S")
    parser.add_argument(
        "--model", choices=("hooked_transformer", "bridge"), default="hooked_transformer"
    )
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--rounds", type=int, default=10, help="at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.configuration, options.model, options.weights, options.rounds)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
