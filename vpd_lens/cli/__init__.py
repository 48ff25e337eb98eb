"""`vpd-lens`: the command line. Everything heavy is imported inside the commands.

So `--help` answers at once, and a misspelt file is noticed before torch is imported.
"""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from vpd_lens import __version__
from vpd_lens.cli.analyse import (
    cluster_command,
    eval_command,
    explain_command,
    graph_command,
    harvest_command,
    info_command,
)
from vpd_lens.cli.explore import explore_command
from vpd_lens.cli.importing import import_command
from vpd_lens.cli.labelling import label_command
from vpd_lens.cli.sharing import list_command, push_command
from vpd_lens.cli.train import init_command, plan_command, train_command

app = typer.Typer(
    name="vpd-lens",
    help="Decompose the parameters of a TransformerLens model (VPD).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(init_command)
app.command("plan")(plan_command)
app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("info")(info_command)
app.command("harvest")(harvest_command)
app.command("cluster")(cluster_command)
app.command("graph")(graph_command)
app.command("explain")(explain_command)
app.command("explore")(explore_command)
app.command("label")(label_command)
app.command("import")(import_command)
app.command("list")(list_command)
app.command("push")(push_command)


def main() -> None:
    """Entry point of `vpd-lens`."""
    app()


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"vpd-lens {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
