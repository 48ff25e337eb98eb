"""`reproduce`: the paper's claims in small, on the quickstart's language model.

Beside the runs (see `vpd_lens.experiments.run`) the directory receives `claims/<name>.json`, the
table of each claim, and `report.html`, all of them with their plots. Claims share runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from vpd_lens.errors import ConfigError
from vpd_lens.experiments.claims import CLAIMS
from vpd_lens.experiments.laboratory import Laboratory
from vpd_lens.experiments.page import write_page
from vpd_lens.experiments.quickstart_target import N_CHARACTERS, get_target, new_model
from vpd_lens.experiments.run import Target
from vpd_lens.experiments.section import Section
from vpd_lens.files import write_text_atomically
from vpd_lens.models import load_model, save_model
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
        claims: Which, of `vpd_lens.experiments.claims.CLAIMS`.
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
        write_text_atomically(output / "claims" / f"{name}.json", text + "\n")
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
        save_model(new_model(model.tokenizer, SEED), untrained)

    def target(folder: Path, trained_for: int) -> Target:
        description = {
            "name": "the quickstart's language model",
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
