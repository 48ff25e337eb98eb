"""Training checkpoints: everything needed to continue bit-identically (see `vpd_lens.storage`).

`state.safetensors` holds `subcomponents/...`, `importance/...`, `optimiser/<n>/<parameter>/...`,
`generator` (and `generator/<rank>`), `window`, `price`; with an adversary `sources/...` and
`adversary/...`; with a moving average in the minimality losses `frequencies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vpd_lens import storage
from vpd_lens.config import VPDConfig
from vpd_lens.decomposition import saving
from vpd_lens.decomposition.folding import Columns, fold, unfold
from vpd_lens.decomposition.saving import Shapes, recorded_shapes
from vpd_lens.description import SubcomponentsRecord
from vpd_lens.errors import ArtefactError
from vpd_lens.training.adversary import PER_ROW, PersistentAdversary
from vpd_lens.training.sharding import sharded_like, whole
from vpd_lens.training.step import Stepper

# Fields that do not change what a step computes.
_MAY_CHANGE = {"log_every", "checkpoint_every", "device", "shard_importance", "stop_on_collapse"}
_SOURCES = ("sources/components", "sources/delta")


class CheckpointRecord(SubcomponentsRecord):
    """Where a training run stands, apart from its tensors: after `step` steps of `config`.

    `trained_before` training steps were behind the decomposition when the run began; `data` is
    the position in the data, `extra` anything else to keep (the wandb run).
    """

    kind: ClassVar[str] = "checkpoint"

    step: int
    config: VPDConfig
    trained_before: int = 0
    data: dict[str, Any]
    extra: dict[str, Any]


def save_checkpoint(path: Path, stepper: Stepper, **progress: Any) -> None:
    """Write the state between two steps; the previous checkpoint survives an interruption.

    All processes of a job call it together; the first one writes. What is in the file does not
    depend on their number, but for a random generator each. `progress` has `step`,
    `trained_before`, `data` and `extra` of the `CheckpointRecord`.

    Raises:
        ArtefactError: If it cannot be written.
    """
    vpd, processes, adversary = stepper.vpd, stepper.processes, stepper.adversary
    tensors = _prefixed("subcomponents/", saving.subcomponent_tensors(vpd))
    tensors |= _prefixed("importance/", vpd.importance.state_dict())
    for index, optimiser in enumerate(stepper.optimisers):
        tensors |= _optimiser_tensors(f"optimiser/{index}/", optimiser)
    states = processes.gathered(stepper.generator.get_state()[None])
    tensors |= {_generator_name(rank): state for rank, state in enumerate(states)}
    tensors["window"] = processes.gathered(stepper.window[None])
    tensors["price"] = stepper.price.state
    if stepper.minimality.average is not None:
        tensors["frequencies"] = stepper.minimality.average
    if adversary is not None:
        own = dict(zip(_SOURCES, adversary.leaves(), strict=True))
        own |= _optimiser_tensors("adversary/", adversary.optimiser)
        # Those of all processes' rows together, on the first.
        tensors |= {n: adversary.per_row.gathered(t) if t.ndim else t for n, t in own.items()}
    state = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        if processes.first:  # one tensor at a time, so that the others need no memory for all
            state[name] = tensor.detach().cpu()
    if processes.first:
        progress |= saving.subcomponents_record(vpd)
        storage.write(path, CheckpointRecord(config=stepper.config, **progress), {"state": state})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that fits a run in every part; nothing has been changed yet."""

    record: CheckpointRecord
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: Path, stepper: Stepper) -> Checkpoint:
        """Read what `save_checkpoint` wrote, and check all of it against a fresh stepper.

        Raises:
            ArtefactError: If it is damaged, newer, or belongs to another model or configuration.
        """
        artefact = storage.read(path, CheckpointRecord)
        record, vpd = artefact.record, stepper.vpd
        config, before = stepper.config.model_dump(), record.config.model_dump()
        different = [n for n in sorted(config.keys() - _MAY_CHANGE) if config[n] != before[n]]
        if different:
            raise ArtefactError(
                f"{path}: the run was started with another configuration; these fields differ: "
                f"{different}. Resume with the same ones, or start a new output directory."
            )
        sizes = tuple(len(i.kept) + len(i.folded) for i in record.indices)
        if (vpd.layout.names, vpd.subcomponents.original_sizes) != (record.sites, sizes):
            raise ArtefactError(f"{path}: its sites or their sizes differ from model.vpd's.")
        saving.check_base_model(vpd, record.base_model)
        tensors = artefact.tensors("state")
        storage.require_shapes(artefact.folder, tensors, _shapes(record, tensors, stepper))
        return cls(record, tensors)

    def restore(self, stepper: Stepper) -> None:
        """Make a run's state that of the checkpoint.

        With another number of processes, or on another kind of device, the random generators
        that the checkpoint has none for begin anew, from the seed and the step.
        """
        record, tensors, vpd = self.record, self.tensors, stepper.vpd
        # To its shapes, in whatever state of compaction it finds the decomposition.
        kept = [indices.kept for indices in record.indices]
        if kept != vpd.subcomponents.original:
            unfold(vpd)
            fold(vpd, Columns(vpd.layout.sizes, kept, vpd.device))
        saving.load_subcomponents(vpd, _under(tensors, "subcomponents/"), record)
        like, importance = vpd.importance.state_dict(), _under(tensors, "importance/")
        parts = {name: sharded_like(t, like[name]) for name, t in importance.items()}
        vpd.importance.load_state_dict(parts)
        for index, optimiser in enumerate(stepper.optimisers):
            _load_optimiser(optimiser, _under(tensors, f"optimiser/{index}/"))
        processes = stepper.processes
        if _SOURCES[0] in tensors:
            stepper.adversary = _restored_adversary(stepper, tensors)
        new = processes.generator(stepper.config.seed, stepper.device, record.step).get_state()
        saved = tensors.get(_generator_name(processes.rank), new)
        # Each kind of device has states of its own size.
        stepper.generator.set_state(saved if saved.shape == new.shape else new)
        if "window" in tensors:  # one of each process; their mean if there are others now
            window = tensors["window"]
            same = len(window) == processes.world
            stepper.window = (window[processes.rank] if same else window.mean(0)).to(stepper.device)
        if "price" in tensors:
            stepper.price.state = tensors["price"].to(stepper.device)
        if stepper.minimality.average is not None:
            stepper.minimality.average = tensors["frequencies"].to(stepper.device)
        stepper.renew()


