"""What a saved decomposition is: its record, readable without torch's model or TransformerLens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.storage import Record, kind_of, read


class BaseModelRecord(BaseModel):
    """What identifies a base model, and with what it was decomposed."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    transformer_lens_version: str
    torch_version: str
    model_class: str
    kind: str  # "bridge", "hooked_transformer" or "module"
    model_name: str | None
    dtype: str
    default_prepend_bos: bool | None
    normalization_type: str | None  # which folding of layer norms changes
    compatibility_mode: bool
    weights: dict[str, str]  # SHA-256 of every decomposed weight
    origin: dict[str, str] = Field(default_factory=dict)  # of those whose difference is decomposed


class Origin(BaseModel):
    """Where a base model came from, so that it can be had again."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    # A name on the hub; or a directory, relative to the decomposition's if it begins with a dot.
    source: str
    revision: str | None  # the commit on the hub
    processing: dict[str, bool]  # TransformerLens' options, as its weights show them
    parameters: str  # SHA-256 of all parameters, decomposed or not

    @property
    def is_folder(self) -> bool:
        """Whether `source` is a directory, not a name."""
        return self.source.startswith((".", "/"))


class Indices(BaseModel):
    """Column numbers, from before anything was folded, of a site's subcomponents."""

    kept: list[int]  # those of V, ascending
    folded: list[int]  # those in the delta, in the order of folding


class SubcomponentsRecord(Record):
    """Which subcomponents there are, and of which model."""

    sites: tuple[str, ...]
    n_subcomponents: tuple[int, ...]  # of every site, what V and U have
    original_indices: dict[str, Indices] = Field(default_factory=dict)  # once any are folded
    base_model: BaseModelRecord

    @model_validator(mode="after")
    def _count(self) -> SubcomponentsRecord:
        if len(self.sites) != len(self.n_subcomponents):
            raise ValueError(f"{len(self.sites)} sites, {len(self.n_subcomponents)} sizes")
        for name, size, found in zip(self.sites, self.n_subcomponents, self.indices, strict=True):
            kept, numbers = found.kept, sorted(found.kept + found.folded)
            if kept != sorted(kept) or len(kept) != size or numbers != list(range(len(numbers))):
                raise ValueError(
                    f"original_indices of {name}: {len(kept)} kept and {len(found.folded)} folded "
                    f"column numbers do not count its {size} subcomponents"
                )
        return self

    @property
    def indices(self) -> list[Indices]:
        """`original_indices` of every site in order, whether or not anything was folded."""
        return [
            self.original_indices.get(name, Indices(kept=list(range(size)), folded=[]))
            for name, size in zip(self.sites, self.n_subcomponents, strict=True)
        ]


class DecompositionRecord(SubcomponentsRecord):
    """A decomposition, apart from its tensors."""

    kind: ClassVar[str] = "decomposition"
    origin: Origin | None = None  # of a model that was made in Python, or before this was recorded
    other_origin: Origin | None = None  # of the model from which a difference was decomposed
    importance: CausalImportanceConfig
    divergence: str  # "custom" for a callable
    trained_steps: int
    training: dict[str, Any] | None  # the `VPDConfig` of the last training
    metrics: dict[str, Any] = Field(default_factory=dict)


def decompositions_below(folder: Path) -> Iterator[Path]:
    """The folders of all saved decompositions in a folder, sorted; hidden folders are left out."""
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        written = "record.json" in files or "config.json" in files  # the latter by version 0.1
        if written and kind_of(Path(place)) == DecompositionRecord.kind:
            yield Path(place)


def describe(path: str | Path) -> Group:
    """Sites and sizes, training configuration, base model and metrics, for `rich.print`.

    `path` is the directory that `vpd.save` wrote, or the output of a finished training run.
    """
    artefact = read(path, DecompositionRecord)
    record = artefact.record
    base = record.base_model
    state = f"trained for {record.trained_steps:,} steps" if record.trained_steps else "untrained"
    heading = Text(
        f"{artefact.folder}\nVPD decomposition of {base.model_name or base.model_class}, {state}, "
        f"written by vpd-lens {artefact.vpd_lens_version}\n"
        f"{len(record.sites)} sites, {sum(record.n_subcomponents):,} subcomponents, "
        f"{record.importance.kind} importance function, {record.divergence} divergence\n"
    )
    tables = {"Training": record.training, "Base model": base.model_dump(exclude={"weights"})}
    tables["Base model"] |= record.origin.model_dump() if record.origin else {"source": None}
    if base.origin:
        other = record.other_origin
        tables["Difference from"] = other.model_dump() if other else {"source": None}
    tables["Metrics"] = record.metrics
    shown = (_pairs(title, values) for title, values in tables.items() if values)
    return Group(heading, _sites(record), *shown)


def _sites(record: DecompositionRecord) -> Table:
    table = Table(title="Sites", title_justify="left")
    table.add_column("site")
    table.add_column("subcomponents", justify="right")
    if record.original_indices:
        table.add_column("folded", justify="right")
        table.add_column("original indices")
    for name, original in zip(record.sites, record.indices, strict=True):
        folded = [f"{len(original.folded):,}", _ranges(original.kept)]
        row = folded if record.original_indices else []
        table.add_row(Text(name), f"{len(original.kept):,}", *row)
    return table


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs joined: `0-2, 5, 7-8`."""
    groups = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])  # both grow in a run
    runs = ([number for _, number in group] for _, group in groups)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _pairs(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("name")
    table.add_column("value", overflow="fold")
    for name, value in _flat(values):
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        table.add_row(Text(name), Text(text))  # as Text: [qk] in a pattern is no markup
    return table


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of nested fields."""
    for name, value in values.items():
        nested = isinstance(value, dict)
        yield from _flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]
