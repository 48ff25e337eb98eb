"""The card of a saved decomposition: `README.md`, as the Hugging Face hub shows it.

It begins with what the hub sorts by, says how to open the decomposition, and with an evaluation
report its verdict, tables and plots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from vpd_lens.description import DecompositionRecord
from vpd_lens.errors import InputError

if TYPE_CHECKING:
    from vpd_lens.evaluation.report import EvalReport

REPORT = "report.json"
TAGS = ["vpd_lens", "mechanistic-interpretability", "parameter-decomposition", "transformer-lens"]


def write_card(
    folder: Path,
    record: DecompositionRecord,
    report: EvalReport | None = None,
    repository: str | None = None,
    licence: str | None = None,
) -> Path:
    """Write `README.md` into a decomposition's folder, and a report and its plots beside it.

    Args:
        folder: The folder; a card in it is replaced.
        record: What the decomposition is.
        report: What was measured on it.
        repository: Its name on the hub, by which others open it; `None`: the folder.
        licence: Of the subcomponents, by the hub's name for it, such as `"mit"`; `None`: not said.

    Raises:
        InputError: If the report is of another decomposition.
    """
    pictures: Mapping[str, str] = {}
    if report is not None:
        measured, n_sites = report.trained_steps, len(report.n_subcomponents)
        if (tuple(report.n_subcomponents), measured) != (record.sites, record.trained_steps):
            raise InputError(
                f"report: it is of {n_sites} sites after {measured} steps, the decomposition of "
                f"{len(record.sites)} after {record.trained_steps}. Evaluate this one: "
                "vpd_lens.evaluate(model, ...)."
            )
        pictures = report.to_png(folder)
        report.to_json(folder / REPORT)
    parts = _parts(record, report, pictures, repository)
    path = folder / "README.md"
    path.write_text(
        _front_matter(record, report, licence) + "\n\n".join(parts) + "\n", encoding="utf-8"
    )
    return path


def _front_matter(
    record: DecompositionRecord, report: EvalReport | None, licence: str | None
) -> str:
    from huggingface_hub import ModelCardData

    origin = record.origin
    data = ModelCardData(
        library_name="vpd_lens",
        tags=TAGS,
        base_model=origin.source if origin is not None and not origin.is_folder else None,
        license=licence,
        verdict=None if report is None else report.verdict().split(". ")[0],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _parts(
    record: DecompositionRecord,
    report: EvalReport | None,
    pictures: Mapping[str, str],
    repository: str | None,
) -> Iterator[str]:
    base, origin = record.base_model, record.origin
    name = base.model_name or base.model_class
    yield f"# VPD decomposition of {name}"
    yield (
        f"{len(record.sites)} weight matrices of a {base.model_class} as "
        f"{sum(record.n_subcomponents):,} rank-1 subcomponents, found by adversarial Parameter "
        f"Decomposition in {record.trained_steps:,} training steps."
    )
    yield "## How to open it"
    where = repository or "path/to/this/folder"
    arguments = f'"{where}"' if origin is not None else f'"{where}", base_model'
    arguments += ", base=other_model" if base.origin and record.other_origin is None else ""
    yield (
        f"```python\nimport vpd_lens\n\nmodel = vpd_lens.load({arguments})\n"
        'with model.vpd.masked("rounded"):\n    model.generate("...")\n```'
    )
    yield _origin_in_words(record)
    if base.origin:
        other = record.other_origin
        where = f"loaded from `{other.source}`" if other else "which has to be at hand"
        yield f"What is decomposed is the difference of its weights from another model's, {where}."
    if report is not None:
        yield f"## What it is worth\n\n{markdown(report.tables())}"
        yield from (f"![{label}]({file})" for file, label in pictures.items())
    else:
        rows = zip(record.sites, record.n_subcomponents, strict=True)
        lines = [f"| `{site}` | {size} |" for site, size in rows]
        yield "\n".join(["| site | subcomponents |", "|---|---|", *lines])
    yield (
        f"Written by vpd_lens {version('vpd-lens')}; trained with TransformerLens "
        f"{base.transformer_lens_version} and PyTorch {base.torch_version}."
    )


def _origin_in_words(record: DecompositionRecord) -> str:
    base, origin = record.base_model, record.origin
    what = f"The base model is a {base.model_class} in {base.dtype}"
    if origin is None:
        return f"{what}, and has to be at hand: the record does not say where it came from."
    commit = f" at commit `{origin.revision}`" if origin.revision else ""
    done = [name for name, on in origin.processing.items() if on]
    how = f", processed by TransformerLens ({', '.join(done)})" if done else ", not processed"
    return f"{what}, loaded from `{origin.source}`{commit}{how}. Its weights are checked."


def markdown(group: Group) -> str:
    """Text and tables of rich as Markdown."""
    parts = []
    for part in group.renderables:
        if isinstance(part, Table):
            rows = zip(*(column.cells for column in part.columns), strict=True)
            lines = [[column.header or " " for column in part.columns], *rows]
            cells = [[str(cell).replace("|", r"\|") for cell in line] for line in lines]
            cells.insert(1, ["---"] * len(part.columns))
            table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
            parts.append(f"### {part.title}\n\n{table}")
        elif part:
            parts.append(str(part))
    return "\n\n".join(parts)
