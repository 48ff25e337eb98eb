"""Train a small transformer on Python code, decompose it with VPD, and look at what came out.

Everything happens offline: the text is the source of Python's own standard library.

    python examples/quickstart.py            # 8 to 13 minutes on two idle CPU cores in version 0.1
    python examples/quickstart.py --help

Run again after an interruption, it goes on from the last checkpoint.

The steps are those of any project: a target model, `vpd_lens.decompose(model, data, config)`,
`vpd_lens.evaluate`, and ordinary TransformerLens on the result.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Threads that spin while they wait make a step many times as long when anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from torch import Tensor

import vpd_lens
from quickstart_target import get_target
from vpd_lens.errors import VPDError
from vpd_lens.evaluation import EvalReport
from vpd_lens.training import VPDConfig

N_NEW = 16  # tokens of a continuation
STORED = Path(__file__).parent / "quickstart_without_adversary.json"
console = Console()


def configuration(steps: int, seed: int) -> VPDConfig:
    """The run of this example: the preset for small models, shortened."""
    return VPDConfig.small(steps=steps, seed=seed, log_every=max(1, steps // 20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--target-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=500, help="VPD training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--without-adversary", action="store_true", help="the control, stored beside this script"
    )
    arguments = parser.parse_args()
    begun = time.perf_counter()

    console.rule("1. A target model")
    model, train_tokens, held_out = get_target(
        arguments.output / "target", arguments.target_steps, arguments.seed
    )

    console.rule("2. Its decomposition")
    config = configuration(arguments.steps, arguments.seed)
    if arguments.without_adversary:
        config = config.without_adversary()
    name = "vpd-without-adversary" if arguments.without_adversary else "vpd"
    folder = arguments.output / name
    resume = (folder / "checkpoint").exists()
    vpd_lens.decompose(model, train_tokens, config, output=folder, resume=resume)
    console.print(model.vpd)

    console.rule("3. Is it any good?")
    attacks = {"pgd_steps": (20, 40, 80, 160), "pgd_restarts": 2, "audit": True}
    report = vpd_lens.evaluate(model, held_out[:64], **attacks)
    report.to_json(folder / "report.json")
    show(report, model, held_out, folder)
    console.print(f"\nDone in {(time.perf_counter() - begun) / 60:.1f} minutes.")


def show(report: EvalReport, model: torch.nn.Module, held_out: Tensor, folder: Path) -> None:
    """The tables beside the stored run without the adversary, some text, and what to do next."""
    beside = EvalReport.from_json(STORED) if STORED.exists() else None
    name = "without adversary"
    console.print(report.tables(beside, name))
    report.to_html(folder / "report.html", "VPD of the quickstart model", beside, name)
    prompt = held_out[:1, :24]
    console.print("A prompt and its continuation under different masks (greedy):")
    console.print(repr(model.to_string(prompt[0])), highlight=False, markup=False)
    for mode in ("target", "rounded", "stochastic", "adversarial"):
        with model.vpd.masked(mode, seed=0):
            out = model.generate(
                prompt, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False
            )
        text = repr(model.to_string(out[0, prompt.shape[1] :]))
        console.print(f"  {mode:12s} {text}", highlight=False, markup=False)
    console.print(
        f"\nReport:        {folder / 'report.html'}\n"
        f"Decomposition: {folder / 'decomposition'}\n"
        f"Target model:  {folder.parent / 'target'}\n\n"
        "What to try next:\n"
        f"  vpd-lens info {folder / 'decomposition'}\n"
        f"  vpd-lens eval {folder / 'decomposition'} --model {folder.parent / 'target'} "
        "--data <a folder of text>\n"
        "  python examples/quickstart.py --steps 4000 --output runs/longer\n"
        "  In Python: model = vpd_lens.load(decomposition, load_model(target)), then\n"
        "  model.run_with_cache(tokens) and look for names that contain '.vpd.'."
    )


if __name__ == "__main__":
    try:
        main()
    except VPDError as error:
        sys.exit(f"quickstart: {error}")
