"""A real run on one GPU: train a target on Python's standard library, then decompose it.

    python examples/gpu_run.py --output runs/gpu                 # about half an hour on an H100
    python examples/gpu_run.py --output /tmp/try --tiny --device cpu --target-steps 50 --steps 20

Both parts stop at their step counts; training of the decomposition can be interrupted and is
continued by the same command. The evaluation table and the adversarial curve are written to
`report.json` and `report.html` in the output directory, with the times in `run.json`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console

import vpd_lens
from quickstart_target import (
    TargetSize,
    new_model,
    save,
    split,
    standard_library_text,
    tokenise,
    train_target,
    train_tokenizer,
)
from vpd_lens.models import load_model
from vpd_lens.storage import write_json
from vpd_lens.training import VPDConfig

LARGE = TargetSize(n_layers=6, d_model=512, n_heads=8, vocabulary=8192, context=256, batch_size=64)
TINY = TargetSize(n_layers=2, d_model=32, n_heads=2, vocabulary=320, context=32, batch_size=8)
console = Console()


def get_target(folder: Path, size: TargetSize, steps: int, device: str) -> tuple:
    """The target, its training stream and held-out rows, and the seconds its training took."""
    text = standard_library_text(60_000_000 if size == LARGE else 1_000_000)
    seconds = 0.0
    if not (folder / "config.json").exists():
        tokenizer = train_tokenizer(text[:8_000_000], size.vocabulary)
        model = new_model(0, size).to(device)
        tokens, _ = split(tokenise(tokenizer, text), size.context)
        begun = time.perf_counter()
        loss = train_target(model, tokens, steps, 0, console, size.batch_size, lr=1e-3)
        seconds = time.perf_counter() - begun
        save(model, tokenizer, folder)
        console.print(f"Target trained: cross-entropy {loss:.3f} nats per token.")
    model = load_model(folder, device=device)
    return model, *split(tokenise(model.tokenizer, text), size.context), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--target-steps", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=10_000, help="VPD training steps")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=NUMBER")
    arguments = parser.parse_args()
    size = TINY if arguments.tiny else LARGE

    console.rule("1. A target model")
    model, train_tokens, held_out, target_seconds = get_target(
        arguments.output / "target", size, arguments.target_steps, arguments.device
    )

    console.rule("2. Its decomposition")
    config = VPDConfig.small(
        steps=arguments.steps,
        batch_size=32 if size == LARGE else 4,
        device=arguments.device,
        compile=arguments.compile,
        log_every=max(1, arguments.steps // 200),
        checkpoint_every=max(1, arguments.steps // 10),
    )
    config = config.replaced(
        {path: float(value) for path, value in (pair.split("=") for pair in arguments.set)}
    )
    folder = arguments.output / "vpd"
    begun = time.perf_counter()
    vpd_lens.decompose(
        model, train_tokens, config, output=folder, resume=(folder / "checkpoint").exists()
    )
    seconds = time.perf_counter() - begun

    console.rule("3. Is it any good?")
    attacks = (20, 40, 80, 160, 320) if size == LARGE else (5, 10)
    report = vpd_lens.evaluate(model, held_out[:64], pgd_steps=attacks)
    console.print(report.tables())
    report.to_json(arguments.output / "report.json")
    report.to_html(arguments.output / "report.html", "VPD of a target trained on Python code")
    cuda = torch.cuda.is_available() and arguments.device.startswith("cuda")
    write_json(
        arguments.output / "run.json",
        {
            "target": vars(size) | {"steps": arguments.target_steps, "seconds": target_seconds},
            "training": config.model_dump(mode="json"),
            "seconds": seconds,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            "torch": torch.__version__,
        },
    )


if __name__ == "__main__":
    main()
