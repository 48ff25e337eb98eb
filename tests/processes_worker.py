"""What every process of a two-process job runs in test_processes.py.

A case that fails ends the job; what it prints reaches the test.
"""

import os
import runpy
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import tiny_bridge
from safetensors.torch import load_file
from test_training import IMPORTANCE, config, state

from vpd_lens.decomposition import masks
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.masks import Sources
from vpd_lens.errors import NonFiniteLossError, ProcessError, TrainingInterrupted
from vpd_lens.training import adversary, losses, train, trainer
from vpd_lens.training.distributed import ALONE, join
from vpd_lens.training.sharding import is_sharded, sharded_importance, whole
from vpd_lens.training.step import Stepper

BATCH = 8
TOKENS = torch.randint(0, 29, (64, 8), generator=torch.Generator().manual_seed(1))
RUN = {"steps": 10, "checkpoint_every": 3, "log_every": 1, "n_subcomponents": 8}
SHORT = {"steps": 6, "checkpoint_every": 2}


def rank():
    """The number of this process; 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


class Draws:
    """Random numbers that belong to a row of the global batch, whoever draws them."""

    def __init__(self, start):
        self.start = self.first = start
        self.calls = 0

    def uniform(self, *shape):
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        if shape[0] == 1:
            return torch.rand(*shape, generator=generator)
        rows = torch.rand(BATCH, *shape[1:], generator=generator)
        return rows[self.first : self.first + shape[0]].clone()

    def sources(self, g, layout, generator=None):
        return Sources(self.uniform(*g.shape), self.uniform(*g.shape[:-1], layout.n_sites))

    def subset(self, shape, device, generator=None):
        noise, k = self.uniform(*shape), self.uniform(*shape[:-1], 1)
        return noise.argsort(-1).argsort(-1) < 1 + (k * shape[-1]).long()

    def install(self):
        for module in (adversary, losses):
            module.uniform_sources = self.sources
        masks.uniform_k_subset = self.subset

        def of_a_part(stepper, part, *rest):
            self.first = self.start + (part.rows.start or 0)
            self.calls = 100
            return ORIGINAL_LOSSES(stepper, part, *rest)

        Stepper._losses = of_a_part


ORIGINAL_LOSSES = Stepper._losses


def one_step(changes, processes):
    """Losses, gradients and sources of one step, without the update of the parameters."""
    cfg = config(batch_size=BATCH, **changes)
    model = tiny_bridge()
    uneven = {r"0\.attn\.q": 7, ".": 12}  # shards of different sizes
    attach(model, n_subcomponents=uneven, importance=IMPORTANCE)
    if cfg.shard_importance:
        sharded_importance(model.vpd, processes, True).__enter__()
    stepper = Stepper(model.vpd, cfg, processes)
    for optimiser in stepper.optimisers:
        optimiser.step = lambda: None
        optimiser.zero_grad = lambda set_to_none=True: None
    rows = processes.rows(BATCH, cfg.micro_batches)
    Draws(rows.start or 0).install()
    found, _ = stepper.step(TOKENS[:BATCH][rows], 3)
    gradients = {name: whole(p.grad) for name, p in model.vpd.named_parameters()}
    sources = [
        stepper.adversary.per_row.gathered(leaf.detach()) for leaf in stepper.adversary.leaves()
    ]
    return found, gradients, sources


def same_step():
    """One step of two processes against one of a single process on the global batch."""
    processes = join("cpu", torch.nn.Linear(1, 1))
    assert processes.world == 2
    for scope in ("position", "sequence", "batch", "single"):
        base = {"adversary": {"scope": scope, "routing": "subset", "lr_warmup": 0.0}}
        base["locality"] = {"coefficient": 1.0}
        expected = one_step(base, ALONE)
        cases = [{}, {"shard_importance": True}]
        if scope == "sequence":
            cases += [{"micro_batches": 2}, {"micro_batches": 2, "shard_importance": True}]
        for changes in cases:
            compare(one_step({**base, **changes}, processes), expected, f"{scope} {changes}")
    processes.close()


def compare(found, expected, case):
    assert found[0].keys() == expected[0].keys()
    for name, loss in expected[0].items():
        torch.testing.assert_close(found[0][name], loss, rtol=1e-5, atol=1e-7, msg=f"{case} {name}")
    for name, gradient in expected[1].items():
        scale = gradient.abs().max()
        error = (found[1][name] - gradient).abs().max() / scale
        assert scale > 0, f"{case}: no gradient reaches {name}"
        assert error < 1e-4, f"{case}: the gradient of {name} is off by {error:.1e}"
    if rank() == 0:
        for a, b in zip(found[2], expected[2], strict=True):
            assert a.shape == b.shape, case
            # Adam's first steps follow the sign of gradients that may be zero up to rounding.
            assert ((a - b).abs() < 1e-5).float().mean() > 0.999, case


def trained(folder, at=None, do=None, **changes):
    """Train on both processes; at a step (from 0), something happens instead of it."""
    model = tiny_bridge()
    run = config(**{**RUN, **changes})
    original = Stepper.step

    def interrupted(self, batch, index, *rest):
        if index == at:
            do(self)
        return original(self, batch, index, *rest)

    kept = []
    original_init = Stepper.__init__

    def remembered(self, *args):
        original_init(self, *args)
        kept.append(self)

    Stepper.step, Stepper.__init__ = interrupted, remembered
    try:
        resume = (Path(folder) / "checkpoint").exists()
        result = train(model, TOKENS, run, output=folder, resume=resume, progress=rank() == 0)
    finally:
        Stepper.step, Stepper.__init__ = original, original_init
    return model, result, kept[0]


def die(stepper):
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(stepper):
    os.kill(os.getpid(), signal.SIGTERM)


def only(number, act):
    return lambda stepper: act(stepper) if number == rank() else None


def crash(stepper):
    raise Crash


class Crash(Exception):
    pass


KINDS = {
    "sequence": {"adversary": {"scope": "sequence", "restart": 0.2}, "micro_batches": 2},
    "batch": {
        "adversary": {"scope": "batch", "restart": 0.2},
        "optimiser": {"kind": "muon"},
        **SHORT,
    },
    "bf16 masks": {"mask_dtype": "bfloat16", "adversary": {"scope": "batch"}, **SHORT},
    "sharded": {"shard_importance": True, **SHORT},
    "compacted": {"compaction": {"window": 3, "threshold": 0.5}, **SHORT},
}


# The last one resumes within a window of importances, after a first compaction.
CRASH = {"sequence": 4, "batch": 3, "bf16 masks": 3, "sharded": 3, "compacted": 5}


def resume_then_die():
    """Runs of each kind, whole, and interrupted and resumed; then one whose second process dies."""
    for kind, changes in KINDS.items():
        model, result, stepper = trained(f"{kind}-whole", **changes)
        keep(f"{kind}-whole", model, result, stepper)
        assert all(type(p) is torch.nn.Parameter for p in model.vpd.parameters())
        with suppress(Crash):
            trained(f"{kind}-broken", at=CRASH[kind], do=crash, **changes)
        if rank() == 0:
            shutil.copytree(f"{kind}-broken/checkpoint", f"{kind}-checkpoint")
        again, _, _ = trained(f"{kind}-broken", **changes)
        assert all(map(torch.equal, state(model.vpd), state(again.vpd))), kind
        folded = sum(model.vpd.subcomponents.original_sizes) - model.vpd.layout.total
        assert (folded > 0) == (kind == "compacted"), folded
    unsharded()
    trained("dying", at=7, do=only(1, die), **KINDS["sequence"])


def unsharded():
    """A sharded run's checkpoint goes on without shards, to the same numbers."""
    processes = join("cpu", torch.nn.Linear(1, 1))
    if processes.first:
        shutil.copytree("sharded-broken", "unsharded")
        shutil.rmtree("unsharded/checkpoint")
        shutil.copytree("sharded-checkpoint", "unsharded/checkpoint")
    processes.close()
    plain, _, stepper = trained("unsharded", **{**KINDS["sharded"], "shard_importance": False})
    assert not any(map(is_sharded, stepper.parameters["importance"]))
    expected, _, _ = torch.load(f"sharded-whole/process-{rank()}.pt")
    for one, other in zip(state(plain.vpd), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def poison(stepper):
    stepper.vpd.subcomponents.u[0].data[0, 0] = float("inf")


def keep(folder, model, result, stepper):
    """Store what this process has after a run."""
    leaves = [leaf.detach() for leaf in stepper.adversary.leaves()]
    torch.save((state(model.vpd), leaves, result.metrics), f"{folder}/process-{rank()}.pt")


def go_on():
    """Resume the job that died, and a run of a single process; stop on a signal to one process."""
    model, _, _ = trained("dying", **KINDS["sequence"])
    whole_run, _, _ = torch.load(f"sequence-whole/process-{rank()}.pt")
    assert all(map(torch.equal, state(model.vpd), whole_run))
    model, result, stepper = trained("single", at=3, do=check_cut, **KINDS["sequence"])
    keep("single", model, result, stepper)
    shuffled = list(TOKENS.split(4))[:: 1 if rank() == 0 else -1]
    with pytest.raises(ProcessError, match="same data"):
        train(tiny_bridge(), shuffled, config(**RUN), output="unlike", progress=False)
    with pytest.raises(NonFiniteLossError, match="stochastic"):
        trained("poisoned", at=3, do=only(1, poison), **KINDS["sequence"])
    trainer.CHECKPOINT_SECONDS, trainer.CHECKPOINT_SHARE = 0.0, float("inf")
    try:
        trained("stopped", at=3, do=only(1, terminate), **{**KINDS["sequence"], **NO_CHECKPOINTS})
    except TrainingInterrupted as error:
        Path(f"stopped/process-{rank()}.txt").write_text(str(error))
    with suppress(Crash):
        trained("clocked", at=3, do=crash, **{**KINDS["sequence"], **NO_CHECKPOINTS})


NO_CHECKPOINTS = {"checkpoint_every": 0}


def command():
    """`python -m vpd_lens train run.yaml`."""
    sys.argv = ["vpd_lens", "train", "run.yaml"]
    runpy.run_module("vpd_lens", run_name="__main__")


def check_cut(stepper):
    """The sources of this process are its rows of those in the checkpoint, the moments too."""
    tensors = load_file("single/checkpoint/state.safetensors")
    rows = slice(2 * rank(), 2 * rank() + 2)
    leaves = stepper.adversary.leaves()
    for index, (leaf, name) in enumerate(zip(leaves, ("components", "delta"), strict=True)):
        assert torch.equal(leaf, tensors[f"sources/{name}"][rows])
        for moment in ("exp_avg", "exp_avg_sq"):
            own = stepper.adversary.optimiser.state[leaf][moment]
            assert torch.equal(own, tensors[f"adversary/{index}/{moment}"][rows])
    same = torch.equal(stepper.generator.get_state(), tensors["generator"])
    assert same == (rank() == 0)
