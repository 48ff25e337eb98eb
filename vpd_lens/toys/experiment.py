"""Train a toy, decompose it, compare with the truth: one seed after the other, each recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vpd_lens.errors import ArtefactError, ConfigError
from vpd_lens.experiments.record import versions
from vpd_lens.files import json_in_rows, write_text_atomically
from vpd_lens.toys.measure import SiteFigures, measure
from vpd_lens.toys.presets import METHODS, preset
from vpd_lens.toys.targets import TOYS
from vpd_lens.training import VPDConfig, train


class ToyRecord(BaseModel):
    """One seed of one toy under one method, as written to `seed-N.json`.

    Attributes:
        toy: Name of the toy.
        method: `"vpd"` or `"spd"`.
        seed: Seed of target and decomposition.
        config: How it was decomposed.
        versions: Of vpd_lens, torch, transformer_lens and python.
        date: When the run ended, UTC.
        target_seconds: Training the target.
        seconds: Decomposing it.
        represented: The features that the target represents.
        sites: Figures by site.
    """

    toy: str
    method: str
    seed: int
    config: VPDConfig
    versions: dict[str, str]
    date: str
    target_seconds: float
    seconds: float
    represented: list[int]
    sites: dict[str, SiteFigures]


def run_seed(name: str, method: str, seed: int, folder: str | Path) -> ToyRecord:
    """Train the target of a toy and decompose it, or read the record of a finished run.

    Args:
        name: One of `TOYS`.
        method: One of `METHODS`.
        seed: Seed of everything.
        folder: Receives `seed-N.json`, and `seed-N/` with metrics and decomposition. A run that
            was interrupted goes on from its checkpoint.

    Raises:
        ConfigError: If there is no such toy or method, or the folder holds a run of another.
        ArtefactError: If the record of a finished run cannot be read.
        TrainingInterrupted: After Ctrl-C, once a checkpoint is written.
    """
    config = preset(name, method).replaced({"seed": seed})
    record = Path(folder) / f"seed-{seed}.json"
    if record.exists():
        return _reused(record, config, name)
    toy, run = TOYS[name], Path(folder) / f"seed-{seed}"
    begun = time.perf_counter()
    model = toy.train_target(seed)
    target_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    train(
        model,
        replace(toy.data, nonzero=True),
        config,
        output=run,
        resume=(run / "checkpoint").is_dir(),
        progress=False,
        example=torch.eye(toy.data.n_features),
    )
    seconds = time.perf_counter() - begun
    represented, sites = measure(toy, model.__dict__["vpd"])
    result = ToyRecord(
        toy=name,
        method=method,
        seed=seed,
        config=config,
        versions=versions(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        target_seconds=round(target_seconds, 1),
        seconds=round(seconds, 1),
        represented=represented,
        sites=sites,
    )
    write_text_atomically(record, json_in_rows(result.model_dump(mode="json")) + "\n")
    return result


def run_seeds(name: str, method: str, n_seeds: int, folder: str | Path) -> Iterator[ToyRecord]:
    """`run_seed` for the seeds `0 .. n_seeds - 1`, each record as soon as it is there.

    Args:
        name: One of `TOYS`.
        method: One of `METHODS`.
        n_seeds: Number of seeds.
        folder: As for `run_seed`.
    """
    for seed in range(n_seeds):
        yield run_seed(name, method, seed, folder)


def _reused(path: Path, config: VPDConfig, name: str) -> ToyRecord:
    try:
        record = ToyRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: not a readable toy record ({error}); delete it.") from None
    if record.toy != name or record.config != config:
        raise ConfigError(
            f"{path} is the record of another run ({record.toy}, {record.method}, or an older "
            "preset). Pass another --output, or delete it."
        )
    return record


def table(records: list[ToyRecord]) -> Table:
    """The figures of some seeds as a rich table: one row per seed and site.

    Columns: represented features of all, subcomponents alive of those expected, MMCS of vectors
    and of whole matrices, L2 ratio, CI errors at tolerances 0.1 and 0.2, seconds of the
    decomposition.

    Args:
        records: At least one record, all of one toy and method.
    """
    first = records[0]
    out = Table(
        title=f"{first.toy}, {first.method}: {METHODS[first.method]}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    figures = ("alive", "MMCS", "mat.", "L2", "err .1", "err .2")
    for heading in ("seed", "feat.", "site", *figures, "s"):
        out.add_column(heading, justify="left" if heading == "site" else "right", no_wrap=True)
    for record in records:
        n = TOYS[record.toy].data.n_features
        head = [str(record.seed), f"{len(record.represented)}/{n}"]
        for index, (name, site) in enumerate(record.sites.items()):
            out.add_row(
                *(head if index == 0 else ["", ""]),
                name,
                f"{site.alive}/{site.expected}",
                "" if site.mmcs is None else f"{site.mmcs:.4f}",
                "" if site.matrix_mmcs is None else f"{site.matrix_mmcs:.4f}",
                "" if site.l2_ratio is None else f"{site.l2_ratio:.3f}",
                str(site.error_01),
                str(site.error_02),
                f"{record.seconds:.0f}" if index == 0 else "",
                end_section=index == len(record.sites) - 1,
            )
    return out
