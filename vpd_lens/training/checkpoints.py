"""Training checkpoints: everything needed to continue bit-identically, written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vpd_lens.config import VPDConfig
from vpd_lens.decomposition.folding import Columns, fold, unfold
from vpd_lens.decomposition.saving import (
    base_model_record,
    check_weights,
    folded_record,
    load_subcomponents,
    subcomponent_tensors,
)
from vpd_lens.errors import ArtefactError
from vpd_lens.files import (
    FORMAT_VERSION,
    atomic_directory,
    existing_directory,
    file_hash,
    read_json,
    read_tensors,
    write_json,
)
from vpd_lens.training.adversary import PER_ROW, PersistentAdversary
from vpd_lens.training.sharding import sharded_like, whole
from vpd_lens.training.step import Stepper


def save_checkpoint(
    path: Path, stepper: Stepper, step: int, data_state: dict[str, Any], extra: dict[str, Any]
) -> None:
    """Write the state after `step` finished steps.

    All processes of a job call it together; the first one writes. What is in the file does not
    depend on their number, but for a random generator each.

    Args:
        path: Directory of the checkpoint; the previous one survives an interruption.
        stepper: Parameters, optimiser, sources and random generator.
        step: Finished steps.
        data_state: Position in the data.
        extra: Anything else to keep (the wandb run id).
    """
    vpd, processes = stepper.vpd, stepper.processes
    tensors = {f"subcomponents/{k}": t for k, t in subcomponent_tensors(vpd).items()}
    tensors |= {f"importance/{k}": t for k, t in vpd.importance.state_dict().items()}
    for index, optimiser in enumerate(stepper.optimisers):
        tensors |= _optimiser_tensors(f"optimiser/{index}", optimiser)
    states = processes.gathered(stepper.generator.get_state()[None])
    tensors |= {_generator_name(rank): state for rank, state in enumerate(states)}
    tensors["window"] = processes.gathered(stepper.window.total[None])
    if stepper.adversary is not None:
        tensors |= _source_tensors(stepper.adversary)
    state = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        if processes.first:  # one tensor at a time, so that the others need no memory for all
            state[name] = tensor.detach().cpu().contiguous().clone()
    if not processes.first:
        return
    with atomic_directory(path) as folder:
        save_file(state, folder / "state.safetensors")
        write_json(
            folder / "checkpoint.json",
            {
                "format_version": FORMAT_VERSION,
                "step": step,
                "config": stepper.config.model_dump(mode="json"),
                "sites": list(vpd.layout.names),
                "n_subcomponents": list(vpd.layout.sizes),
                **folded_record(vpd),
                "base_model": base_model_record(vpd),
                "data": data_state,
                "extra": extra,
                "sha256": file_hash(folder / "state.safetensors"),
            },
        )


def load_checkpoint(path: Path, stepper: Stepper) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Restore what `save_checkpoint` wrote.

    Args:
        path: The checkpoint's directory.
        stepper: A fresh stepper of the same model and configuration.

    Returns:
        Finished steps, position in the data, and the extra record.

    Raises:
        ArtefactError: If the checkpoint is damaged, newer, or belongs to another model or
            configuration; nothing is changed then.
    """
    folder = existing_directory(path)
    record = read_json(folder / "checkpoint.json")
    vpd = stepper.vpd
    if record.get("format_version") != FORMAT_VERSION:
        raise ArtefactError(
            f"{folder}: checkpoint format {record.get('format_version')!r}, this library reads "
            f"{FORMAT_VERSION}."
        )
    if file_hash(folder / "state.safetensors") != record["sha256"]:
        raise ArtefactError(f"{folder}: state.safetensors does not match its checksum.")
    config = stepper.config.model_dump(mode="json")
    # Fields that are newer than the checkpoint had their defaults.
    before = VPDConfig(**record["config"]).model_dump(mode="json")
    different = sorted(
        key for key in config if key not in _MAY_CHANGE and config[key] != before[key]
    )
    if different:
        raise ArtefactError(
            f"{folder}: the run was started with another configuration; these fields differ: "
            f"{different}. Resume with the same ones, or start a new output directory."
        )
    kept = _recorded_columns(record)
    sizes = (list(vpd.layout.names), list(vpd.subcomponents.original_sizes))
    if sizes != (record["sites"], [size for size, _ in kept]):
        raise ArtefactError(f"{folder}: its sites or their sizes differ from this decomposition's.")
    check_weights(vpd, record["base_model"])
    tensors = read_tensors(folder / "state.safetensors")
    # To the shapes of the checkpoint, in whatever state of compaction it finds the decomposition.
    if [columns for _, columns in kept] != vpd.subcomponents.original:
        unfold(vpd)
        fold(vpd, Columns(*zip(*kept, strict=True), vpd.device))
    load_subcomponents(vpd, _under(tensors, "subcomponents/"), record)
    importance = vpd.importance.state_dict()
    for name, tensor in _under(tensors, "importance/").items():
        tensors[f"importance/{name}"] = sharded_like(tensor, importance[name])
    vpd.importance.load_state_dict(_under(tensors, "importance/"))
    for index, optimiser in enumerate(stepper.optimisers):
        _load_optimiser(optimiser, _under(tensors, f"optimiser/{index}/"))
    if "sources/components" in tensors:
        stepper.adversary = _restored_adversary(stepper, tensors)
    _load_generator(stepper, tensors, int(record["step"]))
    if "window" in tensors:
        stepper.window.total = _window_total(stepper, tensors["window"])
    stepper.renew()
    return int(record["step"]), record["data"], record["extra"]


