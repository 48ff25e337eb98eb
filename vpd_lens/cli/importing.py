"""`vpd-lens import`: a decomposition that the method's authors published, as a folder of ours."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from vpd_lens.cli import options
from vpd_lens.cli.options import readable_errors, say
from vpd_lens.errors import ArtefactError


def import_command(
    checkpoint: Annotated[
        Path, Argument(metavar="CHECKPOINT", help="Folder of a decomposition run, or its .pth.")
    ],
    output: Annotated[Path, Option(help="Directory of the results.")],
    target: Annotated[
        Path | None, Option(help="Folder of the target's run, with model_config.yaml.")
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Import a decomposition that the method's authors published.

    The output directory receives decomposition/ and target/, its base model. Every other command
    takes it.
    """
    with readable_errors(debug):
        for path in filter(None, (checkpoint, target)):
            if not path.exists():
                raise ArtefactError(f"{path}: there is no such file or directory. Check the path.")
        from vpd_lens.interop.param_decomp import import_to_folder

        vpd = import_to_folder(checkpoint, target, output).vpd
        say(f"{vpd!r}", quiet)
        say(f"Next: vpd-lens eval {shlex.quote(str(output))} --data DATA", quiet)
