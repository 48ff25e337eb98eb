"""Time and memory of one training step, phase by phase, for two fixed configurations.

    python benchmarks/step.py --configuration S --model hooked_transformer
    python benchmarks/step.py --configuration M --model bridge --weights FOLDER --json out.json

Without `--weights` the target has random weights, which take the same time. `FOLDER` holds
`model.safetensors` and `train_tokens.npy` of a trained target (nn.Linear layout, as named in
`load_weights`). Timings of a busy machine are worthless: compare medians of one sitting.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import vpd_lens
from vpd_lens.training import VPDConfig
from vpd_lens.training.step import Stepper

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "S": {
        "target": {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_mlp": 256, "d_vocab": 512},
        "n_ctx": 64,
        "counts": {r"attn\.[qk]": 48, r"attn\.[vo]": 96, r"mlp\.in": 256, r"mlp\.out": 288},
        "importance": {"d_model": 128, "n_blocks": 2, "n_heads": 4, "d_ffn": 512},
    },
    "M": {
        "target": {"n_layers": 4, "d_model": 128, "n_heads": 4, "d_mlp": 512, "d_vocab": 1024},
        "n_ctx": 128,
        "counts": {r"attn\.[qk]": 64, r"attn\.[vo]": 128, r"mlp\.in": 512, r"mlp\.out": 576},
        "importance": {"d_model": 256, "n_blocks": 4, "n_heads": 8, "d_ffn": 1024},
    },
}
BATCH = 16
PHASES = ("target", "importance", "adversary", "losses", "backward", "update")


def build(name: str, kind: str) -> nn.Module:
    """The target of a configuration, of either model class."""
    configuration = CONFIGURATIONS[name]
    shape = configuration["target"]
    d_head = shape["d_model"] // shape["n_heads"]
    common = {
        **shape,
        "n_ctx": configuration["n_ctx"],
        "d_head": d_head,
        "act_fn": "gelu_new",
        "normalization_type": "RMS",
        "eps": 1e-6,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "seed": 0,
    }
    if kind == "hooked_transformer":
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        return HookedTransformer(HookedTransformerConfig(**common, device="cpu")).eval()
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_native(TransformerBridgeConfig(**common)).eval()


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy trained decomposed matrices into the target (by site, whichever its class)."""
    from vpd_lens.sites import find_sites

    tensors = load_file(folder / "model.safetensors")
    names = {"in": "up", "out": "down"}
    for site in find_sites(model):
        _, layer, part, matrix = site.name.split(".")
        weight = tensors[f"layers.{layer}.{part}.{names.get(matrix, matrix)}.weight"].T
        parameter = site.read_weight()
        if parameter.data_ptr() in {p.data_ptr() for p in model.parameters()}:
            parameter.data.copy_(weight)
            continue
        module = getattr(model.blocks[int(layer)], part)
        heads = model.cfg.n_heads
        pattern = "(h e) d -> h e d" if matrix == "o" else "d (h e) -> h d e"
        getattr(module, f"W_{matrix.upper()}").data.copy_(rearrange(weight, pattern, h=heads))


def batches(name: str, folder: Path | None, count: int) -> list[Tensor]:
    """Random windows of the token stream, or random tokens."""
    configuration = CONFIGURATIONS[name]
    length = configuration["n_ctx"]
    generator = torch.Generator().manual_seed(0)
    if folder is None:
        shape = (count, BATCH, length)
        vocabulary = configuration["target"]["d_vocab"]
        return list(torch.randint(vocabulary, shape, generator=generator))
    stream = torch.from_numpy(np.load(folder / "train_tokens.npy").astype(np.int64))
    starts = torch.randint(len(stream) - length, (count, BATCH, 1), generator=generator)
    return list(stream[starts + torch.arange(length)])


def measure(name: str, kind: str, folder: Path | None, steps: int) -> dict[str, Any]:
    """Wall-clock milliseconds per step (median, minimum), per phase, and peak memory in MiB."""
    configuration = CONFIGURATIONS[name]
    model = build(name, kind)
    if folder is not None:
        load_weights(model, folder)
    config = VPDConfig.small(importance=configuration["importance"], steps=10_000)
    vpd_lens.decompose(model, n_subcomponents=configuration["counts"], importance=config.importance)
    stepper = Stepper(model.vpd, config)
    data = batches(name, folder, steps + 3)
    for step in range(3):
        stepper.step(data[step], step)
    times = []
    for step in range(3, steps + 3):
        begun = time.perf_counter()
        stepper.step(data[step], step)
        times.append(1e3 * (time.perf_counter() - begun))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            stepper.step(data[0], 1)
    spans = {e.key: e.cpu_time_total / 3e3 for e in profiler.key_averages()}
    return {
        "configuration": name,
        "model": kind,
        "trained_weights": folder is not None,
        "ms_per_step_median": statistics.median(times),
        "ms_per_step_min": min(times),
        "phases_ms": {phase: spans.get(f"vpd::{phase}", 0.0) for phase in PHASES},
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configuration", choices=CONFIGURATIONS, default="S")
    parser.add_argument(
        "--model", choices=("hooked_transformer", "bridge"), default="hooked_transformer"
    )
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.configuration, arguments.model, arguments.weights, arguments.steps)
    table = Table("phase", "ms", title=f"{result['configuration']} on {result['model']}")
    for phase, value in result["phases_ms"].items():
        table.add_row(phase, f"{value:.1f}")
    table.add_section()
    table.add_row("step, median", f"{result['ms_per_step_median']:.1f}")
    table.add_row("step, minimum", f"{result['ms_per_step_min']:.1f}")
    table.add_row("peak memory, MiB", f"{result['peak_memory_mib']:.0f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
