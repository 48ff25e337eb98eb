"""Training checkpoints: everything needed to continue bit-identically, written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

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
from vpd_lens.training.adversary import PersistentAdversary
from vpd_lens.training.config import VPDConfig
from vpd_lens.training.step import Stepper


def save_checkpoint(
    path: Path, stepper: Stepper, step: int, data_state: dict[str, Any], extra: dict[str, Any]
) -> None:
    """Write the state after `step` finished steps.

    Args:
        path: Directory of the checkpoint; the previous one survives an interruption.
        stepper: Parameters, optimiser, sources and random generator.
        step: Finished steps.
        data_state: Position in the data.
        extra: Anything else to keep (the wandb run id).
    """
    vpd = stepper.vpd
    tensors = {f"subcomponents/{k}": t for k, t in subcomponent_tensors(vpd).items()}
    tensors |= {f"importance/{k}": t for k, t in vpd.importance.state_dict().items()}
    for index, optimiser in enumerate(stepper.optimisers):
        tensors |= _optimiser_tensors(f"optimiser/{index}", optimiser)
    tensors["generator"] = stepper.generator.get_state()
    tensors["window"] = stepper.window.total
    if stepper.adversary is not None:
        tensors["sources/components"], tensors["sources/delta"] = stepper.adversary.leaves()
        tensors |= _optimiser_tensors("adversary", stepper.adversary.optimiser)
    with atomic_directory(path) as folder:
        save_file(
            {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()},
            folder / "state.safetensors",
        )
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
    unfold(vpd)
    fold(vpd, Columns(*zip(*kept, strict=True), vpd.device))
    load_subcomponents(vpd, _under(tensors, "subcomponents/"), record)
    vpd.importance.load_state_dict(_under(tensors, "importance/"))
    for index, optimiser in enumerate(stepper.optimisers):
        _load_optimiser(optimiser, _under(tensors, f"optimiser/{index}/"))
    if "sources/components" in tensors:
        stepper.adversary = _restored_adversary(stepper, tensors)
    stepper.generator.set_state(tensors["generator"])
    if "window" in tensors:
        stepper.window.total = tensors["window"].to(stepper.device)
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
_MAY_CHANGE = ("log_every", "checkpoint_every", "device")


def _restored_adversary(stepper: Stepper, tensors: dict[str, Tensor]) -> PersistentAdversary:
    shape = tuple(tensors["sources/components"].shape[:-1])
    adversary = PersistentAdversary(
        stepper.config.adversary.model_copy(update={"scope": "position"}),
        stepper.vpd.layout,
        shape,
        stepper.device,
        stepper.generator,
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
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict(
        {"state": state, "param_groups": optimiser.state_dict()["param_groups"]}
    )
