"""Decompose a transformer that adds modulo a prime, and find its key frequencies again.

    python examples/modular_addition.py            # trains a target mod 59, then decomposes it
    python examples/modular_addition.py --help

Writes the target, the decomposition, `figures.json` (with configuration, versions and date) and
two plots to the output directory. Run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import vpd_lens
from recorded.record import json_in_rows, versions
from toy_runs.frequencies import (
    SiteFrequencies,
    amplitudes_without,
    key_frequencies,
    site_frequencies,
)
from toy_runs.weights import save_weights
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.decomposition.subcomponents import align
from vpd_lens.storage import write_text
from vpd_lens.toys.fourier import logit_waves, wave_share
from vpd_lens.toys.modular_addition import ModularAddition, last_position_kl
from vpd_lens.training import VPDConfig

IN, OUT = "blocks.0.mlp.in", "blocks.0.mlp.out"
console = Console()


def configuration(steps: int, seed: int, initialisation: str = "aligned") -> VPDConfig:
    """The preset for small models, on tiny batches; one subcomponent per neuron."""
    return VPDConfig.small(
        steps=steps,
        seed=seed,
        initialisation=initialisation,
        batch_size=64,
        n_subcomponents={"attn": 64, "mlp": 256},
        importance={"d_model": 64, "n_blocks": 1, "n_heads": 4},
        log_every=max(1, steps // 20),
    ).replaced(
        {
            "minimality.coefficient": 3e-3,
            "adversary.inner_steps": 1,
            "adversary.scope": "sequence",  # one sum, one set of sources
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/modular-addition"))
    parser.add_argument("--modulus", type=int, default=59)
    parser.add_argument(
        "--target",
        type=Path,
        help="safetensors file of a target, named as in HookedTransformer; default: train one",
    )
    parser.add_argument("--target-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--initialisation", choices=("aligned", "random"), default="aligned")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    task = ModularAddition(arguments.modulus)
    path = arguments.target or arguments.output / "target.safetensors"
    if not path.exists():
        save_weights(task.train_target(arguments.seed, arguments.target_steps), path)
    model = load_target(task, path)
    logits = task.logits(model)
    waves, keys = logit_waves(logits), key_frequencies(logits)
    console.print(
        f"Target: accuracy {task.accuracy(model):.2%}; {wave_share(logits):.1%} of the logits' "
        f"variance depends on a + b - c alone; key frequencies "
        + ", ".join(f"{k} ({waves[k - 1]:.1f} nats)" for k in keys)
    )

    run = arguments.output / "vpd"
    config = configuration(arguments.steps, arguments.seed, arguments.initialisation)
    vpd_lens.decompose(
        model,
        task,
        config,
        divergence=last_position_kl,
        output=run,
        resume=(run / "checkpoint").exists(),
    )
    report = vpd_lens.evaluate(
        model, task.all_rows(), batch_size=task.p, n_batches=task.p, pgd_steps=(20,), pgd_restarts=1
    )
    console.print(report)

    sites = {site.name: site_frequencies(model, task, site.name) for site in model.vpd.sites}
    console.print(site_table(sites, keys))
    left = ablations(model, task, sites, waves, keys)
    left |= others(model, task, sites, waves, keys)
    start = untrained(load_target(task, path))
    neurons = {name: site_frequencies(start, task, name, often=-1.0) for name in (IN, OUT)}
    console.print(site_table(neurons, keys, "Before any training: neurons by their frequency"))
    by_neuron = ablations(start, task, neurons, waves, keys)
    left |= {(f"neurons of {label}", k): found for (label, k), found in by_neuron.items()}
    console.print(ablation_table(left, keys))
    data = about(model, task, config, report) | frequencies(sites, neurons, left, waves, keys)
    write_text(arguments.output / "figures.json", json_in_rows(data) + "\n")
    save_plots(arguments.output, sites, left, keys)
    console.print(f"Figures: {arguments.output}")


def load_target(task: ModularAddition, path: Path) -> torch.nn.Module:
    """A transformer with the weights of a file, as wide as they are."""
    weights = load_file(path)
    shape = {}
    if "blocks.0.mlp.W_in" in weights:
        shape["d_model"], shape["d_mlp"] = weights["blocks.0.mlp.W_in"].shape
    model = task.transformer(**shape)
    different = model.load_state_dict(weights, strict=False)
    if different.unexpected_keys:
        raise SystemExit(f"{path}: not of this transformer: {different.unexpected_keys}")
    return model.eval()


def site_table(
    sites: dict[str, SiteFrequencies],
    keys: list[int],
    title: str = "Live subcomponents by the frequency of their activation",
) -> Table:
    """Live subcomponents by site and frequency."""
    table = Table(title=title)
    for heading in ("site", "live", *map(str, keys), "others", "mean share", "written share"):
        table.add_column(heading, justify="left" if heading == "site" else "right")
    for name, found in sites.items():
        if name.endswith(".q"):
            continue  # reads the equals sign, which is the same for all inputs
        counts = [int((found.frequency == k).sum()) for k in keys]
        written = "" if found.write is None else f"{found.write.amax(1).mean():.2f}"
        others = len(found.index) - sum(counts)
        numbers = [len(found.index), *counts, others]
        table.add_row(name, *map(str, numbers), f"{found.share.mean():.2f}", written)
    return table


def ablations(
    model: torch.nn.Module,
    task: ModularAddition,
    sites: dict[str, SiteFrequencies],
    waves: torch.Tensor,
    keys: list[int],
) -> dict[tuple[str, int], tuple[list[float], float]]:
    """What is left of the key frequencies, and the accuracy, without one's subcomponents."""
    found = {}
    for label, names in (("W_in", [IN]), ("W_out", [OUT]), ("both", [IN, OUT])):
        for k in keys:
            ablated = {n: sites[n].index[sites[n].frequency == k] for n in names}
            amplitudes, accuracy = amplitudes_without(model, task, ablated)
            found[label, k] = [float(amplitudes[j - 1] / waves[j - 1]) for j in keys], accuracy
    return found


