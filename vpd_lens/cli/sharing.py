"""`vpd-lens list` and `push`: which decompositions there are, and how others get one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from vpd_lens.cli import options
from vpd_lens.cli.options import readable_errors, require_folder, say
from vpd_lens.errors import ArtefactError


def list_command(
    folders: Annotated[
        list[Path] | None, Argument(metavar="[FOLDER...]", help="Where to look; default: here.")
    ] = None,
    hub: Annotated[
        str | None, Option(metavar="QUERY", help="List those on the hub that a search finds.")
    ] = None,
    author: Annotated[str | None, Option(help="List those of a user on the hub.")] = None,
    debug: options.Debug = False,
) -> None:
    """List saved decompositions below some folders, or those on the Hugging Face hub.

    `--hub ""` lists all that are there.
    """
    with readable_errors(debug):
        if hub is not None or author is not None:
            say(_on_the_hub(hub, author), quiet=False)
            return
        places = folders or [Path()]
        for folder in places:
            if not folder.is_dir():
                raise ArtefactError(f"{folder}: there is no such directory. Check the path.")
        say(_here(places), quiet=False)


def push_command(
    decomposition: options.Decomposed,
    repository: Annotated[str, Argument(metavar="USER/NAME", help="Where to, on the hub.")],
    report: Annotated[
        Path | None, Option(help="JSON of an evaluation, for the card; default: the run's.")
    ] = None,
    harvest: Annotated[
        Path | None, Option(help="What `vpd-lens harvest` wrote. It quotes the texts.")
    ] = None,
    include_model: Annotated[
        bool, Option("--include-model", help="Also the base model, if it came from a directory.")
    ] = False,
    licence: Annotated[str | None, Option(help="By the hub's name for it, such as mit.")] = None,
    private: Annotated[
        bool, Option("--private", help="Make the repository a private one.")
    ] = False,
    revision: Annotated[str | None, Option(help="A branch; default: the main one.")] = None,
    message: Annotated[str, Option(help="What to call the commit.")] = "Upload with vpd-lens",
    debug: options.Debug = False,
) -> None:
    """Publish a saved decomposition on the Hugging Face hub, with a card.

    Log in first: `hf auth login`, with a token that has the right to write.
    """
    with readable_errors(debug):
        require_folder(decomposition)
        from vpd_lens.analysis.harvest import Harvest
        from vpd_lens.evaluation import EvalReport
        from vpd_lens.interop.hub import push
        from vpd_lens.model_card import REPORT

        if report is None and (decomposition / REPORT).is_file():
            report = decomposition / REPORT
        address = push(
            decomposition,
            repository,
            report=None if report is None else EvalReport.from_json(report),
            harvest=None if harvest is None else Harvest.load(harvest),
            include_model=include_model,
            licence=licence,
            private=private or None,
            revision=revision,
            commit_message=message,
        )
        say(f'{address}\nOpen it: vpd_lens.load("{repository}")', quiet=False)


def _here(places: list[Path]) -> Table:
    from vpd_lens.description import DecompositionRecord, decompositions_below
    from vpd_lens.evaluation import EvalReport
    from vpd_lens.model_card import REPORT
    from vpd_lens.storage import read

    table = _table("folder", "model", "class", "sites", "subcomponents", "steps", "verdict")
    for folder in (found for place in places for found in decompositions_below(place)):
        try:
            record = read(folder, DecompositionRecord).record
            base = record.base_model
            model = Path(base.model_name).name if base.model_name else ""
            sizes = len(record.sites), sum(record.n_subcomponents), record.trained_steps
            row = [model, base.model_class, *(f"{size:,}" for size in sizes)]
            report = (folder.parent if folder.name == "decomposition" else folder) / REPORT
            if report.is_file():
                row.append(EvalReport.from_json(report).verdict().split(". ")[0])
        except ArtefactError as error:
            row = [f"damaged: {error}"]
        _add(table, str(folder), *row)
    return table


def _on_the_hub(search: str | None, author: str | None) -> Table:
    from vpd_lens.interop.hub import published

    table = _table("repository", "model", "verdict", "downloads", "changed")
    for found in published(search or None, author):
        card = found.card_data or {}
        changed = f"{found.last_modified:%Y-%m-%d}" if found.last_modified else ""
        base, verdict = card.get("base_model") or "", card.get("verdict") or ""
        _add(table, found.id, base, verdict, f"{found.downloads or 0:,}", changed)
    return table


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        right = column in ("sites", "subcomponents", "steps", "downloads")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _add(table: Table, *cells: object) -> None:
    table.add_row(*(Text(str(cell)) for cell in cells))
