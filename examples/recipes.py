"""Decompose one of four targets by a recipe, and record what came of it.

    python examples/recipes.py stories --data FOLDER --name base --steps 200
    python examples/recipes.py s --data FOLDER --name smooth --set minimality.penalty=smooth_l0

The targets: `s`, two layers, Python code, trained by others; `quickstart`, the quickstart's;
`stories`, Karpathy's five-layer stories260K; `shakespeare`, four layers, trained here on the plays.
`FOLDER` holds the files of those that others trained (`S/`, `stories260K/`) and
`tinyshakespeare.txt`. Each starts from the preset for small models at a size that suits it; `--set`
changes it. A finished run leaves a record in `OUTPUT/records` and is not repeated.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import stories260k
from quickstart_target import (
    TargetSize,
    get_target,
    new_model,
    save,
    split,
    tokenise,
    train_target,
    train_tokenizer,
)
from recorded.run import Run, Target, perform
from vpd_lens.config import VPDConfig
from vpd_lens.config.base import parse_yaml
from vpd_lens.models import load_model

PLAYS = TargetSize(n_layers=4, vocabulary=384)
console = Console()


def target_s(folder: Path, _output: Path) -> tuple[Target, dict]:
    """Target S as a HookedTransformer (TransformerLens 3.x), and its sizes."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    folder = folder / "S"

    def load() -> nn.Module:
        config = HookedTransformerConfig(
            n_layers=2, d_model=64, n_ctx=64, d_head=16, n_heads=4, d_mlp=256, d_vocab=512,
            act_fn="gelu_new", normalization_type="RMS", positional_embedding_type="rotary",
            rotary_dim=16, eps=1e-6, device="cpu",
        )  # fmt: skip
        model = HookedTransformer(config)
        model.load_state_dict(in_transformer_lens(load_file(folder / "model.safetensors")), False)
        return model.eval()

    def stream(name: str) -> Tensor:
        return torch.from_numpy(np.load(folder / name).astype(np.int64))

    held_out = stream("eval_tokens.npy")[: 128 * 64].view(128, 64)
    target = Target({"name": "S"}, load, stream("train_tokens.npy"), held_out)
    return target, {
        "n_subcomponents": {"attn.[qk]": 64, "attn.[vo]": 96, "mlp.in": 256, "mlp.out": 288},
        "batch_size": 16,
        "importance": {"d_model": 128, "n_blocks": 2, "n_heads": 4},
        "minimality": {"coefficient": 1.1e-3},
    }


def in_transformer_lens(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights `[out, in]` of targets S and M under HookedTransformer's names and shapes."""
    found = {
        "embed.W_E": weights["embed.weight"],
        "unembed.W_U": weights["unembed.weight"].T,
        "ln_final.w": weights["norm_out.scale"],
    }
    for layer in range(sum(name.endswith("norm_mlp.scale") for name in weights)):
        own, block = f"layers.{layer}", f"blocks.{layer}"
        found[f"{block}.ln1.w"] = weights[f"{own}.norm_attn.scale"]
        found[f"{block}.ln2.w"] = weights[f"{own}.norm_mlp.scale"]
        for name in "qkv":
            matrix = weights[f"{own}.attn.{name}.weight"].unflatten(0, (4, -1))
            found[f"{block}.attn.W_{name.upper()}"] = matrix.transpose(1, 2)
        found[f"{block}.attn.W_O"] = weights[f"{own}.attn.o.weight"].T.unflatten(0, (4, -1))
        found[f"{block}.mlp.W_in"] = weights[f"{own}.mlp.up.weight"].T
        found[f"{block}.mlp.W_out"] = weights[f"{own}.mlp.down.weight"].T
    return {name: tensor.contiguous() for name, tensor in found.items()}


def target_quickstart(_folder: Path, output: Path) -> tuple[Target, dict]:
    """The quickstart's model, trained if it has not been, and its sizes."""
    folder = output / "targets" / "quickstart"
    _, tokens, held_out = get_target(folder, 2500, seed=0)
    target = Target({"name": "quickstart"}, lambda: load_model(folder), tokens, held_out[:128])
    return target, {"importance": {"d_model": 128, "n_blocks": 2, "n_heads": 4}}


def target_stories(folder: Path, _output: Path) -> tuple[Target, dict]:
    """The stories260K model and its sizes."""
    target = stories260k.run(folder / "stories260K", 1, 0).target
    sizes = stories260k.configuration(1, 0, "small")
    kept = ("batch_size", "seq_len", "minimality", "importance")
    return target, {name: getattr(sizes, name) for name in kept}


def target_shakespeare(folder: Path, output: Path) -> tuple[Target, dict]:
    """A four-layer model of Shakespeare's plays, trained if it has not been, and its sizes."""
    text = (folder / "tinyshakespeare.txt").read_text(encoding="utf-8")
    place = output / "targets" / "shakespeare"
    if not (place / "config.json").exists():
        tokenizer = train_tokenizer(text, PLAYS.vocabulary)
        tokens, _ = split(tokenise(tokenizer, text), PLAYS.context)
        model = new_model(0, PLAYS)
        loss = train_target(model, tokens, 3000, 0, console)
        console.print(f"Target trained: cross-entropy {loss:.3f} nats per token.")
        save(model, tokenizer, place)
    tokens, held_out = split(tokenise(load_model(place).tokenizer, text), PLAYS.context)
    target = Target({"name": "shakespeare"}, lambda: load_model(place), tokens, held_out[:128])
    return target, {"importance": {"d_model": 128, "n_blocks": 2, "n_heads": 4}}


TARGETS = {
    "s": target_s,
    "quickstart": target_quickstart,
    "stories": target_stories,
    "shakespeare": target_shakespeare,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--name", default="small")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of the evaluation")
    parser.add_argument("--attack", type=int, nargs="*", default=[20, 80])
    parser.add_argument("--audit", action="store_true", help="audit the result, too")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    arguments = parser.parse_args()

    target, sizes = TARGETS[arguments.target](arguments.data, arguments.output)
    every = {"log_every": max(1, arguments.steps // 20), "checkpoint_every": 100}
    config = VPDConfig.small(steps=arguments.steps, seed=arguments.seed, **every).merged(sizes)
    changes = (pair.partition("=") for pair in arguments.set)
    config = config.replaced({path: parse_yaml(value, path) for path, _, value in changes})
    length = config.seq_len or target.held_out.shape[1]
    evaluation = {
        "batch_size": arguments.rows,
        "n_batches": 1,
        "pgd_steps": arguments.attack,
        "pgd_restarts": 2,
        **({"audit": True} if arguments.audit else {}),
    }
    target = replace(target, held_out=target.held_out[: arguments.rows, :length])
    name = f"{arguments.target},{arguments.name},steps={arguments.steps},seed={arguments.seed}"
    report = perform(Run(name, target, config, evaluation), arguments.output).report
    console.print(report)


if __name__ == "__main__":
    main()
