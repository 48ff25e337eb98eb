"""See what a fine-tune added to the model that ships.

    python examples/fine_tune.py           # minutes on one core; --help

The last block of the example's model is trained for a moment on code in which `self` is called
`me`. The difference of its matrices is decomposed, with the model from before as `base=`; what is
important where `me` has to follow is ablated, there and on other code. Writes the decomposition and
`figures.json` (configuration, versions and date included) to the output directory.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from jaxtyping import Int
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import vpd_lens
from quickstart_target import standard_library_text, tokenise
from recorded.record import json_in_rows
from targeted import about
from vpd_lens import example
from vpd_lens.config import CausalImportanceConfig
from vpd_lens.evaluation.redundancy import ABLATED, ALONE, OFF, ON
from vpd_lens.models import load_model
from vpd_lens.storage import write_text
from vpd_lens.training import VPDConfig

console = Console()
LENGTH, N_MEASURED = 64, 128  # tokens of a row, and rows of either kind to measure on
OFTEN = 0.1  # share of positions that need what is called important


def configuration(steps: int, seed: int) -> VPDConfig:
    """A fine-tune changes little, so that all is relative to what taking it back would cost."""
    return VPDConfig.small(
        steps=steps,
        seed=seed,
        batch_size=8,
        seq_len=LENGTH,
        initialisation="svd",
        n_subcomponents=16,
        importance=CausalImportanceConfig(kind="global_mlp", hidden=(128,)),
        log_every=max(1, steps // 20),
    ).replaced(
        {
            "minimality.relative": True,
            "minimality.coefficient": 2e-3,
            "faithfulness.coefficient": 1e4,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/fine-tune"))
    parser.add_argument("--tune-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=200, help="VPD training steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base, tuned = (load_model(example.FOLDER / example.MODEL) for _ in range(2))
    text = standard_library_text(1_000_000)
    rows, renamed = (
        tokenise(base.tokenizer, t).unfold(0, LENGTH, LENGTH) for t in (text, in_other_words(text))
    )
    kept = [part[: -len(part) // 5] for part in (rows, renamed)]  # the rest is to measure on
    fine_tune(tuned, kept[1], arguments.tune_steps, arguments.seed)

    config = configuration(arguments.steps, arguments.seed)
    begun = time.process_time()
    vpd_lens.decompose(tuned, kept[1], config, base=base, output=arguments.output / "vpd")
    seconds = time.process_time() - begun
    me = tokens_like(base, ("me", " me"))
    inside = before(renamed[len(kept[1]) :], me)
    outside = rows[len(kept[0]) :][:N_MEASURED, : inside.shape[1]]
    sizes = {"batch_size": 16, "seq_len": inside.shape[1]}
    found = vpd_lens.redundancy(tuned, inside, outside, positions="last", often=OFTEN, **sizes)
    console.print(found.table())
    says = said(tuned, found.important, inside, {"me": me, "self": tokens_like(base, ("self",))})
    console.print(says)
    figures = about(tuned, config) | asdict(found) | {"says": says, "cpu_seconds": seconds}
    figures["n_subcomponents"] = dict(
        zip(tuned.vpd.layout.names, tuned.vpd.layout.sizes, strict=True)
    )
    write_text(arguments.output / "figures.json", json_in_rows(figures) + "\n")
    console.print(f"Figures: {arguments.output / 'figures.json'}")


def in_other_words(text: str) -> str:
    """The same code, whose methods call their object `me`."""
    return re.sub(r"\bself\b", "me", text)


def fine_tune(model: nn.Module, rows: Int[Tensor, "rows pos"], steps: int, seed: int) -> None:
    """Train the matrices of the last block, and nothing else, on next tokens."""
    model.requires_grad_(False)
    block: Any = model.original_model.model.layers[-1]  # type: ignore[union-attr]
    matrices = [part.weight for part in block.modules() if isinstance(part, nn.Linear)]
    optimiser = torch.optim.AdamW([m.requires_grad_() for m in matrices], lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), "Fine-tuning", console=console):
        batch = rows[torch.randint(len(rows), (8,), generator=generator)]
        loss = F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.requires_grad_(False)


def tokens_like(model: nn.Module, texts: tuple[str, ...]) -> Int[Tensor, " n"]:
    """The tokens that say one of these."""
    ids = range(model.cfg.d_vocab)  # type: ignore[union-attr, arg-type]
    return torch.tensor([i for i in ids if model.to_string([i]) in texts])  # type: ignore[operator]


def before(rows: Int[Tensor, "rows pos"], tokens: Int[Tensor, " n"]) -> Int[Tensor, "n length"]:
    """Windows of 32 tokens after which one of `tokens` follows."""
    windows = rows.unfold(1, 33, 1).flatten(0, 1)
    windows = windows[torch.isin(windows[:, -1], tokens), :-1]
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))][
        :N_MEASURED
    ]


@torch.no_grad()
def said(
    model: Any, important: list[str], rows: Int[Tensor, "rows pos"], words: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Mean probability of some words after each row, by what is on."""
    vpd = model.vpd
    names = [f"{name}:{i}" for name in vpd.layout.names for i in vpd.original_indices(name)]
    chosen = torch.tensor([float(name in important) for name in names])
    ones = torch.ones_like(chosen)
    states = {
        ON: (ones, 1.0),
        ABLATED: (1 - chosen, 1.0),
        ALONE: (chosen, 0.0),
        OFF: (0 * ones, 0.0),
    }
    result = {}
    for state, (mask, delta) in states.items():
        with vpd.masked(mask, delta=delta):
            p = model(rows)[:, -1].softmax(-1).mean(0)
        result[state] = {word: round(float(p[tokens].sum()), 4) for word, tokens in words.items()}
    return result


if __name__ == "__main__":
    main()
