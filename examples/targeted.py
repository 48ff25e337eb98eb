"""Decompose one behaviour of a model, and ask whether the model needs what was found.

    python examples/targeted.py                    # addition, in a model that also copies
    python examples/targeted.py --behaviour self   # or brackets: in the example that ships
    python examples/targeted.py --model NAME --data inside.npy --elsewhere outside.npy
    python examples/targeted.py --help

Without either, a transformer is trained on two tasks first. Writes the decomposition and
`figures.json` (configuration, versions and date included) to the output directory; run again, it
goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from jaxtyping import Float, Int
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import vpd_lens
from quickstart_target import standard_library_text, tokenise
from recorded.record import json_in_rows, versions
from toy_runs.weights import save_weights
from vpd_lens.config.base import parse_yaml
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.storage import write_text
from vpd_lens.toys.modular_addition import last_position_kl
from vpd_lens.toys.two_tasks import TwoTasks
from vpd_lens.training import VPDConfig

console = Console()
# The toy's matrices have 32 dimensions at most: as many subcomponents, so that nothing is missing.
# Both tasks read the same numbers; less weight elsewhere leaves them some subcomponents in common.
TOY = {
    "n_subcomponents": 32,
    "batch_size": 49,
    "importance.hidden": (128,),
    "adversary.scope": "sequence",
    "adversary.inner_steps": 1,
    "elsewhere.coefficient": 3.0,
    "elsewhere.minimality": 30.0,
}
# A behaviour of the example's model is seen after the last token of a window. The upper blocks are
# half of the work; the start is large singular components, far from which all has to move.
EXAMPLE = {
    "sites": r"blocks\.[23]\.",
    "n_subcomponents": 32,
    "positions": "last",
    "importance.hidden": (128,),
    "adversary.scope": "sequence",
    "adversary.inner_steps": 1,
    "optimiser.lr": 1e-2,
    "optimiser.importance_lr": 3e-3,
    "minimality.coefficient": 1e-2,
    "elsewhere.coefficient": 3.0,
    "elsewhere.minimality": 10.0,
}
# What it predicts, by how a token begins.
BEHAVIOURS = {"self": ("self",), "brackets": (")", "]", "}")}
LENGTH, N_MEASURED = 16, 128  # tokens of a window, and windows kept apart to measure on
N_PRUNED = 16  # of those, which the decomposition of the whole model is pruned to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/targeted"))
    parser.add_argument(
        "--model", help="a directory, or a name TransformerLens knows; default: toy"
    )
    parser.add_argument("--behaviour", choices=BEHAVIOURS, help="of the example's model")
    parser.add_argument("--data", help="tokens or text that show the behaviour; with --model")
    parser.add_argument("--elsewhere", help="tokens or text of everything else; with --model")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument(
        "--whole", action="store_true", help="compare with the example's own decomposition"
    )
    parser.add_argument("--each", action="store_true", help="ablate every subcomponent singly, too")
    arguments = parser.parse_args()
    changes = {k: parse_yaml(v, k) for k, _, v in (s.partition("=") for s in arguments.set)}
    config = VPDConfig.targeted(steps=arguments.steps, seed=arguments.seed)
    config = config.replaced({"log_every": max(1, arguments.steps // 20)})

    task, divergence = None, last_position_kl
    if arguments.behaviour is not None:
        model, divergence = vpd_lens.remove(vpd_lens.load_example()), None
        config = config.replaced({**EXAMPLE, **changes})
        both = windows(model, BEHAVIOURS[arguments.behaviour])
        streams = [rows[:-N_MEASURED] for rows in both]
        measured = [rows[-N_MEASURED:] for rows in both]
    elif arguments.model is None:
        task = TwoTasks()
        model = toy(task, arguments.output / "target.safetensors")
        config = config.replaced({**TOY, **changes})
        streams = task.data("add"), task.data("copy")
        measured = task.rows("add"), task.rows("copy")
    else:
        from vpd_lens.models import load_model

        if arguments.data is None or arguments.elsewhere is None:
            parser.error("--model needs --data and --elsewhere")
        model = load_model(arguments.model)
        config = config.replaced(changes)
        streams = measured = arguments.data, arguments.elsewhere
        divergence = None

    run, begun = arguments.output / "vpd", time.process_time()
    vpd_lens.decompose(
        model,
        streams[0],
        config,
        elsewhere=streams[1],
        divergence=divergence,
        output=run,
        resume=(run / "checkpoint").exists(),
    )
    seconds = time.process_time() - begun
    sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    found = vpd_lens.redundancy(model, *measured, each=arguments.each, **sizes)
    console.print(found.table())
    figures = about(model, config) | {"cpu_seconds": seconds} | asdict(found)
    if arguments.whole:
        figures["whole"] = from_the_whole(*measured)
    if task is not None:
        figures["accuracy"] = accuracies(task, model, found)
        console.print(figures["accuracy"])
    write_text(arguments.output / "figures.json", json_in_rows(figures) + "\n")
    console.print(f"Figures: {arguments.output / 'figures.json'}")


def toy(task: TwoTasks, path: Path) -> torch.nn.Module:
    """The transformer with two tasks, trained unless its weights are there."""
    if not path.exists():
        save_weights(task.train_target(), path)
    model = task.transformer()
    model.load_state_dict(load_file(path), strict=False)
    return model.eval()


@torch.no_grad()
def windows(
    model: torch.nn.Module, begins: tuple[str, ...], n_shows: int = 2600, n_others: int = 1600
) -> list[Int[Tensor, "rows length"]]:
    """Windows of text after which a token that begins so follows, as predicted; and others.

    In those, no position predicts one. So many of either are looked at.
    """
    tokens = tokenise(model.tokenizer, standard_library_text(2_000_000))
    ids = range(model.cfg.d_vocab)
    wanted = torch.tensor([model.to_string([i]).startswith(begins) for i in ids])
    rows = tokens.unfold(0, LENGTH + 1, 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(places: Int[Tensor, " n_places"], n: int) -> Int[Tensor, "n length_and_next"]:
        return rows[places[torch.randperm(len(places), generator=generator)[:n]]]

    def predicted(rows: Int[Tensor, "rows length"]) -> Float[Tensor, "rows length"]:
        logits = [model(part) for part in rows.split(64)]
        return torch.cat([x.softmax(-1)[..., wanted].sum(-1) for x in logits])

    # No two are the same, so that none is both trained and measured on.
    shows = torch.unique(drawn(wanted[rows[:, -1]].nonzero().flatten(), n_shows), dim=0)
    shows = shows[torch.randperm(len(shows), generator=generator)][:, :-1]
    others = drawn(torch.arange(len(rows)), n_others)[:, :-1]
    return [shows[predicted(shows)[:, -1] > 0.5], others[(predicted(others) < 0.5).all(-1)]]


def from_the_whole(
    inside: Int[Tensor, "rows length"], outside: Int[Tensor, "rows length"]
) -> dict[str, Any]:
    """The same of the decomposition that ships, pruned to what some windows need."""
    model: Any = vpd_lens.load_example()
    settings = {"method": "stochastic", "objective": "kl", "steps": 200}
    attacks = {"attack_steps": (4,), "attack_restarts": 1}
    config = vpd_lens.PruneConfig(**settings, **attacks)
    begun = time.process_time()
    circuit = vpd_lens.prune(model, inside[:N_PRUNED].tolist(), config=config)
    seconds = time.process_time() - begun
    needed = (circuit.importance > 0).any(1)
    names = [f"{n}:{i}" for n in model.vpd.layout.names for i in model.vpd.original_indices(n)]
    union = [names[i] for i in needed.any(0).nonzero().flatten().tolist()]
    of_one = [names[i] for i in needed[0].nonzero().flatten().tolist()]
    sizes = {"batch_size": 16, "seq_len": LENGTH, "positions": "last"}
    found = vpd_lens.redundancy(model, inside, outside, important=union, **sizes)
    single = vpd_lens.redundancy(model, inside[:1], outside, important=of_one, **sizes)
    console.print(found.table())
    return {
        "config": config.model_dump(mode="json"),
        "cpu_seconds": seconds,
        "n_windows": len(needed),
        "subcomponents_of_a_window": float(needed.sum(-1).float().mean()),
        "union": asdict(found),
        "first": asdict(single),
    }


def accuracies(
    task: TwoTasks, model: torch.nn.Module, found: vpd_lens.Redundancy
) -> dict[str, dict[str, float]]:
    """Of both tasks: with everything, without what was found, and with that alone."""
    vpd: Any = model.vpd
    important = torch.zeros(vpd.layout.total)
    names = [f"{name}:{i}" for name in vpd.layout.names for i in vpd.original_indices(name)]
    important[[names.index(name) for name in found.important]] = 1
    states = {"everything": (torch.ones_like(important), 1.0), "ablated": (1 - important, 1.0)}
    states["alone"] = important, 0.0
    result = {}
    for state, (mask, delta) in states.items():
        with vpd.masked(mask, delta=delta):
            result[state] = {t: round(task.accuracy(model, t), 4) for t in ("add", "copy")}
    return result


def about(model: torch.nn.Module, config: VPDConfig) -> dict[str, Any]:
    """What was decomposed and how, for `figures.json`."""
    return {
        "config": config.model_dump(mode="json"),
        "decomposition": fingerprint(model.vpd),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
