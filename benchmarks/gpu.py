"""The paper's configuration on one GPU: correctness first, then speed, memory and phases.

    python benchmarks/gpu.py --compile --json out.json
    python benchmarks/gpu.py --recompute --batch 16
    python benchmarks/gpu.py --device cpu --tiny      # the same script where there is no GPU

The target has random weights, which take the same time: 4 layers, d_model 768, 6 heads, d_mlp
3072, 50 277 tokens; 9 728 subcomponents a layer; the paper's causal importance transformer.
The arithmetic of a step is compared with the GPU's peak for dense bf16
products (`--peak`, in TFLOP/s). TF32 is off but for what `--matmul high` allows; autocast
is bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vpd_lens
from vpd_lens.decomposition import CausalImportanceConfig, Decomposition, Divergence
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.masks import Sources
from vpd_lens.training import VPDConfig
from vpd_lens.training import step as stepping
from vpd_lens.training.plan import plan_step
from vpd_lens.training.step import Stepper

PAPER = {"n_layers": 4, "d_model": 768, "n_heads": 6, "d_mlp": 3072, "d_vocab": 50_277}
TINY = {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_mlp": 256, "d_vocab": 512}
PAPER_IMPORTANCE = CausalImportanceConfig(d_model=2048, n_blocks=8, n_heads=16, d_ffn=8192)
TINY_IMPORTANCE = CausalImportanceConfig(d_model=128, n_blocks=2, n_heads=4, d_ffn=512)


def target(shape: dict[str, int], context: int, kind: str, device: str) -> nn.Module:
    """A target of either model class, with random weights."""
    d_head = shape["d_model"] // shape["n_heads"]
    common: dict[str, Any] = {
        **shape,
        "n_ctx": context,
        "d_head": d_head,
        "act_fn": "gelu_new",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "seed": 0,
    }
    if kind == "hooked_transformer":
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        return HookedTransformer(HookedTransformerConfig(**common, device=device)).eval()
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_native(TransformerBridgeConfig(**common)).to(device).eval()


def loss_and_gradients(model: nn.Module, tokens: Tensor, autocast: bool) -> dict[str, Tensor]:
    """One masked forward and backward under sources drawn on the CPU, results on the CPU."""
    vpd: Decomposition = model.__dict__["vpd"]
    device = vpd.device
    generator = torch.Generator().manual_seed(1)
    lead = tuple(tokens.shape)
    sources = Sources(
        torch.rand(*lead, vpd.layout.total, generator=generator).to(device),
        torch.rand(*lead, vpd.layout.n_sites, generator=generator).to(device),
    )
    vpd.zero_grad()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        output, inputs = vpd.target(tokens.to(device))
        g = lower_leaky(vpd.pre_importance(inputs))
        loss = Divergence(output, "kl")(vpd.run(sources.over(g), tokens.to(device)))
    loss.backward()
    gradients = {n: p.grad for n, p in vpd.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().cpu()} | {n: t.float().cpu() for n, t in gradients.items()}


def correctness(device: str, kind: str) -> dict[str, dict[str, float]]:
    """Relative differences from fp32 on the CPU, on a small model: loss, and worst gradient."""
    tokens = torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(0))
    results = {}
    for name, place, autocast in (
        ("cpu", "cpu", False),
        ("fp32", device, False),
        ("bf16", device, True),
    ):
        model = target(TINY, 64, kind, "cpu")
        vpd_lens.decompose(model, importance=TINY_IMPORTANCE)
        results[name] = loss_and_gradients(model.to(place), tokens, autocast)
    expected = results.pop("cpu")

    def difference(got: Tensor, wanted: Tensor) -> float:
        return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))

    return {
        name: {
            "loss": difference(got["loss"], expected["loss"]),
            "worst_gradient": max(difference(got[n], expected[n]) for n in expected if n != "loss"),
        }
        for name, got in results.items()
    }


@contextmanager
def phases_timed(device: torch.device) -> Iterator[dict[str, list[float]]]:
    """Wall time inside each `record_function` of a step, the device being waited for."""
    times: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        wait(device)
        begun = time.perf_counter()
        yield
        wait(device)
        times[name.removeprefix("vpd::")].append(1e3 * (time.perf_counter() - begun))

    original, stepping.record_function = stepping.record_function, timed  # type: ignore[assignment]
    try:
        yield times
    finally:
        stepping.record_function = original  # type: ignore[assignment]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    shape, importance = (TINY, TINY_IMPORTANCE) if options.tiny else (PAPER, PAPER_IMPORTANCE)
    model = target(shape, options.seq_len, options.model, options.device)
    config = VPDConfig.paper(
        importance=importance,
        batch_size=options.batch,
        seq_len=options.seq_len,
        compile=options.compile,
        recompute=options.recompute,
        micro_batches=options.micro_batches,
        steps=10_000,
    ).replaced({"adversary.scope": options.scope})
    vpd_lens.decompose(model, n_subcomponents="paper", importance=importance)
    stepper = Stepper(model.vpd, config)
    generator = torch.Generator().manual_seed(0)
    size = (options.batch, options.seq_len)
    batches = [torch.randint(shape["d_vocab"], size, generator=generator) for _ in range(4)]
    begun = time.perf_counter()
    stepper.step(batches[0], 0)
    wait(device)
    first = time.perf_counter() - begun
    for index in range(options.warmup):
        stepper.step(batches[index % 4], index)
    times = []
    for index in range(options.steps):
        wait(device)
        begun = time.perf_counter()
        stepper.step(batches[index % 4], index)
        wait(device)
        times.append(time.perf_counter() - begun)
    with phases_timed(device) as phases:
        for index in range(3):
            stepper.step(batches[index % 4], index)
    seconds = statistics.median(times)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    without_values = target(shape, options.seq_len, options.model, "cpu")
    arithmetic = plan_step(without_values, config, *size).total_flop
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "model": options.model,
        "tiny": options.tiny,
        "batch": options.batch,
        "seq_len": options.seq_len,
        "compile": options.compile,
        "recompute": options.recompute,
        "scope": options.scope,
        "subcomponents": model.vpd.layout.total,
        "first_step_s": first,
        "seconds_per_step": seconds,
        "steps_per_second": 1 / seconds,
        "peak_memory_gib": peak,
        "tflop_per_step": arithmetic / 1e12,
        "share_of_bf16_peak": arithmetic / seconds / (options.peak * 1e12),
        "phases_ms": {name: sum(values) / 3 for name, values in phases.items()},
    }


def show(result: dict[str, Any]) -> None:
    table = Table(
        "measured", "", title=f"{result['device']}, batch {result['batch']} x {result['seq_len']}"
    )
    for name, value in result.items():
        if isinstance(value, dict):
            table.add_section()
            for key, part in value.items():
                table.add_row(
                    f"{name}: {key}", str(part) if isinstance(part, dict) else f"{part:.3g}"
                )
        else:
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--model", choices=("hooked_transformer", "bridge"), default="bridge")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument(
        "--scope", default="position", choices=("position", "sequence", "batch", "single")
    )
    parser.add_argument("--matmul", default="highest", choices=("highest", "high", "medium"))
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peak", type=float, default=989.0, help="bf16 TFLOP/s: 989 H100/H200 SXM")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # The comparison of devices is exact fp32; only the timed run may use TF32.
    result = {"difference_from_cpu": correctness(options.device, options.model)}
    torch.set_float32_matmul_precision(options.matmul)
    result = measure(options) | {"matmul": options.matmul} | result
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
