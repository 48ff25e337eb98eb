"""Time and memory of one training step, phase by phase, for two fixed configurations.

    python benchmarks/step.py --configuration S --model hooked_transformer
    python benchmarks/step.py --configuration M --model bridge --weights FOLDER --json out.json

Three steps with the losses and the optimiser of `VPDConfig.paper()` take turns: this library's, the
same with `compile=True` (unless `--no-compile`), and the literal one of `literal.py`, whose time is
the yardstick: quote ratios to it. Without
`--weights` the target has random weights, which take the same time. `FOLDER` holds
`model.safetensors` and `train_tokens.npy` of a trained target (nn.Linear layout, as named in
`load_weights`). Timings of a busy machine are worthless.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from literal import LiteralStep
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
        "counts": {"q": 48, "k": 48, "v": 96, "o": 96, "in": 256, "out": 288},
        "importance": {"d_model": 128, "n_blocks": 2, "n_heads": 4, "d_ffn": 512},
    },
    "M": {
        "target": {"n_layers": 4, "d_model": 128, "n_heads": 4, "d_mlp": 512, "d_vocab": 1024},
        "n_ctx": 128,
        "counts": {"q": 64, "k": 64, "v": 128, "o": 128, "in": 512, "out": 576},
        "importance": {"d_model": 256, "n_blocks": 4, "n_heads": 8, "d_ffn": 1024},
    },
    # To try a script out, and for tests; its times say nothing.
    "XS": {
        "target": {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_mlp": 32, "d_vocab": 64},
        "n_ctx": 16,
        "counts": {"q": 8, "k": 8, "v": 16, "o": 16, "in": 32, "out": 32},
        "importance": {"d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 32},
    },
}
BATCH = 16
Step = Callable[[Tensor, int], Any]
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


def preset(name: str) -> VPDConfig:
    """`VPDConfig.small()` with the shapes of a configuration."""
    configuration = CONFIGURATIONS[name]
    return VPDConfig.small(
        importance=configuration["importance"],
        batch_size=BATCH,
        seq_len=configuration["n_ctx"],
        steps=10_000,
    )


def stepper_for(name: str, model: nn.Module, config: VPDConfig) -> Stepper:
    """Decompose the target of a configuration, ready to train."""
    counts = {rf"\.{part}$": count for part, count in CONFIGURATIONS[name]["counts"].items()}
    vpd_lens.decompose(model, n_subcomponents=counts, importance=config.importance)
    return Stepper(model.vpd, config)


def steppers(name: str, kind: str, folder: Path | None, compiled: bool) -> dict[str, Step]:
    """The steps to compare, by name; each takes a batch and the number of the step."""
    configuration = CONFIGURATIONS[name]
    config = VPDConfig.paper(importance=configuration["importance"], steps=10_000)
    counts = {rf"\.{part}$": count for part, count in configuration["counts"].items()}
    steps: dict[str, Step] = {}
    for label in ("vpd_lens", "compiled")[: 1 + compiled]:
        model = build(name, kind)
        if folder is not None:
            load_weights(model, folder)
        vpd_lens.decompose(model, n_subcomponents=counts, importance=config.importance)
        steps[label] = Stepper(model.vpd, config.replaced({"compile": label == "compiled"})).step
    literal = LiteralStep(
        configuration["target"],
        configuration["counts"],
        configuration["importance"],
        (BATCH, configuration["n_ctx"]),
    )
    steps["literal"] = lambda batch, _: literal.step(batch)
    return steps


def measure(
    name: str, kind: str, folder: Path | None, rounds: int, compiled: bool
) -> dict[str, Any]:
    """Milliseconds per step of each kind, in turns; phases and peak memory of the first."""
    steps = steppers(name, kind, folder, compiled)
    data = batches(name, folder, rounds + 2)
    preparation, times = {}, {label: [] for label in steps}
    for label, step in steps.items():
        begun = time.perf_counter()
        step(data[0], 0)
        preparation[label] = time.perf_counter() - begun
        step(data[1], 1)
        if label == "vpd_lens":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for index, batch in enumerate(data[2:], start=2):
        for label, step in steps.items():
            begun = time.perf_counter()
            step(batch, index)
            times[label].append(1e3 * (time.perf_counter() - begun))
    return {
        "configuration": name,
        "model": kind,
        "trained_weights": folder is not None,
        "ms_per_step_median": {label: statistics.median(t) for label, t in times.items()},
        "ms_per_step_min": {label: min(t) for label, t in times.items()},
        "ratio_to_literal": {
            label: statistics.median(a / b for a, b in zip(t, times["literal"], strict=True))
            for label, t in times.items()
        },
        "first_step_s": preparation,
        "phases_ms": phases(steps["vpd_lens"], data[0]),
        "peak_memory_mib": peak,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }


def phases(step: Step, batch: Tensor, repeats: int = 3) -> dict[str, float]:
    """Milliseconds in each phase of a step, by the profiler, which slows everything a little."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            step(batch, 1)
    spans = {e.key: e.cpu_time_total / (1e3 * repeats) for e in profiler.key_averages()}
    return {phase: spans.get(f"vpd::{phase}", 0.0) for phase in PHASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configuration", choices=CONFIGURATIONS, default="S")
    parser.add_argument(
        "--model", choices=("hooked_transformer", "bridge"), default="hooked_transformer"
    )
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compiled = not options.no_compile
    result = measure(
        options.configuration, options.model, options.weights, options.rounds, compiled
    )
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def show(result: dict[str, Any]) -> None:
    title = f"{result['configuration']} on {result['model']}, ms per step"
    steps = Table("step", "median", "minimum", "ratio to literal", "first step, s", title=title)
    for label, median in result["ms_per_step_median"].items():
        columns = (result["ms_per_step_min"], result["ratio_to_literal"], result["first_step_s"])
        low, ratio, first = (column[label] for column in columns)
        steps.add_row(label, f"{median:.0f}", f"{low:.0f}", f"{ratio:.2f}", f"{first:.1f}")
    detail = Table("phase of a vpd_lens step", "ms")
    for phase, value in result["phases_ms"].items():
        detail.add_row(phase, f"{value:.1f}")
    detail.add_section()
    detail.add_row("peak memory, MiB", f"{result['peak_memory_mib']:.0f}")
    Console().print(steps, detail)


if __name__ == "__main__":
    main()
