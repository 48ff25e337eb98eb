"""Edit the example that ships with the library, and compare with low-rank adapters.

    python examples/edits.py     # records and figures of the page on edits

A behaviour is turned into something else: `self` after an opening bracket becomes `name`. The write
vector of one subcomponent is pointed at the new token without data, fitted on examples, and
compared with LoRAs at two weights of the penalty. Comments are to be removed by one scalar.
Everything is measured on text that neither the model nor its decomposition was trained on. What has
been measured is not measured again; figures are drawn from the records.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from jaxtyping import Bool, Int
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import vpd_lens
from quickstart_target import N_HELD_OUT, split, standard_library_text, tokenise
from recorded.record import json_in_rows, versions
from themed import save
from train_example import N_CHARACTERS
from vpd_lens import plots
from vpd_lens.baselines.lora import LoRA
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.editing import find_subcomponents, fit_edit, side_effects, toward
from vpd_lens.editing.effects import AROUND, ELSEWHERE
from vpd_lens.example import example_harvest
from vpd_lens.storage import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
LENGTH = 16  # tokens of a window to fit on; the behaviour is after the last
STEPS, BATCH = 100, 16
SCALE = {"steps": 40, "lr": 0.1}  # of the fit of one scalar
RATES = {"write": 1e-2, "lora": 1e-2}  # of AdamW; ten times the paper's, for a third of its steps
COUNTS, WEIGHTS = {"10": 10}, (0.1, 10.0)  # examples, and the penalty on everything else
STRENGTHS = (2.0, 4.0, 8.0, 16.0)
FACTORS = (-4.0, -2.0, -1.0, 0.0, 2.0)
N_CANDIDATES, N_ROWS = 4, 128
console = Console(width=110)


class Behaviour(NamedTuple):
    """After tokens that end so, `before` is turned into `after`."""

    ends: str
    before: str
    after: str


BEHAVIOURS = {"self": Behaviour("(", "self", "name")}


class Text(NamedTuple):
    """Tokens to fit on, a stream, and held-out rows to measure on."""

    stream: Int[Tensor, " n"]
    held_out: Int[Tensor, "rows pos"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/edits"), help="what is measured")
    parser.add_argument("--record", type=Path, default=DOCS / "results" / "edits")
    parser.add_argument("--figures", type=Path, default=DOCS / "assets")
    parser.add_argument("--draw", action="store_true", help="only draw what is recorded")
    arguments = parser.parse_args()
    if not arguments.draw:
        model = vpd_lens.load_example()
        text = text_of(model, arguments.output)
        for name in BEHAVIOURS:
            record = measured(model, text, name, arguments.output / name)
            write_text(arguments.record / f"{name}.json", json_in_rows(record) + "\n")
        record = removal(model, text, arguments.output / "comments")
        write_text(arguments.record / "comments.json", json_in_rows(record) + "\n")
    for name in BEHAVIOURS:
        record = json.loads((arguments.record / f"{name}.json").read_text())
        save(arguments.figures, f"edits_{name}", plots.edits_pareto(record))
    record = json.loads((arguments.record / "comments.json").read_text())
    save(arguments.figures, "edits_comments", plots.doses(record["doses"]))


def text_of(model: Any, folder: Path) -> Text:
    """What is before the text held out from the example's training, and that text."""
    path = folder / "tokens.safetensors"
    if not path.exists():
        text, n = standard_library_text(N_CHARACTERS), 10 * N_HELD_OUT
        stream = tokenise(model.tokenizer, text[-n - 3_200_000 : -n])
        held_out = split(tokenise(model.tokenizer, text[-n:]), 64)[1]
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"stream": stream, "held_out": held_out.contiguous()}, path)
    return Text(**load_file(path))


def shows(model: Any, behaviour: Behaviour) -> Callable[[Tensor], Bool[Tensor, "batch pos"]]:
    """Where the next token of a text is what will be turned into something else."""
    texts = [model.to_string([token]) for token in range(model.cfg.d_vocab)]
    ends = torch.tensor([text.endswith(behaviour.ends) for text in texts])

    def where(tokens: Tensor) -> Tensor:
        follows = torch.zeros_like(tokens, dtype=torch.bool)
        follows[:, :-1] = ends[tokens[:, :-1]] & (tokens[:, 1:] == texts.index(behaviour.before))
        return follows

    return where


