"""Options that commands share, how errors are shown, and what a command loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import rich
import typer
from typer import Argument, Option

from vpd_lens.errors import ArtefactError, ConfigError, TrainingInterrupted, VPDError

RunFilePath = Annotated[Path, Argument(metavar="RUN.YAML", help="The run file.")]
Decomposed = Annotated[
    Path,
    Argument(
        metavar="DECOMPOSITION", help="A saved decomposition, a run, or user/name on the hub."
    ),
]
DecomposedOrExample = Annotated[
    Path | None,
    Option(help="A saved decomposition, a run, or user/name on the hub; default: the example."),
]
Responses = Annotated[
    Path | None, Option(help="What `vpd-lens harvest` wrote: what subcomponents respond to.")
]
Model = Annotated[
    str | None,
    Option(
        metavar="SOURCE",
        help="Its base model: a directory, or a name; default: as the decomposition says.",
    ),
]
Base = Annotated[
    str | None,
    Option(
        metavar="SOURCE",
        help="The other model of a decomposed difference; default: as the decomposition says.",
    ),
]
ModelClassName = Annotated[str, Option(help="auto, hooked_transformer or bridge.")]
ProcessingName = Annotated[str, Option(help="default, none or full.")]
BatchSize = Annotated[int, Option(min=1, help="Sequences per batch.")]
SeqLen = Annotated[
    int | None, Option(min=1, help="Tokens per sequence; default: the model's context.")
]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:N; default: CUDA if there is.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
Overrides = Annotated[
    list[str] | None,
    Option(
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
    """Errors of the library become a message on stderr and an exit code."""
    try:
        yield
    except VPDError as error:
        if debug:
            raise
        text, interrupted = str(error), isinstance(error, TrainingInterrupted)
        if not interrupted:  # which names both
            text = text.replace("resume=True", "--resume")
        many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        process = f", process {os.environ.get('RANK')}" if many else ""
        typer.echo(f"vpd-lens{process}: {text}", err=True)
        raise typer.Exit(INTERRUPTED if interrupted else BAD_INPUT) from None


def quoted(value: object) -> str:
    """`value` as a YAML string, whatever characters are in it."""
    return json.dumps(str(value))


def say(what: Any, quiet: bool) -> None:
    """Print a line, or tables of rich, unless told to be quiet."""
    if not quiet:
        show = typer.echo if isinstance(what, str) else rich.print
        show(what)


def require_folder(path: Path) -> None:
    """Say that a directory is missing before torch is imported.

    What may be a repository on the hub passes.
    """
    if path.is_dir() or path.with_name(f".{path.name}.old").is_dir():
        return
    if len(path.parts) != 2 or path.is_absolute() or path.parts[0].startswith((".", "~")):
        raise ArtefactError(f"{path}: there is no such directory. Check the path.")


def load_decomposed(
    decomposition: Path,
    model: str | None,
    model_class: str,
    device: str | None,
    processing: str,
    base: str | None = None,
) -> Any:
    """A base model with a saved decomposition; what is missing is said before torch is imported."""
    require_folder(decomposition)
    from vpd_lens.loading import load
    from vpd_lens.models import load_model

    device = device or "auto"
    sources: dict[str, Any] = {"model": model, "base": base}
    if (model_class, processing) != ("auto", "default"):
        if model is None:
            raise ConfigError(
                "--model-class and --processing say how to load --model; without it the "
                "decomposition's record does. Give --model too, or leave them out."
            )
        how: Any = model_class, device, processing
        sources = {name: source and load_model(source, *how) for name, source in sources.items()}
    return load(decomposition, device=device, **sources)
