"""Is the dense block of an identity layer the optimum of the training loss?

    python benchmarks/dense_block.py tms-5-2-id
    python benchmarks/dense_block.py tms-5-2-id --method spd --set minimality.coefficient=2e-3

Decomposes a toy with its preset, then compares the training loss of what was found, at its end,
with that of the truth: the identity layer as `d` subcomponents along the axes with importance 1
on every input, all else as found. Then both are trained on, with `p` at its end. Writes a record
with everything that is needed to repeat it to `docs/results/dense_block`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vpd_lens.decomposition import Decomposition
from vpd_lens.experiments.record import versions
from vpd_lens.files import json_in_rows, write_text_atomically
from vpd_lens.toys import TOYS, measure, preset
from vpd_lens.toys.targets import Toy
from vpd_lens.training import VPDConfig, train
from vpd_lens.training.step import Stepper

SITE = "hidden"
SETTLING, MEASURED = 200, 100  # steps: the adversary finds its sources, then losses are averaged
STARTS = 5  # of the adversary: it can get stuck


@torch.no_grad()
def place_dense_block(vpd: Decomposition) -> None:
    """Set the identity layer to one subcomponent per axis, each of importance 1, all others dead.

    Args:
        vpd: A decomposition whose importance function is of kind `"mlp"`; changed in place.
    """
    index = vpd.layout.names.index(SITE)
    v, u, gates = vpd.subcomponents.v[index], vpd.subcomponents.u[index], vpd.importance
    columns, d = vpd.layout.columns(SITE), v.shape[0]
    v.copy_(torch.eye(*v.shape))
    u.copy_(torch.eye(*u.shape))
    gates.w_out[columns] = 0
    gates.b_out[columns] = -1
    gates.b_out[columns][:d] = 1


def trained(model: nn.Module, toy: Toy, config: VPDConfig) -> None:
    """Train the decomposition of a toy, or train it on."""
    with tempfile.TemporaryDirectory() as folder:
        data, example = replace(toy.data, nonzero=True), torch.eye(toy.data.n_features)
        train(model, data, config, output=f"{folder}/run", progress=False, example=example)


def losses(vpd: Decomposition, toy: Toy, config: VPDConfig) -> dict[str, float]:
    """Weighted training losses and their total, at the last `p`; only the adversary goes on.

    Means over starts of the adversary, and its loss from the worst of them.
    """
    starts = [losses_from(vpd, toy, config.replaced({"seed": start})) for start in range(STARTS)]
    mean = {name: sum(start[name] for start in starts) / STARTS for name in starts[0]}
    weights = {
        "stochastic": config.stochastic.coefficient,
        "layerwise": config.stochastic.layerwise_coefficient,
        "adversarial": config.adversary.coefficient,
        "minimality": config.minimality.coefficient,
        "faithfulness": config.faithfulness.coefficient,
    }
    weighted = {name: round(w * mean[name], 6) for name, w in weights.items() if name in mean}
    weighted["total"] = round(mean["total"], 6)
    if "adversarial" in mean:
        worst = max(start["adversarial"] for start in starts)
        weighted["adversarial, worst start"] = round(weights["adversarial"] * worst, 6)
    return weighted


def losses_from(vpd: Decomposition, toy: Toy, config: VPDConfig) -> dict[str, float]:
    """Training losses, not weighted, from one start of the adversary."""
    p = config.minimality.p_end
    changes = {"steps": SETTLING + MEASURED, "minimality.p_start": p, "adversary.lr_warmup": 0.0}
    # A rate of 0 is not allowed; this one moves nothing by more than 1e-25.
    still = {"optimiser.lr": 1e-30, "optimiser.importance_lr": 1e-30, "optimiser.weight_decay": 0.0}
    stepper = Stepper(vpd, config.replaced(changes | still))
    data, generator = replace(toy.data, nonzero=True), torch.Generator().manual_seed(123)
    mean: dict[str, float] = {}
    for step in range(SETTLING + MEASURED):
        found, _ = stepper.step(data(generator, config.batch_size), step)
        if step >= SETTLING:
            mean = {name: mean.get(name, 0) + float(x) / MEASURED for name, x in found.items()}
    return mean


def state(model: nn.Module, toy: Toy, config: VPDConfig) -> dict[str, Any]:
    """Losses, and what the decomposition looks like."""
    vpd: Decomposition = model.vpd
    sites = measure(toy, vpd)[1]
    dense = torch.tensor(sites[SITE].importance)[:, : sites[SITE].expected]
    return {
        "losses": losses(vpd, toy, config),
        "alive": {name: site.alive for name, site in sites.items()},
        "error_02": {name: site.error_02 for name, site in sites.items()},
        "mean_importance": [round(x, 3) for x in dense.mean(0).tolist()],
    }


def perform(options: argparse.Namespace) -> dict[str, Any]:
    """Both solutions, before and after training on, as a record."""
    toy = TOYS[options.toy]
    config = preset(toy.name, options.method).replaced({"seed": options.seed, **options.set})
    model = toy.train_target(options.seed)
    trained(model, toy, config)
    opt = config.optimiser
    on = config.replaced(
        {
            "steps": config.steps // 2,
            "minimality.p_start": config.minimality.p_end,
            "optimiser.lr": opt.lr / 3,
            "optimiser.importance_lr": (opt.importance_lr or opt.lr) / 3,
            "faithfulness.warmup_steps": 0,
        }
    )
    found = [x.detach().clone() for x in model.vpd.parameters()]
    states = {"found": state(model, toy, config)}
    place_dense_block(model.vpd)
    states["dense"] = state(model, toy, config)
    trained(model, toy, on)
    states["dense, trained on"] = state(model, toy, config)
    with torch.no_grad():
        for parameter, x in zip(model.vpd.parameters(), found, strict=True):
            parameter.copy_(x)
    trained(model, toy, on)
    states["found, trained on"] = state(model, toy, config)
    return {
        "toy": toy.name,
        "method": options.method,
        "states": states,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "toy", choices=[name for name, toy in TOYS.items() if SITE in toy.dense_sites]
    )
    parser.add_argument("--method", default="vpd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=assignment, nargs="*", default=[], help="of VPDConfig")
    parser.add_argument("--output", type=Path, default=Path("docs/results/dense_block"))
    options = parser.parse_args()
    options.set = dict(options.set)
    torch.set_num_threads(1)
    record = perform(options)
    coefficient = record["config"]["minimality"]["coefficient"]
    name = f"{options.toy}-{options.method},coefficient={coefficient:g},seed={options.seed}"
    write_text_atomically(options.output / f"{name}.json", json_in_rows(record) + "\n")
    for label, found in record["states"].items():
        print(label, json.dumps(found))


if __name__ == "__main__":
    main()
