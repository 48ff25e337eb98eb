"""Decompose a two-layer attention-only transformer, and find its induction circuit.

    python examples/induction.py            # trains the target, then decomposes it
    python examples/induction.py --help

Writes the target, the decomposition and `figures.json` to the output directory.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import vpd_lens
from toy_runs.weights import save_weights
from vpd_lens.analysis.usage import head_shares
from vpd_lens.storage import write_text
from vpd_lens.toys.induction import RepeatedTokens, head_scores
from vpd_lens.training import VPDConfig

console = Console()


def configuration(steps: int, seed: int) -> VPDConfig:
    """The preset for small models; the importance function is kept small."""
    return VPDConfig.small(
        steps=steps,
        seed=seed,
        n_subcomponents=64,
        importance={"d_model": 64, "n_blocks": 2, "n_heads": 4},
        log_every=max(1, steps // 20),
    ).replaced(
        # The tutorial's figures were made with one set of sources per sequence.
        {"minimality.coefficient": 1e-3, "adversary.scope": "sequence"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/induction"))
    parser.add_argument("--target-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    task = RepeatedTokens()
    path = arguments.output / "target.safetensors"
    if not path.exists():
        save_weights(task.train_target(arguments.seed, arguments.target_steps), path)
    model = task.transformer().eval()
    model.load_state_dict(load_file(path))
    tokens = task(torch.Generator().manual_seed(10**6), 256)
    console.print(scores_table({"target": measured(model, task, tokens)}))

    config = configuration(arguments.steps, arguments.seed)
    run = arguments.output / "vpd"
    vpd_lens.decompose(model, task, config, output=run, resume=(run / "checkpoint").exists())
    report = vpd_lens.evaluate(
        model, tokens, batch_size=64, n_batches=4, pgd_steps=(20,), pgd_restarts=1
    )
    console.print(report)

    found = {"target": measured(model, task, tokens)}
    for (name, head), parts in by_head(model, tokens).items():
        for label, index in parts.items():
            mask = torch.ones(model.vpd.u(name).shape[0])
            mask[index] = 0
            with model.vpd.masked({name: mask}):
                row = f"{name}, head {head}: {len(index)} {label}"
                found[row] = measured(model, task, tokens)
    console.print(scores_table(found))
    write_text(arguments.output / "figures.json", json.dumps(found, indent=1))


def by_head(
    model: torch.nn.Module, tokens: Int[Tensor, "batch pos"]
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """The subcomponents of every head at every site, those often important and all others.

    A subcomponent belongs to the head that has most of its norm, and is often important if its
    mean importance exceeds 0.1.
    """
    vpd = model.vpd
    importance = vpd.causal_importance(tokens).mean((0, 1))
    found = {}
    for site in vpd.sites:
        often = importance[vpd.layout.columns(site.name)] > 0.1
        owner = head_shares(vpd, site.name).argmax(1)
        for head in owner.unique().tolist():
            found[site.name, head] = {
                "often important": (often & (owner == head)).nonzero().flatten(),
                "others": (~often & (owner == head)).nonzero().flatten(),
            }
    return found


def measured(
    model: torch.nn.Module, task: RepeatedTokens, tokens: Int[Tensor, "batch pos"]
) -> dict[str, float]:
    """Loss on repeated tokens, and what every head attends to."""
    scores = head_scores(model, task, tokens)
    with torch.no_grad():
        out = {"loss": round(float(task.loss(model(tokens), tokens)), 3)}
    for kind, values in (("previous", scores.previous[0]), ("induction", scores.induction[1])):
        for head, value in enumerate(values.tolist()):
            out[f"{kind} {head}"] = round(value, 3)
    return out


def scores_table(rows: dict[str, dict[str, float]]) -> Table:
    """One row per set of ablated subcomponents."""
    table = Table(title="Loss on repeated tokens; attention of layer 0 and layer 1, by head")
    table.add_column("ablated: number")
    for heading in next(iter(rows.values())):
        table.add_column(heading, justify="right")
    for label, row in rows.items():
        table.add_row(label, *(f"{value:.3f}" for value in row.values()))
    return table


if __name__ == "__main__":
    main()