def _shapes(record: CheckpointRecord, tensors: Mapping[str, Tensor], stepper: Stepper) -> Shapes:
    """Names and shapes of all tensors of a checkpoint; some are there or not, or of any length."""
    vpd = stepper.vpd
    subcomponents, importance = recorded_shapes(record, vpd)
    shapes = _prefixed("subcomponents/", subcomponents) | _prefixed("importance/", importance)
    by_id = {id(p): importance[name] for name, p in vpd.importance.named_parameters()}
    for name, v, u in zip(vpd.layout.names, vpd.subcomponents.v, vpd.subcomponents.u, strict=True):
        by_id |= {id(v): subcomponents[f"{name}.V"], id(u): subcomponents[f"{name}.U"]}
    for index, optimiser in enumerate(stepper.optimisers):
        parameters = [by_id[id(p)] for group in optimiser.param_groups for p in group["params"]]
        muon = isinstance(optimiser, torch.optim.Muon)
        shapes |= _moments(f"optimiser/{index}/", parameters, tensors, muon)
    total = sum(record.n_subcomponents)
    if record.config.adversary.coefficient > 0:
        lead = tuple(tensors.get(_SOURCES[0], torch.empty(0)).shape[:-1])
        leaves = [(*lead, total), (*lead, len(record.sites))]
        shapes |= zip(_SOURCES, leaves, strict=True)
        shapes |= _moments("adversary/", leaves, tensors)
    if "price" in tensors:
        shapes["price"] = (3,)
    if record.config.minimality.half_life:
        shapes["frequencies"] = (total,)
    shapes["generator"] = ()
    shapes |= {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("generator")}
    if "window" in tensors:
        shapes["window"] = (len(tensors["window"]), total)
    return shapes


def _moments(
    prefix: str, parameters: list[tuple[int, ...]], tensors: Mapping[str, Tensor], muon=False
) -> Shapes:
    """What an optimiser keeps of those parameters that it has ever updated."""
    names = ("momentum_buffer",) if muon else ("step", "exp_avg", "exp_avg_sq")
    return {
        f"{prefix}{index}/{name}": () if name == "step" else shape
        for index, shape in enumerate(parameters)
        if any(f"{prefix}{index}/{name}" in tensors for name in names)
        for name in names
    }


def _generator_name(rank: int) -> str:
    return f"generator/{rank}" if rank else "generator"


def _restored_adversary(stepper: Stepper, tensors: Mapping[str, Tensor]) -> PersistentAdversary:
    rows = slice(None)
    if stepper.config.adversary.scope in PER_ROW:
        rows = stepper.processes.rows(tensors[_SOURCES[0]].shape[0])
    sources = [tensors[name][rows] for name in _SOURCES]
    adversary = stepper.new_adversary(tuple(sources[0].shape[:-1]))
    with torch.no_grad():
        for leaf, source in zip(adversary.leaves(), sources, strict=True):
            leaf.copy_(source)
    moments = _under(tensors, "adversary/").items()
    _load_optimiser(adversary.optimiser, {n: t[rows] if t.ndim else t for n, t in moments})
    return adversary


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _optimiser_tensors(prefix: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{prefix}{index}/{n}": t for index, values in state.items() for n, t in values.items()}


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = sharded_like(value, parameter)
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
