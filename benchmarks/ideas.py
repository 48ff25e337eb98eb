"""Ideas of the method's authors, each a few lines over this library's training step.

    python benchmarks/ideas.py smooth-l0 --weights FOLDER
    python benchmarks/ideas.py smooth-l0 --weights FOLDER --seed 1 --set minimality.coefficient=1e-3

Decomposes the target S of `step.py` with `VPDConfig.small()` and one idea, evaluates it and writes
a record with everything that is needed to repeat it to `docs/results/ideas`. `FOLDER` holds
`model.safetensors`, `train_tokens.npy` and `eval_tokens.npy` of a trained target.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from idea_steps import IDEAS, Idea
from rich.progress import track
from safetensors.torch import load_file
from step import CONFIGURATIONS, build, load_weights
from torch import Tensor, nn

import vpd_lens
from vpd_lens.config import parse_yaml
from vpd_lens.experiments.record import Machine, versions
from vpd_lens.files import file_hash, write_json
from vpd_lens.training import VPDConfig
from vpd_lens.decomposition.subcomponents import align
from vpd_lens.training.step import warm_up_faithfulness

TARGET = CONFIGURATIONS["S"]
COUNTS = {**TARGET["counts"], "q": 64, "k": 64}
EVALUATED_ROWS = 128


def load_target(folder: Path) -> nn.Module:
    """The trained target, whole: matrices by `step.py`, embeddings and norms here."""
    model = build("S", "hooked_transformer")
    load_weights(model, folder)
    tensors = load_file(folder / "model.safetensors")
    named = {"embed.W_E": "embed.weight", "ln_final.w": "norm_out.scale"}
    for layer in range(TARGET["target"]["n_layers"]):
        named[f"blocks.{layer}.ln1.w"] = f"layers.{layer}.norm_attn.scale"
        named[f"blocks.{layer}.ln2.w"] = f"layers.{layer}.norm_mlp.scale"
    rest = {name: tensors[saved] for name, saved in named.items()}
    model.load_state_dict(rest | {"unembed.W_U": tensors["unembed.weight"].T}, strict=False)
    return model


def tokens(folder: Path, split: str) -> Tensor:
    return torch.from_numpy(np.load(folder / f"{split}_tokens.npy").astype(np.int64))


def windows(stream: Tensor, config: VPDConfig, length: int) -> Iterator[Tensor]:
    """Batches of random windows of a token stream, for ever."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    positions = torch.arange(length)
    while True:
        shape = (config.batch_size, 1)
        starts = torch.randint(len(stream) - length, shape, generator=generator)
        yield stream[starts + positions]


def configured(steps: int, seed: int, changes: dict[str, Any]) -> VPDConfig:
    """The preset with the shapes of the target, and changes to it."""
    return VPDConfig.small(steps=steps, seed=seed).replaced(
        {
            "n_subcomponents": {rf"\.{part}$": count for part, count in COUNTS.items()},
            **{f"importance.{name}": value for name, value in TARGET["importance"].items()},
            "minimality.coefficient": 1.2e-3,
            **changes,
        }
    )


def train(model: nn.Module, stepper: Idea, stream: Tensor) -> dict[str, float]:
    """Train as `vpd_lens.train` does; seconds, without the first step, which compiles."""
    config = stepper.config
    if config.initialisation == "aligned":
        align(model.vpd.subcomponents, model.vpd.sites)
    warm_up_faithfulness(stepper)
    data = windows(stream, config, TARGET["n_ctx"])
    wall = cpu = 0.0
    for index in track(range(config.steps), "Training"):
        stepper.step(next(data), index)
        if index == 0:
            wall, cpu = time.perf_counter(), time.process_time()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def figures(model: nn.Module, held_out: Tensor, attack: list[int]) -> dict[str, Any]:
    """What the table of the documentation shows."""
    report = vpd_lens.evaluate(
        model, held_out, batch_size=len(held_out), n_batches=1, pgd_steps=attack, progress=False
    )
    kl = {name: mode["kl"] for name, mode in report.modes.items()}
    return {"l0": report.l0["0"]["total"], "alive": report.alive["total"], "kl": kl} | {
        "adversary": report.pgd
    }


def perform(options: argparse.Namespace) -> dict[str, Any]:
    """One run, as a record."""
    idea = IDEAS[options.idea]
    # The preset shared sources within a sequence when the stored records were made.
    changes = {"compile": True, "adversary.scope": "sequence", **idea.changes, **options.set}
    config = configured(options.steps, options.seed, changes)
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    model = load_target(options.weights)
    counts = config.n_subcomponents
    vpd_lens.decompose(
        model, n_subcomponents=counts, importance=config.importance, seed=config.seed
    )
    stepper = idea(model.vpd, config, options.option)
    seconds = train(model, stepper, tokens(options.weights, "train"))
    length = TARGET["n_ctx"]
    held_out = tokens(options.weights, "eval")[: EVALUATED_ROWS * length].view(-1, length)
    return {
        "idea": options.idea,
        "options": stepper.options,
        "seed": config.seed,
        "weights": file_hash(options.weights / "model.safetensors"),
        "config": config.model_dump(mode="json"),
        "seconds": seconds,
        "figures": figures(model, held_out, options.attack),
        "versions": versions(),
        "machine": Machine.this().model_dump(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command.replace(str(options.weights), "FOLDER"),
    }


def assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, parse_yaml(value, "--set")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("idea", choices=IDEAS)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=assignment, nargs="*", default=[], help="of VPDConfig")
    parser.add_argument("--option", type=assignment, nargs="*", default=[], help="of the idea")
    parser.add_argument("--attack", type=int, nargs="*", default=[20, 80])
    parser.add_argument("--name", help="of the record; by default the idea and the seed")
    parser.add_argument("--output", type=Path, default=Path("docs/results/ideas"))
    options = parser.parse_args()
    options.set, options.option = dict(options.set), dict(options.option)
    torch.set_num_threads(1)
    record = perform(options)
    options.output.mkdir(parents=True, exist_ok=True)
    name = options.name or f"{options.idea},seed={options.seed}"
    write_json(options.output / f"{name}.json", record)
    print(name, json.dumps(record["figures"]), json.dumps(record["seconds"]), flush=True)


if __name__ == "__main__":
    main()
