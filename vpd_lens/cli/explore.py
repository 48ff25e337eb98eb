"""`vpd-lens explore`: one local page server over a model with a decomposition and its harvest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from vpd_lens.cli import options
from vpd_lens.cli.analyse import with_examples
from vpd_lens.cli.options import readable_errors

# Of the example's kind, Python.
TEXTS = ("class Queue:\n    def __init__(", "for i in", "import os\nimport sys\n\ndef main(")


def explore_command(
    decomposition: Annotated[
        Path | None,
        Argument(
            metavar="[DECOMPOSITION]",
            help="A saved decomposition, a run, or user/name on the hub; default: the example.",
        ),
    ] = None,
    model: options.Model = None,
    harvest: options.Responses = None,
    data: Annotated[
        str | None,
        Option(help="Text or tokens that a harvest can be gathered from: as in harvest."),
    ] = None,
    output: Annotated[
        Path | None, Option(help="Where pages save graphs; default: explored/ and a name.")
    ] = None,
    host: Annotated[str, Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any that is free.")] = 0,
    open_browser: Annotated[bool, Option("--open", help="Open the page in a browser.")] = False,
    model_class: options.ModelClassName = "auto",
    processing: options.ProcessingName = "default",
    device: options.Device = None,
    debug: options.Debug = False,
) -> None:
    """Explore a decomposition in the browser: importances, cards, graphs, interventions.

    Prints the address of a page on this machine, and serves it until Ctrl-C. Labels are saved
    beside the decomposition, or, of one that is not here, in the output directory.
    """
    with readable_errors(debug):
        place = harvest or _beside(decomposition)
        loaded, examples = with_examples(
            decomposition, model, model_class, device, processing, place
        )
        from vpd_lens.explorer import explore

        name = _name(decomposition)
        explore(
            loaded,
            examples,
            data=data,
            folder=output or Path("explored") / name,
            labels=decomposition if decomposition and decomposition.is_dir() else None,
            title=name,
            texts=() if decomposition else TEXTS,
            host=host,
            port=port,
            open_browser=open_browser,
        )


def _name(decomposition: Path | None) -> str:
    """What to call it: after its run, if it has one."""
    if decomposition is None:
        return "example"
    path = decomposition.absolute()
    return path.parent.name if path.name == "decomposition" else path.name


def _beside(decomposition: Path | None) -> Path | None:
    """The harvest of a run, where `vpd-lens train` proposes to put it."""
    if decomposition is None:
        return None
    places = (decomposition / "harvest" / "harvest", decomposition.parent / "harvest" / "harvest")
    return next((place for place in places if place.is_dir()), None)
