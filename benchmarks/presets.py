"""The preset for small models against the paper's losses, on the quickstart's language model.

    python benchmarks/presets.py --seeds 0 1 --output runs/presets

Trains the quickstart's target if it is not there, decomposes it with each recipe (the preset, also
with one set of sources per sequence, and the paper's losses) at the same learning rate, importance
coefficient and number of steps, and writes a record of every run to `OUTPUT/records`. Interrupted
runs go on, finished ones are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vpd_lens.experiments.quickstart_target import get_target
from vpd_lens.experiments.record import RunRecord
from vpd_lens.experiments.run import Run, Target, perform
from vpd_lens.models import load_model
from vpd_lens.training import VPDConfig

TARGET_STEPS, TARGET_SEED = 2500, 0  # the quickstart's
EVALUATION = {"batch_size": 16, "n_batches": 4, "pgd_steps": [20, 80], "pgd_restarts": 3}


def configurations(steps: int, seed: int) -> dict[str, VPDConfig]:
    """All recipes, by name."""
    small = VPDConfig.small(
        steps=steps, seed=seed, compile=True, log_every=50, checkpoint_every=250
    )
    return {
        "paper-losses": small.with_paper_losses(),
        "per-sequence": small.replaced({"adversary.scope": "sequence"}),
        "small": small,
    }


def show(records: list[RunRecord]) -> None:
    table = Table("run", "L0", "stochastic", "ci", *(f"PGD-{n} (worst)" for n in (20, 80)), "min")
    for record in records:
        report = record.report
        attacks = (report.pgd[n] for n in ("20", "80"))
        table.add_row(
            record.name,
            f"{report.l0['0']['total']:.0f}",
            *(f"{report.modes[mode]['kl']:.2f}" for mode in ("stochastic", "ci")),
            *(f"{attack['mean']:.1f} ({attack['max']:.1f})" for attack in attacks),
            f"{record.training_seconds / 60:.0f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("runs/presets"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.output / "target"
    _, tokens, held_out = get_target(folder, TARGET_STEPS, TARGET_SEED)
    target = Target(
        {"name": "the quickstart's language model", "trained_steps": TARGET_STEPS},
        lambda: load_model(folder),
        tokens,
        held_out,
    )
    records = []
    for seed in options.seeds:
        for name, config in configurations(options.steps, seed).items():
            run = Run(f"{name},steps={options.steps},seed={seed}", target, config, EVALUATION)
            records.append(perform(run, options.output))
            show(records)


if __name__ == "__main__":
    main()
