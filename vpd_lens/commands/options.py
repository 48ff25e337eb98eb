"""Options that commands share, and how errors are shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vpd_lens.errors import ArtefactError, TrainingInterrupted, VPDError

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N; default: CUDA if there is.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Replace one value of the run file; may be repeated. PATH is a dotted path in the "
        "file (model.source=..., data=..., training.steps=100); one that starts with none of "
        "its keys is a field of `training` (optimiser.lr=1e-3). VALUE is YAML.",
    ),
]

BAD_INPUT, INTERRUPTED = 2, 130


@contextmanager
def readable_errors(debug: bool) -> Iterator[None]:
    """Errors of the library become one line on stderr and an exit code."""
    try:
        yield
    except VPDError as error:
        if debug:
            raise
        text = re.sub(r":\n\s*", ": ", str(error))
        typer.echo(_name() + re.sub(r"\s*\n\s*", "; ", text), err=True)
        code = INTERRUPTED if isinstance(error, TrainingInterrupted) else BAD_INPUT
        raise typer.Exit(code) from None


def _name() -> str:
    """The program, and which process of a job this is."""
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"vpd-lens, process {os.environ.get('RANK')}: " if many else "vpd-lens: "


def quoted(value: object) -> str:
    """`value` as a YAML string, whatever characters are in it."""
    return json.dumps(str(value))


def say(text: str, quiet: bool) -> None:
    """Print a line, unless told to be quiet."""
    if not quiet:
        typer.echo(text)


def decomposition_folder(path: Path) -> Path:
    """`path` itself, or the decomposition in the output of a run."""
    inside = path / "decomposition"
    if not (path / "config.json").exists() and inside.is_dir():
        return inside
    if (path / "checkpoint").is_dir():
        raise ArtefactError(
            f"{path}: this run has a checkpoint but no decomposition yet. Finish it with "
            "vpd-lens train --resume."
        )
    return path
