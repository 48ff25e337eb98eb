"""What stands in best for a model's MLPs: its decomposition, or transcoders of every kind?

    python examples/comparison.py s --data FOLDER --decomposition FOLDER
    python examples/comparison.py example

Per-layer (PLT) and cross-layer (CLT) transcoders are trained for every objective and `--k`, each
for about `--seconds` of processor time; then they and the decomposition, masked at the MLPs alone,
are measured under three protocols against three accountings of sparsity. Every row is recorded in
`OUTPUT/TARGET/records` and not made twice; the table is printed, the figures are drawn into
`--figures`. A row that others add (`Row`) appears in the table with the rest.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vpd_lens
from recorded.record import Machine, RunRecord, versions
from themed import save
from vpd_lens.analysis.comparison import compare, multiple_match_share
from vpd_lens.baselines.transcoders import (
    PROTOCOLS,
    MaskedMLPs,
    ReplacedReport,
    Transcoded,
    Transcoder,
    TranscoderConfig,
    alive_latents,
    measure_replaced,
    train_transcoder,
)
from vpd_lens.plots.style import PALETTE, canvas, muted
from vpd_lens.storage import write_text

ROOT = Path(__file__).resolve().parents[1]
THRESHOLDS = (0.0, 0.1, 0.5)
ACCOUNTINGS = {
    "per_module": "active per module",
    "per_output": "active per MLP output",
    "parameters": "active parameters",
}
# The processor time of a step, relative to a local one of a per-layer transcoder, was measured.
PLANS = [
    ("per_layer", "local"),
    ("per_layer", "cascading"),
    ("per_layer", "parallel"),
    ("cross_layer", "cascading"),
    ("cross_layer", "parallel"),
    ("per_layer", "single"),
    ("cross_layer", "local"),
]
SHORT = {"per_layer": "PLT", "cross_layer": "CLT"}
console = Console(width=150)


class Row(BaseModel):
    """One line of the table.

    Attributes:
        method: What stands in for the MLPs.
        trained_for: The objective of its training.
        setting: What tells it from the method's other rows.
        report: What was measured.
        thresholded: The same where a threshold selects latents, at each position by itself.
        cpu_seconds: Processor time of the training.
        config: How it was trained, if that is known here.
        extra: Other measures, by name.
        versions: Of vpd_lens, torch, transformer_lens and python.
        machine: Where it was measured.
        date: When, UTC, ISO 8601.
        command: The command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    method: str
    trained_for: str
    setting: str
    report: ReplacedReport
    thresholded: ReplacedReport | None = None
    cpu_seconds: float | None
    config: dict[str, Any] | None = None
    extra: dict[str, float] = {}
    versions: dict[str, str]
    machine: Machine
    date: str
    command: str

    @classmethod
    def now(cls, **fields: Any) -> Row:
        """A row made here and now."""
        return cls(
            **fields,
            versions=versions(),
            machine=Machine.this(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        )


@dataclass(frozen=True)
class Bench:
    """A target with its decomposition, and the data."""

    model: nn.Module
    data: Tensor
    held_out: Tensor
    cpu_seconds: float | None  # of the decomposition's training
    output: Path

    def measured(self, replaced: Any) -> ReplacedReport:
        """A report on the held-out data."""
        return measure_replaced(replaced, self.held_out, batch_size=16, n_batches=4)

    def row(self, name: str, make: Callable[[], Row]) -> Row:
        """A recorded row, or a new one."""
        path = self.output / "records" / f"{name}.json"
        if not path.exists():
            write_text(path, make().model_dump_json(indent=1) + "\n")
        return Row.model_validate_json(path.read_text(encoding="utf-8"))


def bench(arguments: argparse.Namespace) -> Bench:
    """The target that was asked for."""
    if arguments.target == "s":
        from recipes import target_s

        target, _ = target_s(arguments.data, arguments.output)
        model = vpd_lens.load(arguments.decomposition, target.load())
        record = RunRecord.read(ROOT / "docs/results/recipes" / f"{arguments.vpd_record}.json")
        data, held_out, seconds = target.data, target.held_out[:64], record.training_seconds
    else:
        from quickstart_target import split, standard_library_text, tokenise
        from train_example import N_CHARACTERS, SIZE

        model = vpd_lens.load_example()
        text = standard_library_text(N_CHARACTERS)
        data, held_out = split(tokenise(model.tokenizer, text), SIZE.context)
        held_out, seconds = held_out[:64], None
    return Bench(model, data, held_out, seconds, arguments.output / arguments.target)


def decomposition_rows(on: Bench) -> Iterator[Row]:
    """The decomposition with what is above three thresholds."""
    for threshold in THRESHOLDS:

        def make(threshold: float = threshold) -> Row:
            report = on.measured(MaskedMLPs(on.model, threshold))
            return Row.now(
                method="VPD",
                trained_for="VPD",
                setting=f"importance > {threshold:g}",
                report=report,
                cpu_seconds=on.cpu_seconds,
            )

        yield on.row(f"vpd,threshold={threshold:g}", make)


def transcoder_row(on: Bench, config: TranscoderConfig) -> Row:
    """One transcoder, trained if it has not been."""
    name = f"{config.kind},{config.objective},latents={config.n_latents},k={config.k}"
    name = f"{name},seed={config.seed}"

    def make() -> Row:
        console.print(f"{name}: training", highlight=False)
        made = trained(on, name, config)
        return Row.now(
            method=SHORT[config.kind],
            trained_for=config.objective,
            setting=f"k = {config.k}",
            report=on.measured(Transcoded(on.model, made)),
            thresholded=on.measured(Transcoded(on.model, made, "threshold")),
            cpu_seconds=made.record.cpu_seconds,
            config=config.model_dump(mode="json"),
            extra={"tokens": float(made.record.trained_tokens)},
        )

    return on.row(name, make)


def trained(on: Bench, name: str, config: TranscoderConfig) -> Transcoder:
    """A transcoder that is read if it is there, or trained."""
    folder = on.output / "transcoders" / name
    if folder.exists():
        return Transcoder.load(folder)
    made = train_transcoder(on.model, on.data, config)
    made.save(folder)
    return made


def steps_for(on: Bench, config: TranscoderConfig, seconds: float) -> int:
    """How many steps take so much processor time: ten of them are tried."""
    tried = train_transcoder(
        on.model, on.data, config.replaced({"steps": 10}), progress=False
    ).record.cpu_seconds
    return max(20, round(seconds / tried * 10))


def splitting_and_seeds(on: Bench, config: TranscoderConfig, seconds: float) -> Table:
    """What a dictionary of twice the size and another seed have in common with the first."""
    variants = {
        "twice the latents": {"n_latents": 2 * config.n_latents},
        "another seed": {"seed": config.seed + 1},
    }
    models = {}
    for what, changes in {"": {}, **variants}.items():
        changed = config.replaced(changes)
        changed = changed.replaced({"steps": steps_for(on, changed, seconds)})
        name = f"{changed.kind},{changed.objective},latents={changed.n_latents},k={changed.k}"
        made = trained(on, f"{name},seed={changed.seed}", changed)
        models[what] = made.directions(), alive_latents(on.model, made, on.held_out)
    (reference, alive), (larger, more), (other, others) = models.values()
    split = multiple_match_share(reference, larger, (alive, more))
    same = compare(reference, other, (alive, others)).overall
    table = Table("transcoder", "alive", "alive of twice as many", "split", "MMCS", title="Seeds")
    counts = [str(sum(map(len, found.values()))) for found in (alive, more)]
    label = f"{SHORT[config.kind]} {config.objective}"
    table.add_row(label, *counts, f"{split:.1%}", f"{same.u:.3f} (decoders), {same.v:.3f}")
    write_text(
        on.output / "consistency" / f"{config.kind},{config.objective},k={config.k}.json",
        same.model_copy().model_dump_json(indent=1).replace("{", f'{{\n "split": {split},', 1),
    )
    return table


def table_of(rows: Sequence[Row]) -> Table:
    """All rows, differences of cross-entropy from the model's own in nats per token."""
    table = Table("method", "trained for", "setting", *ACCOUNTINGS.values(), *PROTOCOLS)
    table.add_column("worst at its threshold")
    table.add_column("CPU seconds")
    for row in rows:
        report = row.report
        sparsity = (report.per_module, report.per_output, report.parameters)
        losses = [f"{report.difference[protocol]:.3f}" for protocol in PROTOCOLS]
        cut = row.thresholded
        worst = "-" if cut is None else f"{max(cut.difference.values()):.3f}"
        seconds = "-" if row.cpu_seconds is None else f"{row.cpu_seconds:,.0f}"
        cells = [f"{value:,.1f}" for value in sparsity[:2]] + [f"{sparsity[2]:,.0f}"]
        table.add_row(row.method, row.trained_for, row.setting, *cells, *losses, worst, seconds)
    table.title = f"Cross-entropy above the model's, {rows[0].report.baseline:.3f} nats per token"
    return table


def draw(rows: Sequence[Row], folder: Path, target: str) -> None:
    """Three protocols beside each other, three accountings below each other."""
    label = "Loss above the model by sparsity, in three protocols"
    with canvas(label, (10.2, 9.6)) as figure:
        grid = figure.subplots(3, 3, sharey="all", sharex="row")
        series = list(dict.fromkeys((row.method, row.trained_for) for row in rows))
        for line, (field, label) in zip(grid, ACCOUNTINGS.items(), strict=True):
            for axes, protocol in zip(line, PROTOCOLS, strict=True):
                for index, one in enumerate(series):
                    mine = [r for r in rows if (r.method, r.trained_for) == one]
                    points = sorted(
                        (getattr(r.report, field), r.report.difference[protocol]) for r in mine
                    )
                    name = one[0] if one[0] == one[1] else f"{one[0]}, {one[1]}"
                    matched = one[1] == protocol
                    axes.plot(
                        *zip(*points, strict=True),
                        "s-" if one[0] == "VPD" else "o-" if one[0] == "PLT" else "^--",
                        color=PALETTE[index % len(PALETTE)],
                        markersize=8 if matched else 5,
                        linewidth=1.2,
                        label=name,
                    )
                axes.set(xlabel=label)
                axes.grid(axis="both")
        for axes, protocol in zip(grid[0], PROTOCOLS, strict=True):
            axes.set_title(protocol, color=muted())
        for axes in grid.flat:  # once all is drawn, because axes share their limits
            axes.set(xlim=(0, None), ylim=(0, None))
        for line in grid:
            line[0].set_ylabel("nats above the model")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    save(folder, f"comparison_{target}", figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=["s", "example"])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--decomposition", type=Path, help="a trained one, of target s")
    parser.add_argument("--vpd-record", default="s,growing,steps=1000,seed=0")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "assets")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=30, help="processor time of a training")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--only", nargs="*", help="some of the objectives")
    parser.add_argument("--consistency", action="store_true", help="splitting and seeds, too")
    arguments = parser.parse_args()

    on = bench(arguments)
    rows = list(decomposition_rows(on))
    console.print(table_of(rows))
    for k in arguments.k:
        for kind, objective in PLANS:
            if arguments.only and objective not in arguments.only:
                continue
            config = TranscoderConfig(
                kind=kind,
                objective=objective,
                n_latents=arguments.latents,
                k=k,
                batch_size=8,
                lr=arguments.rate,
            )
            name = f"{kind},{objective},latents={config.n_latents},k={k},seed=0"
            if not (on.output / "records" / f"{name}.json").exists():
                steps = steps_for(on, config, arguments.seconds)
                config = config.replaced({"steps": steps})
            rows.append(transcoder_row(on, config))
            draw(rows, arguments.figures, arguments.target)
    console.print(table_of(rows))
    if arguments.consistency:
        for kind, objective in PLANS[:2]:
            config = TranscoderConfig(
                kind=kind,
                objective=objective,
                n_latents=arguments.latents,
                k=arguments.k[0],
                batch_size=8,
                lr=arguments.rate,
            )
            console.print(splitting_and_seeds(on, config, arguments.seconds))


if __name__ == "__main__":
    main()
