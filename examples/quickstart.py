"""Look at a decomposition that is good, then watch one being made.

Everything happens offline: the example ships with the library, and the text to train on is the
source of Python's own standard library.

    python examples/quickstart.py            # about 3 minutes on two idle CPU cores
    python examples/quickstart.py --help

What is done here is what any project does: load, look at the verdict, ask what a prompt needs,
find the circuit of a behaviour, train. `make train-example` made the example.
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

from rich.console import Console
from torch import nn

import vpd_lens
from quickstart_target import standard_library_text, tokenise
from vpd_lens.analysis.attention import head_loadings
from vpd_lens.errors import VPDError
from vpd_lens.example import example_harvest, example_report
from vpd_lens.viz.harvest_page import write

PROMPT, TARGET = "class Queue:\n    def __init__(", "self"
N_NEW = 12  # tokens of a continuation
N_CHARACTERS = 2_000_000  # of text to train on
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int, default=60, help="steps of the training to watch")
    parser.add_argument("--prune-steps", type=int, default=100, help="steps of finding a circuit")
    arguments = parser.parse_args()
    begun, output = time.perf_counter(), arguments.output
    output.mkdir(parents=True, exist_ok=True)

    console.rule("1. A decomposition, and whether to trust it")
    model = vpd_lens.load_example()
    harvest, report = example_harvest(model.vpd), example_report()
    console.print(model.vpd)
    console.print(report)
    report.to_html(output / "report.html", "The example of vpd_lens")
    write(harvest, output / "harvest", "The example of vpd_lens")

    console.rule("2. What does a prompt need?")
    found = vpd_lens.explain(model, PROMPT, TARGET, harvest=harvest)
    console.print(found)
    found.to_html(output / "explained.html")
    continuations(model, PROMPT)

    console.rule("3. The circuit of one behaviour")
    # A short search and short attacks; by default both take four times as long.
    config = vpd_lens.PruneConfig(
        steps=arguments.prune_steps, attack_steps=(4, 20), attack_restarts=1
    )
    graph = vpd_lens.attribute(model, PROMPT, TARGET, prune=config)
    console.print(graph.circuit.table())
    console.print(graph.summary())
    known = {"cards": vpd_lens.Cards(model, harvest), "loadings": head_loadings(model, graph)}
    graph.to_html(output / "circuit.html", **known)

    console.rule("4. Training, of three matrices, for as long as one likes to watch")
    live(vpd_lens.remove(model), output / "live", arguments.steps)
    console.print(
        f"\nDone in {(time.perf_counter() - begun) / 60:.1f} minutes. Pages to open:\n"
        f"  {output / 'report.html'}         what was measured on the example\n"
        f"  {output / 'explained.html'}      what the prompt needs, token by token\n"
        f"  {output / 'circuit.html'}        the circuit of section 3\n"
        f"  {output / 'harvest/index.html'}  what every subcomponent responds to\n\n"
        "What to try next:\n"
        '  model = vpd_lens.load_example(), then model.run_with_cache("def f(self") and names\n'
        "  that contain '.vpd.'; model.vpd.masked(...), vpd_lens.attribute, vpd_lens.evaluate\n"
        '  vpd-lens graph "    def close(" --target self\n'
        "  your own model: vpd_lens.decompose(model, data, vpd_lens.VPDConfig.small())"
    )


def continuations(model: nn.Module, prompt: str) -> None:
    """What the model writes on under different masks."""
    console.print("A prompt and its continuation under different masks (greedy):")
    console.print(repr(prompt), highlight=False, markup=False)
    tokens = model.to_tokens(prompt)
    for mode in ("target", "rounded", "stochastic", "adversarial"):
        with model.vpd.masked(mode, seed=0):
            out = model.generate(
                tokens, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False
            )
        text = repr(model.to_string(out[0, tokens.shape[1] :]))
        console.print(f"  {mode:12s} {text}", highlight=False, markup=False)


def live(model: nn.Module, folder: Path, steps: int) -> None:
    """Decompose one MLP of the example's model anew."""
    tokens = tokenise(model.tokenizer, standard_library_text(N_CHARACTERS))
    config = vpd_lens.VPDConfig.small(
        steps=steps, sites=r"blocks\.1\.mlp", batch_size=8, log_every=max(1, steps // 10)
    )
    resume = (folder / "checkpoint").exists()
    vpd_lens.decompose(model, tokens[:-8192], config, output=folder, resume=resume)
    rows = tokens[-8192:].view(-1, 128)
    report = vpd_lens.evaluate(model, rows[:16], pgd_steps=(20,), pgd_restarts=1)
    console.print(report.verdict())
    console.print("A minute of training makes no good decomposition; the example took hours.")


if __name__ == "__main__":
    try:
        main()
    except VPDError as error:
        sys.exit(f"quickstart: {error}")
