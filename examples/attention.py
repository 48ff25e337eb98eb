"""Find the previous-token mechanism of the example, over heads, and take it away.

    python examples/attention.py     # of the example that ships with the library

Looks, on text that neither the model nor its decomposition was trained on, for the head that
attends most to the position before, for the pair of q and k subcomponents that draws it there, and
at what becomes of it without either of them; as controls, without the next largest subcomponent of
the same matrix, and without all others of it. Writes `previous_token.json` and the figures of the
page on attention.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

import vpd_lens
from quickstart_target import N_HELD_OUT, split, standard_library_text, tokenise
from themed import save
from train_example import N_CHARACTERS
from vpd_lens import plots
from vpd_lens.analysis.attention import Attention, DataAttention, Interaction, PatternChange
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.example import example_harvest
from vpd_lens.storage import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n"
N_ROWS = 64
console = Console(width=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", type=Path, default=DOCS / "results" / "attention")
    parser.add_argument("--figures", type=Path, default=DOCS / "assets")
    arguments = parser.parse_args()
    model = vpd_lens.load_example()
    heads = vpd_lens.attention(model, example_harvest(model.vpd))
    rows = held_out(model)[:N_ROWS]
    found = heads.over(rows)
    layer, head = strongest(found, offset=1)
    console.print(found.profiles[layer], found.contributions[layer].relative(), highlight=False)
    pair = pair_of(found, layer, head)
    console.print(f"Head {layer}.{head}, {pair}")
    changes = ablations(heads, found, pair, layer, rows)
    for change in changes.values():
        console.print(change, highlight=False)
    record = recorded(model, heads, found, pair, layer, head, changes)
    write_text(arguments.record / "previous_token.json", json.dumps(record, indent=1) + "\n")
    draw_all(arguments.figures, heads, found, pair, layer, head, changes)


def held_out(model: torch.nn.Module) -> Int[Tensor, "rows 128"]:
    """The end of the standard library's text, which was kept from training."""
    text = standard_library_text(N_CHARACTERS)[-10 * N_HELD_OUT :]
    return split(tokenise(model.tokenizer, text), 128)[1]


def strongest(found: DataAttention, offset: int) -> tuple[int, int]:
    """The layer and head that attend most to a distance."""
    table = torch.stack([found.profiles[layer].attention[:, offset] for layer in found.profiles])
    place, head = divmod(int(table.argmax()), table.shape[1])
    return list(found.profiles)[place], head


def pair_of(found: DataAttention, layer: int, head: int) -> Interaction:
    """The pair of subcomponents, not of biases, that draws a head most to the position before."""
    ranked = found.contributions[layer].relative().top(99, head=head, offset=1)
    return next(p for p in ranked if p.value > 0 and ":" in p.first and ":" in p.second)


def ablations(
    heads: Attention, found: DataAttention, pair: Interaction, layer: int, rows: Tensor
) -> dict[str, PatternChange]:
    """Attention without each of the pair, without both, and without the controls."""
    names = [name for name in found.contributions[layer].rows if ":" in name]
    others = [name for name in names if name != pair.first]
    largest = [name for name, _ in heads.spread(f"blocks.{layer}.attn.q").top(2)]
    control = next(name for name in largest if name != pair.first)
    sets = {
        "q": [pair.first],
        "k": [pair.second],
        "both": [pair.first, pair.second],
        "control": [control],
        "others": others,
    }
    return {label: heads.ablate(names, rows) for label, names in sets.items()}


def recorded(
    model: torch.nn.Module,
    heads: Attention,
    found: DataAttention,
    pair: Interaction,
    layer: int,
    head: int,
    changes: dict[str, PatternChange],
) -> dict[str, Any]:
    """What was found, and with what."""
    static, relative = heads.static(layer), heads.static(layer).relative().standardised()
    names = pair.first, pair.second
    return {
        "layer": layer,
        "head": head,
        "positions": found.n_positions,
        "attention": found.profiles[layer].attention[:, :6].tolist(),
        "pair": names,
        "contribution_over_its_mean": pair.value,
        "static_standardised": static.standardised().of(*names)[head].tolist(),
        "static_relative_standardised_by_head": relative.of(*names)[:, 1].tolist(),
        "largest_static_relative": [p._asdict() for p in relative.top(5, head=head, offset=1)],
        "without": {
            label: {
                "n": len(change.ablated),
                "names": list(change.ablated) if len(change.ablated) < 3 else None,
                "attention_to_previous": change.after[layer].attention[:, 1].tolist(),
            }
            for label, change in changes.items()
        },
        "decomposition": fingerprint(model.vpd),
        "vpd_lens": vpd_lens.__version__,
        "torch": torch.__version__,
        "transformer_lens": importlib.metadata.version("transformer-lens"),
        "date": date.today().isoformat(),
    }


def draw_all(
    folder: Path,
    heads: Attention,
    found: DataAttention,
    pair: Interaction,
    layer: int,
    head: int,
    changes: dict[str, PatternChange],
) -> None:
    """The paper's figures of this mechanism, in light and dark."""
    static, mean = heads.static(layer).standardised(), found.contributions[layer]
    top = [p for p in mean.relative().top(99, head=head, offset=1) if p.value > 0][:5]
    prompt = heads.on(PROMPT)
    patterns = [("with all", prompt.patterns[layer][head])]
    for label in ("q", "k"):
        names = changes[label].ablated
        title = f"without {names[0].split('.attn.')[1]}"
        patterns.append((title, prompt.without(names)[layer][head]))
    strings = [heads.vpd.model.to_string([token]) for token in prompt.tokens.tolist()]
    drawn = {
        "matrix": plots.qk_matrix(heads.static(layer).relative().standardised(), 1),
        "pair": plots.qk_pair(static, pair.first, pair.second),
        "offsets": plots.qk_offsets(mean, top),
        "ablation": plots.attention_ablation([changes[x] for x in ("q", "k", "control")], layer),
        "pattern": plots.attention_patterns(patterns, strings),
        "spread": plots.head_spread(heads.spread(f"blocks.{layer}.attn.q")),
        "overlap": plots.head_overlap(heads.overlap(layer)),
        "together": plots.used_together(found.together[layer]),
    }
    for name, figure in drawn.items():
        save(folder, f"attention_{name}", figure)


if __name__ == "__main__":
    main()
