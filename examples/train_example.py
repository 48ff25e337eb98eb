"""Make the example that ships with the library: a model of Python code, decomposed and measured.

    python examples/train_example.py         # hours on one core; run again, it goes on

The target learns the sources of Python's standard library; all 28 matrices of its four blocks are
decomposed; what is stored in half precision is loaded again, and that is measured and harvested.
`--install` puts the result where `vpd_lens.load_example()` reads it. `--without-adversary` makes
the control and its report, which `examples/figures.py` draws beside the example's.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor, nn

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
from vpd_lens import example, storage
from vpd_lens.config import CausalImportanceConfig, VPDConfig
from vpd_lens.description import DecompositionRecord
from vpd_lens.errors import VPDError
from vpd_lens.evaluation import EvalReport
from vpd_lens.model_card import write_card
from vpd_lens.models import load_model

SIZE = TargetSize(n_layers=4, d_model=128, d_mlp=256, vocabulary=1024, context=128, batch_size=16)
N_CHARACTERS = 20_000_000  # more than there are
ATTACKS = {"pgd_steps": (20, 40, 80, 160), "pgd_restarts": 2, "audit": True}
LIMIT = 8 * 2**20  # bytes of all that ships
console = Console()


def configuration(steps: int, seed: int) -> VPDConfig:
    """The preset for small models, an adversary that grows, and importances that never look ahead.

    The run that ships began with a coefficient of 2e-4 and went on with this one from step 3690:
    at the higher price the importances alone, as masks, lost too much.
    """
    return VPDConfig.small(
        steps=steps,
        seed=seed,
        batch_size=6,
        n_subcomponents={"attn": SIZE.d_model, "mlp": SIZE.d_mlp},
        importance=CausalImportanceConfig(
            d_model=96, n_blocks=2, n_heads=4, causal=True, reads="blocks"
        ),
    ).replaced(
        {
            "adversary.lr_warmup": 0.5,
            "stochastic.routing": "mixed",
            "minimality.penalty": "smooth_l0",
            "minimality.anneal": 0.9,
            "minimality.coefficient": 8e-5,
        }
    )


def get_target(
    folder: Path, steps: int, seed: int
) -> tuple[nn.Module, Int[Tensor, " n_tokens"], Int[Tensor, "rows 128"]]:
    """The target, trained and rounded to fp16 if it is not there yet, and its data."""
    text = standard_library_text(N_CHARACTERS)
    if not (folder / "config.json").exists():
        tokenizer = train_tokenizer(text[:4_000_000], SIZE.vocabulary)
        tokens, _ = split(tokenise(tokenizer, text), SIZE.context)
        trained = new_model(seed, SIZE)
        loss = train_target(trained, tokens, steps, seed, console, SIZE.batch_size)
        console.print(f"Target trained: cross-entropy {loss:.3f} nats per token.")
        save(trained.half(), tokenizer, folder)
    model = load_model(folder)
    return model, *split(tokenise(model.tokenizer, text), SIZE.context)


def pack(
    folder: Path, target: Path, decomposition: Path, held_out: Tensor, tokens: Tensor, note: str
) -> Path:
    """Write all that ships: what is measured and harvested is what `load_example` will give."""

    def parts(new: Path) -> None:
        shutil.copytree(target, new / example.MODEL)
        model = vpd_lens.load(decomposition, load_model(target))
        model.vpd.save(new / example.DECOMPOSITION, dtype=torch.float16)
        detach(new / example.DECOMPOSITION)
        model = vpd_lens.load(new / example.DECOMPOSITION, load_model(new / example.MODEL))
        report = measured(model, held_out)
        report.to_json(new / example.REPORT)
        n = {"n_batches": 1000, "batch_size": 8, "n_top": 1, "n_random": 1, "context": 4}
        harvest = vpd_lens.harvest(model, tokens, **n, seq_len=SIZE.context)
        harvest.trimmed(6).save(new / example.HARVEST)
        (new / "README.md").write_text(card(model, report, loss, note))

    loss = cross_entropy(load_model(target), held_out[:512])
    record = example.ExampleRecord(python=platform.python_version(), target_loss=loss)
    storage.write(folder, record, {}, parts)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console.print(f"{folder}: {size / 2**20:.2f} MiB")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT / 2**20:g} MiB: nothing that size ships")
    return folder


def detach(folder: Path) -> None:
    """Let a saved decomposition say that its base model is beside it, and name no other folder."""
    artefact = storage.read(folder, DecompositionRecord)
    record = artefact.record
    assert record.origin is not None
    origin = record.origin.model_copy(update={"source": f"../{example.MODEL}"})
    base = record.base_model.model_copy(update={"model_name": "the example of vpd_lens"})
    record = record.model_copy(update={"origin": origin, "base_model": base})
    tensors = {name: artefact.tensors(name) for name in ("subcomponents", "causal_importance")}
    storage.write(folder, record, tensors, lambda new: write_card(new, record))


def measured(model: nn.Module, held_out: Int[Tensor, "rows 128"]) -> EvalReport:
    """The evaluation that ships, on text that was not trained on."""
    return vpd_lens.evaluate(model, held_out[:64], batch_size=16, n_batches=4, **ATTACKS)


@torch.no_grad()
def cross_entropy(model: nn.Module, rows: Int[Tensor, "rows pos"]) -> float:
    """Mean over next tokens, in nats."""
    losses = [float(model(part, return_type="loss")) for part in rows.split(64)]
    return sum(losses) / len(losses)


def card(model: nn.Module, report: EvalReport, loss: float, note: str) -> str:
    """The model card."""
    summary, vpd = report.summary(), model.vpd
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in summary.items())
    return (
        "# The example of vpd_lens\n\n"
        f"A Qwen2 of {SIZE.n_layers} layers and {SIZE.d_model} dimensions that writes Python, with "
        f"a VPD decomposition of all {len(vpd.sites)} matrices of its blocks into "
        f"{vpd.layout.total} subcomponents, trained for {vpd.trained_steps} steps. Its held-out "
        f"cross-entropy is {loss:.3f} nats per token. The text is the source of the standard "
        f"library of Python {platform.python_version()}, without tests. Weights are in fp16. {note}"
        "\n\n"
        "```python\nimport vpd_lens\n\nmodel = vpd_lens.load_example()\n```\n\n"
        "Made by `examples/train_example.py`; `report.json` and `harvest/` are of what is stored "
        "here. Divergences are in nats.\n\n"
        f"{report.verdict()}\n\n| measured | |\n|---|---|\n{rows}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/example"))
    parser.add_argument("--target-steps", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=6000, help="VPD training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--install", action="store_true", help=f"write to {example.FOLDER}, too")
    parser.add_argument("--note", default="", help="what else the model card is to say")
    parser.add_argument("--without-adversary", action="store_true", help="the control")
    arguments = parser.parse_args()
    target, config = arguments.output / "target", configuration(arguments.steps, arguments.seed)
    run = arguments.output / "vpd"
    if arguments.without_adversary:
        config, run = config.without_adversary(), run.with_name("vpd-without-adversary")
    model, tokens, held_out = get_target(target, arguments.target_steps, arguments.seed)
    if (run / "decomposition").exists():
        vpd_lens.load(run, model)
    else:
        resume = (run / "checkpoint").exists()
        vpd_lens.decompose(model, tokens, config, output=run, resume=resume)
    if arguments.without_adversary:
        measured(model, held_out).to_json(run / "report.json")
        return
    packed = pack(
        arguments.output / "example",
        target,
        run / "decomposition",
        held_out,
        tokens,
        arguments.note,
    )
    if arguments.install:
        shutil.copytree(packed, example.FOLDER, dirs_exist_ok=True)


if __name__ == "__main__":
    try:
        main()
    except VPDError as error:
        sys.exit(f"train_example: {error}")