def measured(model: Any, text: Text, name: str, folder: Path) -> dict[str, Any]:
    """All points of one behaviour: an edit without data, fits and adapters."""
    behaviour, harvest = BEHAVIOURS[name], example_harvest(model.vpd)
    where = shows(model, behaviour)
    windows = text.stream.unfold(0, LENGTH + 1, 1)
    windows = windows[where(windows)[:, -2]]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    windows = windows[order, :-1]
    # Those that show it most often come first, so that there are some in every batch.
    held_out = text.held_out[where(text.held_out).sum(1).argsort(descending=True)][:N_ROWS]
    rows = text.stream[: 256 * 64].view(256, 64)

    def point(label: str, series: str, make: Callable[[], Any], **about: Any) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            begun = time.process_time()
            change = make()
            seconds = time.process_time() - begun
            found = side_effects(
                model, change, held_out, behaviour.after, where=where, n_batches=8, progress=False
            )
            target, kl = found.target, found.kl
            console.print(label, target["after"], kl[AROUND], kl[ELSEWHERE], highlight=False)
            figures = {"before": target["before"], "after": target["after"]}
            figures |= {"around": kl[AROUND], "elsewhere": kl[ELSEWHERE]}
            rise = {"rise": found.cost["data"].rise}
            return {"series": series, **about, **figures, **rise, "cpu_seconds": seconds}

        return once(folder / f"{label}.json", measure)

    def fitted(subcomponent: str, n: int, weight: float) -> Any:
        settings = {"weight": weight, "steps": STEPS, "batch_size": BATCH, "lr": RATES["write"]}
        return fit_edit(model, subcomponent, windows[:n], behaviour.after, **settings).edit

    def adapted(sites: list[str] | None, rank: int, n: int, weight: float) -> Any:
        adapter = LoRA(model, sites, rank)
        settings = {"weight": weight, "steps": STEPS, "batch_size": BATCH, "lr": RATES["lora"]}
        adapter.fit(windows[:n], behaviour.after, **settings)
        return adapter.on

    contrast = {"contrast": (rows, rows), "where": where, "sites": r"\.o$|out$", "seq_len": 64}
    candidates = once(
        folder / "candidates.json",
        lambda: [tuple(c) for c in find_subcomponents(model, k=N_CANDIDATES, **contrast)],
    )
    tried = [
        point(f"candidate {c}", "candidate", lambda c=c: fitted(c, 10, 1.0), subcomponent=c)
        for c, _ in candidates
    ]
    best = max(tried, key=lambda p: p["after"][0] - p["elsewhere"][0])["subcomponent"]
    site = best.rpartition(":")[0]
    points = [
        point(
            f"toward {s:g}", "no data", lambda s=s: toward(model, best, behaviour.after, harvest, s)
        )
        for s in STRENGTHS
    ]
    for many, n in COUNTS.items():
        for weight in WEIGHTS:
            about = {"n": n, "weight": weight}
            label = f"{many} {weight:g}"
            points.append(
                point(
                    f"write {label}",
                    f"write vector, {n} examples",
                    lambda n=n, w=weight: fitted(best, n, w),
                    **about,
                )
            )
            for rank, sites in ((1, [site]), (4, None)):
                place = "same matrix" if sites else "everywhere"
                points.append(
                    point(
                        f"lora {rank} {place} {label}",
                        f"LoRA rank {rank}, {place}, {n} examples",
                        lambda r=rank, s=sites, n=n, w=weight: adapted(s, r, n, w),
                        **about,
                    )
                )
    about = {"behaviour": behaviour._asdict(), "subcomponent": best, "n_windows": len(windows)}
    return about | {"candidates": tried, "points": points} | provenance(model)


def removal(model: Any, text: Text, folder: Path) -> dict[str, Any]:
    """Comments, forgotten by the scale of one subcomponent; and what code loses by that."""
    inside = comments(model)
    kinds = {}
    for part, rows in (
        ("fit", text.stream[: len(text.stream) // 64 * 64].view(-1, 64)),
        ("measure", text.held_out),
    ):
        windows = rows.unfold(1, LENGTH, LENGTH).flatten(0, 1)
        at = inside(windows)
        kinds[part] = {"comments": windows[at.all(1)], "code": windows[~at.any(1)]}
    fit, held_out = kinds["fit"], {k: rows[:256] for k, rows in kinds["measure"].items()}
    few, code = fit["comments"][:16], fit["code"][:256]
    everywhere = torch.ones_like(few, dtype=torch.bool)
    contrast = (fit["comments"][:256], code)
    reading = {"batch_size": 64, "n_batches": 4, "seq_len": LENGTH}
    found = once(
        folder / "found.json",
        lambda: [tuple(c) for c in find_subcomponents(model, contrast=contrast, k=3, **reading)],
    )

    def fitted(name: str) -> dict[str, Any]:
        settings = {"what": "scale", "where": everywhere, "retain": code, "batch_size": BATCH}
        fit = fit_edit(model, name, few, **SCALE, **settings)
        return {"factor": fit.edit.factor[0], "loss": fit.losses[-1]}  # type: ignore[index]

    fits = {n: once(folder / f"fit {n}.json", lambda n=n: fitted(n)) for n, _ in found}
    best = min(fits, key=lambda name: fits[name]["loss"])

    def dose(factor: float) -> dict[str, Any]:
        cost = side_effects(
            model, vpd_lens.Rescale(best, factor), held_out, batch_size=64, progress=False
        ).cost
        console.print(factor, cost, highlight=False)
        return {"factor": factor} | {kind: cost[kind].rise for kind in cost}

    factors = sorted({*FACTORS, round(fits[best]["factor"], 3)})
    doses = [once(folder / f"dose {f:g}.json", lambda f=f: dose(f)) for f in factors]
    sizes = {kind: len(rows) for kind, rows in held_out.items()}
    about = {"subcomponent": best, "fits": fits, "doses": doses, "windows": sizes}
    return about | provenance(model)


def comments(model: Any) -> Callable[[Tensor], Bool[Tensor, "batch pos"]]:
    """Which positions are in a comment that began in the same row."""
    texts = [model.to_string([token]) for token in range(model.cfg.d_vocab)]
    begins = torch.tensor([text.lstrip(" ").startswith("#") for text in texts])
    ends = torch.tensor(["\n" in text for text in texts])

    def inside(tokens: Tensor) -> Tensor:
        places = torch.arange(1, tokens.shape[1] + 1).expand(tokens.shape)
        last = [(places * kind[tokens]).cummax(1).values for kind in (begins, ends)]
        return last[0] > last[1]

    return inside


def once(path: Path, measure: Callable[[], Any]) -> Any:
    """What was measured before, or now."""
    path = path.with_name(path.name.replace(":", "."))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(measure()))
    return json.loads(path.read_text())


def provenance(model: Any) -> dict[str, Any]:
    """What was edited, and with which software."""
    settings = {"steps": STEPS, "batch_size": BATCH, "lr": RATES, "length": LENGTH, "scale": SCALE}
    return {
        "settings": settings,
        "decomposition": fingerprint(model.vpd),
        "versions": versions(),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
