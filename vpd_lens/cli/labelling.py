"""`vpd-lens label`: names for subcomponents by a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from vpd_lens.cli import options
from vpd_lens.cli.options import readable_errors, require_folder, say


def label_command(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="The saved decomposition, or a run.")],
    harvest: Annotated[Path, Option(help="What `vpd-lens harvest` wrote to its harvest/.")],
    llm: Annotated[str, Option(metavar="MODEL", help="The language model's name.")],
    base_url: Annotated[
        str | None, Option(metavar="URL", help="Its address; default: OPENAI_BASE_URL, or OpenAI.")
    ] = None,
    key_variable: Annotated[
        str, Option(metavar="NAME", help="The environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
    n: Annotated[int | None, Option("-n", min=1, help="Label so many at most.")] = None,
    again: Annotated[bool, Option("--again", help="Also what a model has labelled.")] = False,
    n_examples: Annotated[int, Option(min=1, help="Examples shown of each.")] = 30,
    requests_per_minute: Annotated[float, Option(help="Not more than these.")] = 60.0,
    concurrency: Annotated[int, Option(min=1, help="Requests at once.")] = 8,
    max_tokens: Annotated[int | None, Option(min=1, help="Tokens in all, at most.")] = None,
    max_cost: Annotated[float | None, Option(help="US dollars in all, at most.")] = None,
    prices: Annotated[
        tuple[float, float],
        Option(metavar="IN OUT", help="US dollars for a million tokens of input and output."),
    ] = (0.0, 0.0),
    dry_run: Annotated[
        bool, Option("--dry-run", help="Ask nothing; say how much it would take.")
    ] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Let a language model name subcomponents, from what they respond to.

    Labels go to labels.json in FOLDER, each as its answer comes; after an interruption repeat the
    command. Labels by hand are never replaced.
    """
    with readable_errors(debug):
        require_folder(folder)
        from vpd_lens.analysis.harvest import Harvest
        from vpd_lens.analysis.interpretation import Endpoint, label
        from vpd_lens.decomposition.saving import saved_fingerprint

        limits: dict[str, Any] = {"max_tokens": max_tokens, "max_cost": max_cost, "prices": prices}
        rate = {"requests_per_minute": requests_per_minute, "concurrency": concurrency}
        where = {"model": llm, "base_url": base_url, "key_variable": key_variable}
        endpoint, found = Endpoint(**where, **rate, **limits), Harvest.load(harvest)
        found.check(saved_fingerprint(folder))
        how: dict[str, Any] = {"n": n, "again": again, "n_examples": n_examples}
        run = label(found, endpoint, save=folder, dry_run=dry_run, progress=not quiet, **how)
        say(run, quiet)
        if not dry_run:
            say(f"Labels: {run.labels.path}", quiet)
