"""What folding dead subcomponents saves and costs (`compaction` of `VPDConfig`).

    python benchmarks/compaction.py step --weights FOLDER --json OUT.json
    python benchmarks/compaction.py quality --target FOLDER --seed 0 --window 200 --json OUT.json
    python benchmarks/compaction.py toy --toy tms-40-10 --seeds 3 --json OUT.json

`step` times a configuration of `step.py` as it is and with a quarter of its subcomponents left,
the two taking turns in one process. `quality` trains a decomposition of the target in FOLDER
(`config.json`, `model.safetensors`, `train_tokens.npy`, `eval_tokens.npy`; nn.Linear layout),
with `--window 0` without compaction, and evaluates it. Where subcomponents were folded, it is
evaluated as saved, and again with each of them back as a subcomponent of importance 0: only
there has the adversary as many masks as without compaction. `toy` decomposes a toy whose
mechanisms are known, with and without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from rich import print_json
from safetensors.torch import load_file
from step import CONFIGURATIONS, batches, build, load_weights
from torch import Tensor, nn

import vpd_lens
from vpd_lens.decomposition.folding import Columns, unfold
from vpd_lens.evaluation import evaluate
from vpd_lens.toys.measure import measure
from vpd_lens.toys.presets import preset
from vpd_lens.toys.targets import TOYS
from vpd_lens.training import VPDConfig
from vpd_lens.training.compaction import compact
from vpd_lens.training.step import Stepper

COUNTS = {r"attn\.[qk]$": 64, r"attn\.[vo]$": 96, r"mlp\.in$": 256, r"mlp\.out$": 288}
IMPORTANCE = {"d_model": 128, "n_blocks": 2, "n_heads": 4, "d_ffn": 512}
ROWS = 128  # of held-out data


def load_target(folder: Path) -> nn.Module:
    """A trained HookedTransformer from nn.Linear weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    record = json.loads((folder / "config.json").read_text())
    heads, d_head = record["n_heads"], record["d_model"] // record["n_heads"]
    shape = {name: record[name] for name in ("n_layers", "d_model", "n_heads", "d_mlp")}
    model = HookedTransformer(
        HookedTransformerConfig(
            **shape,
            d_head=d_head,
            n_ctx=record["ctx"],
            d_vocab=record["vocab"],
            act_fn="gelu_new",
            normalization_type="RMS",
            eps=record["rms_eps"],
            positional_embedding_type="rotary",
            rotary_dim=d_head,
            device="cpu",
        )
    )
    saved = load_file(folder / "model.safetensors")
    state = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    state["embed.W_E"] = saved["embed.weight"]
    state["unembed.W_U"] = saved["unembed.weight"].T
    state["ln_final.w"] = saved["norm_out.scale"]
    for layer in range(record["n_layers"]):
        old, new = f"layers.{layer}", f"blocks.{layer}"
        for part in "qkv":
            weight = rearrange(saved[f"{old}.attn.{part}.weight"], "(h e) d -> h d e", h=heads)
            state[f"{new}.attn.W_{part.upper()}"] = weight
        output = rearrange(saved[f"{old}.attn.o.weight"], "d (h e) -> h e d", h=heads)
        state[f"{new}.attn.W_O"] = output
        state[f"{new}.mlp.W_in"] = saved[f"{old}.mlp.up.weight"].T
        state[f"{new}.mlp.W_out"] = saved[f"{old}.mlp.down.weight"].T
        state[f"{new}.ln1.w"] = saved[f"{old}.norm_attn.scale"]
        state[f"{new}.ln2.w"] = saved[f"{old}.norm_mlp.scale"]
    model.load_state_dict(state, strict=False)
    return model.eval()


def tokens(folder: Path, split: str) -> Tensor:
    """One of the target's token streams."""
    return torch.from_numpy(np.load(folder / f"{split}_tokens.npy").astype(np.int64))


def quality(folder: Path, config: VPDConfig) -> dict[str, Any]:
    """Train, evaluate, and say what is left."""
    model = load_target(folder)
    length = model.cfg.n_ctx
    stream = tokens(folder, "train")

    def windows(generator: torch.Generator, batch_size: int) -> Tensor:
        starts = torch.randint(len(stream) - length, (batch_size, 1), generator=generator)
        return stream[starts + torch.arange(length)]

    with tempfile.TemporaryDirectory() as output:
        result = vpd_lens.train(model, windows, config, output=Path(output) / "run")
    held_out = tokens(folder, "eval")[: ROWS * length].view(ROWS, length)
    figures = {
        "config": config.model_dump(mode="json"),
        "seconds": result.seconds,
        "n_subcomponents": dict(zip(model.vpd.layout.names, model.vpd.layout.sizes, strict=True)),
        "total": [line.get("n_subcomponents", model.vpd.layout.total) for line in result.history],
        "evaluation": measured(model, held_out),
    }
    if any(folded.indices for folded in model.vpd.subcomponents.folded):
        unfold(model.vpd)
        figures["unfolded"] = measured(model, held_out)
    return figures