def others(
    model: torch.nn.Module,
    task: ModularAddition,
    sites: dict[str, SiteFrequencies],
    waves: torch.Tensor,
    keys: list[int],
) -> dict[tuple[str, str], tuple[list[float], float]]:
    """The same without all that is not live, and without as many at random, at the same sites."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for label, names in (("MLP", [IN, OUT]), ("all but q", [n for n in sites if n[-1] != "q"])):
        unneeded, at_random = {}, {}
        for n in names:
            order = torch.randperm(model.vpd.u(n).shape[0], generator=generator)
            unneeded[n] = order[~torch.isin(order, sites[n].index)]
            at_random[n] = order[: len(unneeded[n])]
        for what, ablated in (("not live", unneeded), ("random", at_random)):
            amplitudes, accuracy = amplitudes_without(model, task, ablated)
            found[label, what] = [float(amplitudes[j - 1] / waves[j - 1]) for j in keys], accuracy
    return found


def untrained(model: torch.nn.Module) -> torch.nn.Module:
    """The start of a decomposition: one subcomponent for every neuron and head dimension."""
    vpd_lens.decompose(
        model,
        n_subcomponents={"attn": model.cfg.d_model, "mlp": model.cfg.d_mlp},
        importance=configuration(steps=1, seed=0).importance,
        divergence=last_position_kl,
    )
    align(model.vpd.subcomponents, model.vpd.sites)
    return model


def ablation_table(left: dict, keys: list[int]) -> Table:
    """What is left of every key frequency."""
    table = Table(title="Amplitude left in the logits when one frequency's subcomponents go")
    for heading in ("matrix", "ablated", *map(str, keys), "accuracy"):
        table.add_column(heading, justify="right")
    for (label, k), (shares, accuracy) in left.items():
        table.add_row(label, str(k), *(f"{share:.0%}" for share in shares), f"{accuracy:.1%}")
    return table


def about(
    model: torch.nn.Module, task: ModularAddition, config: VPDConfig, report: vpd_lens.EvalReport
) -> dict[str, object]:
    """What was decomposed, how and how well, for `figures.json`."""
    return {
        "modulus": task.p,
        "accuracy": round(task.accuracy(model), 4),
        "wave_share": round(wave_share(task.logits(model)), 4),
        "config": config.model_dump(mode="json"),
        "decomposition": fingerprint(model.vpd),
        "kl": {mode: round(figures["kl"], 5) for mode, figures in report.modes.items()},
        "adversary": report.pgd,
        "l0": round(report.l0["0"]["total"], 2),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def frequencies(
    sites: dict[str, SiteFrequencies],
    neurons: dict[str, SiteFrequencies],
    left: dict,
    waves: torch.Tensor,
    keys: list[int],
) -> dict[str, dict]:
    """The tables and the amplitudes of the target, for `figures.json`."""

    def tables(of: dict[str, SiteFrequencies]) -> dict[str, dict]:
        return {
            name: {
                "live": len(found.index),
                "by_frequency": {str(k): int((found.frequency == k).sum()) for k in keys},
                "mean_share": round(float(found.share.mean()), 4),
            }
            for name, found in of.items()
            if len(found.index)
        }

    return {
        "keys": {str(k): round(float(waves[k - 1]), 3) for k in keys},
        "sites": tables(sites),
        "neurons": tables(neurons),
        "left": {
            f"{label} {k}": {
                **{str(j): round(share, 4) for j, share in zip(keys, shares, strict=True)},
                "accuracy": round(accuracy, 4),
            }
            for (label, k), (shares, accuracy) in left.items()
        },
    }


def save_plots(
    folder: Path, sites: dict[str, SiteFrequencies], left: dict, keys: list[int]
) -> None:
    """The plots `frequencies.svg` and `ablation.svg`."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), (IN, OUT), strict=True):
        found = sites[name]
        order = (found.frequency * 10 - found.share).argsort()
        shares = found.activation[order].T.numpy()
        image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        axes.set(title=name, xlabel="live subcomponent, sorted", ylabel="frequency")
        axes.set_yticks([k - 1 for k in keys], [str(k) for k in keys])
    figure.colorbar(image, ax=figure.axes, label="share of the activation's variance")
    figure.savefig(folder / "frequencies.svg")

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, label in zip(figure.subplots(1, 3), ("W_in", "W_out", "both"), strict=True):
        rows = [left[label, k][0] for k in keys]
        axes.imshow(rows, cmap="Blues", vmin=0, vmax=1)
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                colour = "white" if value > 0.6 else "black"
                axes.text(j, i, f"{value:.0%}", ha="center", va="center", color=colour)
        axes.set(title=label, xlabel="frequency in the logits", ylabel="ablated")
        axes.set_xticks(range(len(keys)), map(str, keys))
        axes.set_yticks(range(len(keys)), map(str, keys))
    figure.savefig(folder / "ablation.svg")


if __name__ == "__main__":
    main()
