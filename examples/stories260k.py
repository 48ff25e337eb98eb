"""Decompose a real model that others trained: Karpathy's 260K-parameter TinyStories Llama.

Five layers, grouped-query attention, gated MLPs, RMSNorm and rotary embeddings on adjacent pairs:
35 weight matrices. The folder must hold `stories260K.json` (the configuration),
`stories260K.safetensors` (weights named as in HookedTransformer), `sampled_corpus.safetensors`
(tokens sampled from the model itself) and `tok512.json` (its vocabulary).

    python examples/stories260k.py FOLDER --steps 1500

An interrupted run goes on; a finished one leaves a record of everything in `OUTPUT/records` and is
not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import vpd_lens
from recorded.run import Run, Target, load_decomposed, perform
from vpd_lens.config import MinimalityConfig, VPDConfig
from vpd_lens.storage import file_hash

console = Console()


def load_stories(folder: Path) -> torch.nn.Module:
    """The model as a HookedTransformer (TransformerLens 3.x)."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = json.loads((folder / "stories260K.json").read_text())["hooked_transformer_config"]
    model = HookedTransformer(HookedTransformerConfig(**config, device="cpu"))
    missing = model.load_state_dict(load_file(folder / "stories260K.safetensors"), strict=False)
    learned = [name for name in missing.missing_keys if ".W_" in name or name.endswith(".w")]
    if learned:
        raise SystemExit(f"{folder} lacks the weights {learned}")
    return model.eval()


def load_tokens(folder: Path) -> tuple[Tensor, Tensor]:
    """The sampled corpus `[rows, 256]`, split into 1920 training and 128 held-out rows."""
    (tokens,) = load_file(folder / "sampled_corpus.safetensors").values()
    return tokens[:-128].long(), tokens[-128:].long()


def text(tokens: Tensor, folder: Path) -> str:
    """Tokens as text, by the model's own vocabulary."""
    pieces = json.loads((folder / "tok512.json").read_text())["pieces"]
    return "".join(pieces[token] for token in tokens.tolist() if token > 2)


def configuration(steps: int, seed: int, losses: str) -> VPDConfig:
    """The preset for small models, or with `losses="paper"` the paper's losses at its size."""
    small = VPDConfig.small(
        steps=steps,
        seed=seed,
        batch_size=8,
        seq_len=128,
        minimality=MinimalityConfig(coefficient=3e-4),
        importance=vpd_lens.CausalImportanceConfig(d_model=128, n_blocks=3, n_heads=4),
        log_every=max(1, steps // 30),
        checkpoint_every=max(1, steps // 10),
    )
    return small if losses == "small" else small.with_paper_losses()


def run(folder: Path, steps: int, seed: int, losses: str = "small") -> Run:
    """What is decomposed, how, and how it is evaluated."""
    train_tokens, held_out = load_tokens(folder)
    target = Target(
        {"name": "stories260K", "weights": file_hash(folder / "stories260K.safetensors")},
        lambda: load_stories(folder),
        train_tokens,
        held_out[:64, :128],
    )
    evaluation = {"pgd_steps": [20, 40, 80], "pgd_restarts": 2}
    name = f"{losses},steps={steps},seed={seed}"
    return Run(name, target, configuration(steps, seed, losses), evaluation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/stories260k"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", choices=("small", "paper"), default="small")
    arguments = parser.parse_args()

    stories = run(arguments.folder, arguments.steps, arguments.seed, arguments.losses)
    console.print(perform(stories, arguments.output).report)
    model = load_decomposed(stories, arguments.output)
    console.print(model.vpd)

    for mode in ("target", "rounded", "stochastic"):
        console.print(f"{mode:12s} {story(model, mode, arguments.folder)!r}", markup=False)


def story(model: torch.nn.Module, mode: str, folder: Path, n_tokens: int = 60) -> str:
    """Greedy text, masks active from the first token.

    Cached generation of HookedTransformer needs a tokenizer object, and this vocabulary has none.
    """
    with model.vpd.masked(mode, seed=0):
        tokens = model.generate(
            torch.tensor([[1]]),
            max_new_tokens=n_tokens,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=False,
            verbose=False,
        )
    return text(tokens[0], folder)


if __name__ == "__main__":
    main()
