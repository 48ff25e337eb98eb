"""What settings cost or gain: time and memory of a training step, relative to the preset.

    python benchmarks/settings.py recompute=true micro_batches=4 compile=true
    python benchmarks/settings.py --configuration M adversary.scope=batch,recompute=true

Every argument is one variant, fields of `VPDConfig` separated by commas; the preset itself and all
variants take turns, so that a machine's changing speed reaches all alike: quote the ratios. Memory
is the largest sum of live tensors in a step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from memory import live_tensors, peak_of_step
from rich.console import Console
from rich.table import Table
from step import CONFIGURATIONS, batches, build, preset, stepper_for
from torch import nn

from vpd_lens.config import parse_yaml
from vpd_lens.training.step import Stepper


def variant(text: str) -> dict[str, Any]:
    """`a.b=1,c=true` as a mapping."""
    pairs = (pair.split("=", 1) for pair in text.split(","))
    return {path: parse_yaml(value, path) for path, value in pairs}


def steppers(name: str, model: nn.Module, variants: list[str]) -> dict[str, Stepper]:
    """A stepper of the preset and of each variant, on copies of one model."""
    base, made = preset(name), {}
    for text in ("preset", *variants):
        config = base if text == "preset" else base.replaced(variant(text))
        made[text] = stepper_for(name, copy.deepcopy(model), config)
    return made


def measure(name: str, kind: str, variants: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds in turns, their ratios to the preset, and peak memory."""
    made = steppers(name, build(name, kind), variants)
    data = batches(name, None, rounds + 3)
    for stepper in made.values():
        for index in range(2):
            stepper.step(data[index], index)
    times: dict[str, list[float]] = {text: [] for text in made}
    for index, batch in enumerate(data[2:-1], start=2):
        for text, stepper in made.items():
            begun = time.perf_counter()
            stepper.step(batch, index)
            times[text].append(1e3 * (time.perf_counter() - begun))
    return {
        "configuration": name,
        "model": kind,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "torch": torch.__version__,
        "variants": {
            text: {
                "ms": statistics.median(times[text]),
                "ratio": statistics.median(
                    own / base for own, base in zip(times[text], times["preset"], strict=True)
                ),
                "peak_bytes": peak(made, text, data[-1], rounds),
            }
            for text in made
        },
    }


def peak(made: dict[str, Stepper], text: str, batch: torch.Tensor, step: int) -> int:
    """Live tensors of one variant at the worst moment of a step; the others' are left out."""
    own = made[text]
    others = [value for value in made.values() if value is not own]
    resting = live_tensors() - sum(_size(other) for other in others)
    return resting + peak_of_step(own, batch, step)


def _size(stepper: Stepper) -> int:
    """Bytes that a resting stepper holds: model, parameters, moments, sources."""
    tensors = [*stepper.vpd.model.parameters(), *stepper.vpd.model.buffers(), *stepper.weights]
    optimisers = list(stepper.optimisers)
    for group in stepper.parameters.values():
        tensors += group
    if stepper.adversary is not None:
        tensors += stepper.adversary.leaves()
        optimisers.append(stepper.adversary.optimiser)
    for optimiser in optimisers:
        tensors += [t for s in optimiser.state.values() for t in s.values() if torch.is_tensor(t)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def show(result: dict[str, Any]) -> None:
    title = f"{result['configuration']} on {result['model']}, {result['threads']} thread(s)"
    table = Table("variant", "ms", "time / preset", "peak MB", "memory / preset", title=title)
    base = result["variants"]["preset"]["peak_bytes"]
    for text, figures in result["variants"].items():
        table.add_row(
            text,
            f"{figures['ms']:.0f}",
            f"{figures['ratio']:.2f}",
            f"{figures['peak_bytes'] / 1e6:.0f}",
            f"{figures['peak_bytes'] / base:.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="+", metavar="FIELD=VALUE[,...]")
    parser.add_argument("--configuration", choices=CONFIGURATIONS, default="S")
    parser.add_argument(
        "--model", choices=("hooked_transformer", "bridge"), default="hooked_transformer"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.configuration, options.model, options.variants, options.rounds)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
