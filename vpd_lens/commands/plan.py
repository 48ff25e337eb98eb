"""`vpd-lens plan`: what a run would cost, before it is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpd_lens.commands.options import Debug, readable_errors
from vpd_lens.errors import ConfigError

if TYPE_CHECKING:
    from vpd_lens.training import VPDConfig
    from vpd_lens.training.cost.target import TargetShape


def plan_command(
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_DIR", help="The target: a known name, or a directory."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN.YAML", help="Plan this run file instead.")
    ] = None,
    gpus: Annotated[
        str, typer.Option(metavar="NxNAME", help="8xH100, A100-80, ...; this: the device at hand.")
    ] = "1xH100",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences per step, of all GPUs together.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    preset: Annotated[str, typer.Option(help="paper, small or spd; not with --run.")] = "paper",
    n_subcomponents: Annotated[
        str | None, typer.Option(help="Per site: a number, paper, or faithful.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="As for train; may be repeated."),
    ] = None,
    shard_importance: Annotated[
        bool, typer.Option("--shard-importance", help="Divide the importance function among GPUs.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write all figures as JSON.")] = None,
    debug: Debug = False,
) -> None:
    """Predict time and memory of a training run from its shapes.

    Known names: gpt2-small, -medium, -large, -xl; pythia-70m, -160m, -410m, -1b, -1.4b, -2.8b;
    llama-3-8b; vpd-67m, the target of the VPD paper. Nothing is downloaded or loaded.
    """
    with readable_errors(debug):
        from rich import print as rich_print

        from vpd_lens.commands.plan_tables import record, tables
        from vpd_lens.files import write_json
        from vpd_lens.training.cost.hardware import parse_gpus
        from vpd_lens.training.cost.prediction import predict
        from vpd_lens.training.cost.workload import Workload

        given = {
            "batch_size": batch_size,
            "seq_len": seq_len,
            "steps": steps,
            "n_subcomponents": n_subcomponents,
        }
        changes = list(overrides or [])
        changes += [f"training.{k}={v}" for k, v in given.items() if v is not None]
        changes += ["training.shard_importance=true"] if shard_importance else []
        target, config = _run(model, run, preset, changes)
        n_ranks, hardware = parse_gpus(gpus)
        work = Workload.planned(target, config, n_ranks=n_ranks, on_gpu=hardware.is_gpu)
        prediction = predict(work, hardware)
        rich_print(tables(prediction))
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            write_json(json, record(prediction))


def _run(
    model: str | None, run: Path | None, preset: str, changes: list[str]
) -> tuple[TargetShape, VPDConfig]:
    from vpd_lens.config import apply_override, read_run_file
    from vpd_lens.training import VPDConfig
    from vpd_lens.training.cost.folders import target_shape

    if (model is None) == (run is None):
        raise ConfigError("give either --model or --run.")
    if run is not None:
        found = read_run_file(run, changes)
        return target_shape(found.model.source), found.training
    data: dict[str, Any] = {"training": {"preset": preset}}
    for change in changes:
        apply_override(data, change)
    unknown = sorted(set(data) - {"training"})
    if unknown:
        raise ConfigError(f"--set {unknown[0]}=...: without --run only training is planned.")
    return target_shape(model or ""), VPDConfig.from_mapping(data["training"])
