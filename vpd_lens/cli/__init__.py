"""`vpd-lens`: the command line. Everything heavy is imported inside the commands.

So `--help` answers at once, and a misspelt file is noticed before torch is imported.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vpd_lens import __version__
from vpd_lens.cli.analyse import graph_command, harvest_command
from vpd_lens.cli.evaluate import eval_command, info_command
from vpd_lens.cli.plan import plan_command
from vpd_lens.cli.train import init_command, train_command

app = typer.Typer(
    name="vpd-lens",
    help="Decompose the parameters of a TransformerLens model (VPD).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "init": init_command,
    "plan": plan_command,
    "train": train_command,
    "eval": eval_command,
    "info": info_command,
    "harvest": harvest_command,
    "graph": graph_command,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


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
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass
