"""`vpd-lens graph`: the attribution graph of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vpd_lens.cli.options import (
    QUICKSTART,
    Debug,
    Device,
    Model,
    ModelClassName,
    ProcessingName,
    Quiet,
    load_decomposed,
    readable_errors,
    say,
    show,
)
from vpd_lens.errors import InputError


def graph_command(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    decomposition: Annotated[Path, typer.Option(help="A saved decomposition, or a run.")] = (
        QUICKSTART / "vpd"
    ),
    model: Model = str(QUICKSTART / "target"),
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN", help="Token to explain; may be repeated. Default: the likeliest."
        ),
    ] = None,
    position: Annotated[int, typer.Option(help="After which token of the prompt.")] = -1,
    prune: Annotated[
        str | None,
        typer.Option(help="adversarial, stochastic or ci: keep what the one target needs."),
    ] = None,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="Hold norms, patterns and gains: edges add up.")
    ] = False,
    keep: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Keep nodes that hold this share of influence."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to explore.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write a directory to load again.")] = None,
    harvest: Annotated[
        Path | None, typer.Option(help="What `vpd-lens harvest` wrote; examples for the page.")
    ] = None,
    model_class: ModelClassName = "auto",
    processing: ProcessingName = "default",
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    r"""Trace which subcomponents make a model predict a token.

    In PROMPT and TOKEN, \n and \t stand for a newline and a tab.
    """
    with readable_errors(debug):
        if keep == 0:
            raise InputError("--keep 0 keeps nothing; give a share above 0.")
        loaded = load_decomposed(decomposition, model, model_class, device, processing)

        from vpd_lens.analysis.circuits import Token, TopTokens, attribute
        from vpd_lens.analysis.harvest import Harvest

        examples = None if harvest is None else Harvest.load(harvest, loaded.vpd)
        targets: Any = [Token(_unescaped(text), position) for text in target or []]
        if not targets and prune is None:
            targets = [TopTokens(position=position)]
        graph = attribute(
            loaded,
            _unescaped(prompt),
            targets or None,
            prune=prune,
            frozen=frozen,
            progress=not quiet,
        )
        if keep is not None:
            graph = graph.pruned(keep)
        if graph.circuit is not None:
            show(graph.circuit.table(), quiet)
        show(graph.summary(), quiet)
        if save is not None:
            say(f"Graph: {graph.save(save)}", quiet)
        if html is not None:
            say(f"Page: {graph.to_html(html, examples)}", quiet)


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")