def measured(model: nn.Module, held_out: Tensor) -> dict[str, float]:
    """The figures of the table."""
    report = evaluate(
        model,
        held_out,
        batch_size=len(held_out),
        n_batches=1,
        pgd_steps=(20,),
        pgd_restarts=3,
        progress=False,
    )
    return {
        "l0": report.l0["0"]["total"],
        "alive": report.alive["total"],
        "stochastic_kl": report.modes["stochastic"]["kl"],
        "ci_kl": report.modes["ci"]["kl"],
        "unmasked_kl": report.modes["unmasked"]["kl"],
        "pgd20_mean": report.pgd["20"]["mean"],
        "pgd20_max": report.pgd["20"]["max"],
        "delta_relative": report.delta["total"]["relative"],
        "folded_relative": report.delta["total"]["folded"],
    }


def step_times(size: str, weights: Path | None, rounds: int) -> dict[str, Any]:
    """Milliseconds per step of a configuration, whole and with a quarter left, in turns."""
    steppers, data = {}, batches(size, weights, rounds + 2)
    for name in ("whole", "quarter"):
        configuration = CONFIGURATIONS[size]
        config = VPDConfig.small(importance=configuration["importance"], steps=10_000)
        counts = {rf"\.{part}$": count for part, count in configuration["counts"].items()}
        model = build(size, "hooked_transformer")
        if weights is not None:
            load_weights(model, weights)
        vpd_lens.decompose(model, n_subcomponents=counts, importance=config.importance)
        steppers[name] = Stepper(model.vpd, config)
    begun = time.perf_counter()
    for name, stepper in steppers.items():
        stepper.step(data[0], 0)
        if name == "quarter":
            sizes = stepper.vpd.layout.sizes
            begun = time.perf_counter()
            kept = [range(size // 4) for size in sizes]
            compact(stepper, Columns(sizes, kept, stepper.device))
            compaction = time.perf_counter() - begun
        stepper.step(data[1], 1)
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for index, batch in enumerate(data[2:], start=2):
        for name, stepper in steppers.items():
            begun = time.perf_counter()
            stepper.step(batch, index)
            times[name].append(1e3 * (time.perf_counter() - begun))
    ratios = [b / a for a, b in zip(times["whole"], times["quarter"], strict=True)]
    return {
        "configuration": size,
        "n_subcomponents": {name: s.vpd.layout.total for name, s in steppers.items()},
        "ms_per_step_median": {name: statistics.median(t) for name, t in times.items()},
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "compaction_ms": 1e3 * compaction,
        "trained_weights": weights is not None,
        "rounds": rounds,
    }


def toy_runs(name: str, seeds: int, window: int, threshold: float) -> list[dict[str, Any]]:
    """Decompose a toy whose mechanisms are known, with and without compaction, per seed."""
    toy, runs = TOYS[name], []
    for seed in range(seeds):
        for length in (0, window):
            config = preset(name, "vpd").replaced(
                {
                    "seed": seed,
                    "compaction.window": length,
                    "compaction.threshold": threshold,
                    "log_every": 100,
                }
            )
            model = toy.train_target(seed)
            data = replace(toy.data, nonzero=True)
            example = torch.eye(toy.data.n_features)
            with tempfile.TemporaryDirectory() as output:
                result = vpd_lens.train(
                    model,
                    data,
                    config,
                    output=Path(output) / "run",
                    progress=False,
                    example=example,
                )
            total = model.vpd.layout.total
            runs.append(
                {
                    "seed": seed,
                    "window": length,
                    "seconds": result.seconds,
                    "total": [line.get("n_subcomponents", total) for line in result.history],
                    "sites": {
                        site: figures.model_dump(exclude={"importance", "true", "found"})
                        for site, figures in measure(toy, model.vpd)[1].items()
                    },
                }
            )
            print_json(data=runs[-1])
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("step", help="time a step before and after")
    timing.add_argument("--configuration", choices=CONFIGURATIONS, default="S")
    timing.add_argument("--weights", type=Path, help="trained weights of the configuration")
    timing.add_argument("--rounds", type=int, default=30)
    training = commands.add_parser("quality", help="train and evaluate")
    training.add_argument("--target", type=Path, required=True)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--steps", type=int, default=800)
    training.add_argument("--batch-size", type=int, default=16)
    training.add_argument("--window", type=int, default=0)
    training.add_argument("--threshold", type=float, default=1e-6)
    toys = commands.add_parser("toy", help="decompose a toy with and without")
    toys.add_argument("--toy", choices=TOYS, default="tms-40-10")
    toys.add_argument("--seeds", type=int, default=3)
    toys.add_argument("--window", type=int, default=250)
    toys.add_argument("--threshold", type=float, default=1e-6)
    for command in (timing, training, toys):
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "step":
        result = step_times(options.configuration, options.weights, options.rounds)
    elif options.command == "toy":
        runs = toy_runs(options.toy, options.seeds, options.window, options.threshold)
        result = {"toy": options.toy, "threshold": options.threshold, "runs": runs}
    else:
        config = VPDConfig.small(
            steps=options.steps,
            batch_size=options.batch_size,
            seed=options.seed,
            n_subcomponents=COUNTS,
            importance=IMPORTANCE,
            compaction={"window": options.window, "threshold": options.threshold},
        ).replaced(
            # The preset shared sources within a sequence when the stored records were made.
            {"minimality.coefficient": 1e-3, "adversary.scope": "sequence"}
        )
        result = quality(options.target, config)
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if options.command != "toy":
        print_json(data=result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
