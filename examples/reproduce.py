"""Test the paper's claims on a small language model, trained on the spot, offline.

    python examples/reproduce.py                            # everything; hours on two CPU cores
    python examples/reproduce.py --claims adversary,seeds
    python examples/reproduce.py --quick                    # a minute or two, to see that it works

Beside the runs (see `recorded.run`) the output directory receives `claims/<name>.json`, the table
of each claim, and `report.html`, all of them with their plots. Claims share runs. Repeat the
command to go on after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import print as rich_print

from claims import CLAIMS
from claims.laboratory import Laboratory
from quickstart_target import N_CHARACTERS, get_target, new_model, save
from recorded.page import write_page
from recorded.run import Target
from recorded.section import Section
from vpd_lens.cli.options import Debug, Device, Quiet, readable_errors, say
from vpd_lens.errors import ConfigError
from vpd_lens.models import load_model
from vpd_lens.storage import write_text
from vpd_lens.training import VPDConfig

STEPS, TARGET_STEPS, SEED = 2000, 2500, 0
COMPILED_FROM = 200  # steps of a run; the runs share what the first of them compiles
EVALUATION = {"batch_size": 16, "n_batches": 4, "pgd_steps": [20], "pgd_restarts": 3}
LONG_ATTACK = (20, 40, 80, 160, 320)
# So little of everything that it takes a minute or two.
QUICK_STEPS, QUICK_TARGET_STEPS, QUICK_CHARACTERS = 2, 20, 600_000
QUICK_EVALUATION = {"batch_size": 2, "n_batches": 1, "pgd_steps": [1], "pgd_restarts": 1}
QUICK_ATTACK = (1, 2)
QUICK_CONFIG = {
    "batch_size": 2,
    "seq_len": 16,
    "n_subcomponents": 8,
    "importance": {"d_model": 16, "n_blocks": 1, "n_heads": 2},
    "faithfulness.warmup_steps": 5,
}
QUICK_WARNING = (
    "Made with --quick: a few training steps of everything. No figure on this page means anything."
)


def reproduce(
    output: Path,
    claims: Sequence[str] = tuple(CLAIMS),
    steps: int | None = None,
    quick: bool = False,
    device: str = "auto",
    progress: bool = True,
    say: Callable[[str], None] = print,
    show: Callable[[Section], None] | None = None,
) -> list[Section]:
    """Test claims of the paper on a small language model, trained on the spot.

    Repeating an interrupted reproduction goes on where it stopped. The page is written anew after
    each claim.

    Args:
        output: The directory of runs.
        claims: Which, of `claims.CLAIMS`.
        steps: VPD training steps of every run; by default 2000.
        quick: Check that everything works; the figures mean nothing.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"cuda:N"`.
        progress: Show progress bars.
        say: Receives one line per run.
        show: Receives each section when it is done.

    Returns:
        One section per claim.

    Raises:
        ConfigError: If a claim is unknown or the configuration is not valid.
        TrainingInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    unknown = [name for name in claims if name not in CLAIMS]
    if unknown or not claims:
        raise ConfigError(f"claims {unknown} are not known; choose from {', '.join(CLAIMS)}.")
    laboratory = _laboratory(output, steps, quick, device, progress, say)
    sections: list[Section] = []
    for name in claims:
        sections.append(CLAIMS[name](laboratory))
        text = json.dumps(sections[-1].as_json(), indent=2, ensure_ascii=False)
        write_text(output / "claims" / f"{name}.json", text + "\n")
        write_page(
            output / "report.html",
            "VPD's claims in small",
            f"A 2-layer transformer on Python code, {laboratory.base.steps:,} VPD steps per run.",
            sections,
            list(laboratory.records.values()),
            QUICK_WARNING if quick else "",
        )
        if show is not None:
            show(sections[-1])
    return sections


def base_config(steps: int, device: str) -> VPDConfig:
    """The run that the others vary: the preset for small models, as in the quickstart."""
    return VPDConfig.small(
        steps=steps,
        seed=SEED,
        device=device,
        compile=steps >= COMPILED_FROM,
        log_every=max(1, steps // 20),
        checkpoint_every=max(1, steps // 4),
    )


def _laboratory(
    output: Path,
    steps: int | None,
    quick: bool,
    device: str,
    progress: bool,
    say: Callable[[str], None],
) -> Laboratory:
    target_steps = QUICK_TARGET_STEPS if quick else TARGET_STEPS
    n_characters = QUICK_CHARACTERS if quick else N_CHARACTERS
    config = base_config(steps or (QUICK_STEPS if quick else STEPS), device)
    folder = output / "targets" / f"{target_steps}-steps" / "model"
    model, tokens, held_out = get_target(folder, target_steps, SEED, n_characters, progress)
    untrained = folder.with_name("untrained")
    if not untrained.exists():
        save(new_model(SEED), model.tokenizer, untrained)

    def target(folder: Path, trained_for: int) -> Target:
        description = {
            "name": "the quickstart's language model, a Qwen2",
            "trained_steps": trained_for,
            "n_characters": n_characters,
            "seed": SEED,
        }
        return Target(description, lambda: load_model(folder, device=device), tokens, held_out)

    return Laboratory(
        output=output,
        target=target(folder, target_steps),
        untrained=target(untrained, trained_for=0),
        base=config.replaced(QUICK_CONFIG) if quick else config,
        evaluation=QUICK_EVALUATION if quick else EVALUATION,
        long_attack=QUICK_ATTACK if quick else LONG_ATTACK,
        progress=progress,
        say=say,
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__.partition("\n")[0])
def main(
    claims: Annotated[
        str, typer.Option(metavar="A,B,...", help=f"Which claims: {', '.join(CLAIMS)}.")
    ] = ",".join(CLAIMS),
    output: Annotated[Path, typer.Option(help="Directory of the runs.")] = Path("runs/reproduce"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="VPD training steps of every run; default: 2000.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="See that it works; the figures mean nothing.")
    ] = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    with readable_errors(debug):
        reproduce(
            output,
            [name.strip() for name in claims.split(",")],
            steps,
            quick,
            device or "auto",
            progress=not quiet,
            say=lambda text: say(text, quiet),
            show=None if quiet else lambda section: rich_print(section.table()),
        )
        say(f"Report: {output / 'report.html'}", quiet)


if __name__ == "__main__":
    app()