def _recorded_columns(record: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """Of every site, its number of subcomponents before any was folded, and those that stayed."""
    indices = record.get("original_indices", {})
    columns = []
    for name, size in zip(record["sites"], record["n_subcomponents"], strict=True):
        kept = indices[name]["kept"] if name in indices else list(range(size))
        columns.append((size + len(indices.get(name, {}).get("folded", [])), kept))
    return columns


# Fields that do not change what a step computes.
_MAY_CHANGE = ("log_every", "checkpoint_every", "device", "shard_importance")


def _generator_name(rank: int) -> str:
    return f"generator/{rank}" if rank else "generator"


def _load_generator(stepper: Stepper, tensors: dict[str, Tensor], step: int) -> None:
    """This process's random generator: its own, or a new one if the job had fewer processes."""
    name = _generator_name(stepper.processes.rank)
    if name in tensors:
        stepper.generator.set_state(tensors[name])
    else:
        stepper.generator.set_state(
            stepper.processes.generator(stepper.config.seed, stepper.device, step).get_state()
        )


def _window_total(stepper: Stepper, saved: Tensor) -> Tensor:
    """This process's sum of importances: its own, or the mean of all if their number differs."""
    rank, world = stepper.processes.rank, stepper.processes.world
    return (saved[rank] if len(saved) == world else saved.mean(0)).to(stepper.device)


def _source_tensors(adversary: PersistentAdversary) -> dict[str, Tensor]:
    """Sources and their moments, those of all processes' rows together on the first."""
    components, delta = adversary.leaves()
    tensors = {"sources/components": components, "sources/delta": delta}
    tensors |= _optimiser_tensors("adversary", adversary.optimiser)
    own = adversary.per_row.gathered
    return {name: own(t) if t.ndim else t for name, t in tensors.items()}


def _restored_adversary(stepper: Stepper, tensors: dict[str, Tensor]) -> PersistentAdversary:
    names = [n for n in tensors if n.startswith(("sources/", "adversary/")) and tensors[n].ndim]
    if stepper.config.adversary.scope in PER_ROW:
        rows = stepper.processes.rows(tensors["sources/components"].shape[0])
        tensors = tensors | {name: tensors[name][rows].contiguous() for name in names}
    shape = tuple(tensors["sources/components"].shape[:-1])
    adversary = PersistentAdversary(
        stepper.config.adversary.model_copy(update={"scope": "position"}),
        stepper.vpd.layout,
        shape,
        stepper.device,
        stepper.generator,
        stepper.processes,
        stepper.mask_dtype,
    )
    adversary.config = stepper.config.adversary
    with torch.no_grad():
        for leaf, name in zip(adversary.leaves(), ("components", "delta"), strict=True):
            leaf.copy_(tensors[f"sources/{name}"])
    _load_optimiser(adversary.optimiser, _under(tensors, "adversary/"))
    return adversary


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _optimiser_tensors(prefix: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {
        f"{prefix}/{index}/{name}": value
        for index, values in state.items()
        for name, value in values.items()
    }


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = sharded_like(value, parameter)
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict(
        {"state": state, "param_groups": optimiser.state_dict()["param_groups"]}
    )
