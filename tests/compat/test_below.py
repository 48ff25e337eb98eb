"""Blocks below the first decomposed matrix run once per input, and nothing else changes."""

import threading
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compat.builders import native, tokens
from vpd_lens import CausalImportanceConfig, VPDConfig
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.masks import SourceMasks
from vpd_lens.decomposition.modes import masks_from_tensors
from vpd_lens.training.forwards import CompiledForwards
from vpd_lens.training.step import Stepper

pytestmark = pytest.mark.compat
IMPORTANCE = CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2)
LAST = r"blocks\.1\."


CASES = [
    *("hooked-rms", "native-grouped"),
    *(f"bridge-{name}-default" for name in ("llama", "gpt2", "gpt_neox")),
]


@pytest.fixture(params=CASES)
def model(request, build):
    return attach(build(request.param), LAST, n_subcomponents=7, importance=IMPORTANCE)


class Calls:
    """How often a module's forward runs."""

    def __init__(self, module):
        self.n = 0
        module.register_forward_hook(self._count)

    def _count(self, *_):
        self.n += 1


def inner(block):
    """A module inside a block, which runs only if the block does."""
    return next(module for module in block.modules() if isinstance(module, torch.nn.Linear) or
                type(module).__name__ in ("Conv1D", "MLP", "GatedMLP"))  # fmt: skip


def masked(vpd, x, seed=0):
    """Logits and gradients of the masks."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*x.shape, vpd.layout.total, generator=generator).requires_grad_()
    given = dict(zip(vpd.layout.names, vpd.layout.split(mask), strict=True))
    logits = vpd.run(masks_from_tensors(given, 0.5, vpd.layout, vpd.device), x)
    (gradient,) = torch.autograd.grad(logits.float().square().mean(), mask)
    return logits.detach(), gradient


def test_outputs_and_gradients_are_the_same_to_the_bit(model):
    vpd, x = model.vpd, tokens()
    expected = [masked(vpd, x, seed) for seed in range(3)]
    calls = Calls(inner(model.blocks[0]))
    with vpd.kept_below():
        vpd.target(x)
        found = [masked(vpd, x, seed) for seed in range(3)]
        # The target's forward, and the comparison that is made once for a decomposition.
        assert calls.n == 1
        other = tokens(seed=1)
        again = masked(vpd, other)
        assert calls.n == 2
    for (logits, gradient), (same, theirs) in zip(expected, found, strict=True):
        assert torch.equal(logits, same)
        assert torch.equal(gradient, theirs)
    for one, two in zip(again, masked(vpd, other), strict=True):
        assert torch.equal(one, two)
    assert calls.n == 3


def test_an_input_that_changed_is_another_input(model):
    vpd, x = model.vpd, tokens()
    with vpd.kept_below():
        vpd.target(x)
        x[0, 0] = (x[0, 0] + 1) % 61
        logits, _ = masked(vpd, x)
    assert torch.equal(logits, masked(vpd, x)[0])


def elsewhere(results, model):
    """Append the output for another input, computed in another thread."""
    if not results:
        results.append(None)  # the hook is called there, too

        def run():
            with torch.no_grad():
                results[0] = model(tokens(seed=1))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()


def test_another_thread_runs_the_whole_model(model):
    vpd, x = model.vpd, tokens()
    with torch.no_grad():
        expected = model(x)
        results = []
        with vpd.kept_below():
            vpd.target(x)
            vpd.target(x)
            # The other thread runs the model while this one is in the middle of it.
            point = model.blocks[1].register_forward_pre_hook(lambda *_: elsewhere(results, model))
            assert torch.equal(vpd.run(None, x), expected)
            point.remove()
        assert torch.equal(results[0], model(tokens(seed=1)))


@pytest.mark.parametrize("settings", [{}, {"recompute": True}, {"micro_batches": 2}])
def test_a_training_step_is_the_same_to_the_bit(model, settings, monkeypatch):
    config = VPDConfig.small(steps=10, batch_size=2, **settings).replaced(
        {"faithfulness.warmup_steps": 0}
    )
    state = {name: part.clone() for name, part in model.vpd.state_dict().items()}
    found = []
    for whole in (False, True):
        model.vpd.load_state_dict(state)
        if whole:
            monkeypatch.setattr(type(model.vpd), "kept_below", lambda _self: nullcontext())
        stepper = Stepper(model.vpd, config)
        losses = [stepper.step(tokens(seed=s), s)[0] for s in range(2)]
        found.append([{name: float(loss) for name, loss in step.items()} for step in losses])
    assert found[0] == found[1]


def test_a_recorded_forward_begins_at_the_first_site_too(model, monkeypatch):
    """As a compiled one: the stream is an argument of the graph, another for every batch."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    vpd = model.vpd
    compiled, calls = CompiledForwards(vpd), Calls(inner(model.blocks[0]))
    generator = torch.Generator().manual_seed(0)
    for seed in range(3):
        x = tokens(seed=seed)
        parts = (torch.rand(*x.shape, n, generator=generator) for n in (7 * len(vpd.sites),) * 2)
        masks = SourceMasks(*parts, torch.rand(*x.shape, len(vpd.sites), generator=generator))
        with torch.no_grad(), vpd.undisturbed():
            expected = vpd.run(masks, x)
            with vpd.kept_below():
                vpd.target(x)
                before = calls.n
                found = compiled.run(masks, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert seed == 0 or calls.n == before


def test_a_masked_forward_costs_its_own_blocks(model):
    vpd, x = model.vpd, tokens()
    with torch.no_grad(), vpd.kept_below():
        with FlopCounterMode(display=False) as whole:
            vpd.target(x)
        vpd.run(None, x)  # and the comparison
        with FlopCounterMode(display=False) as short:
            vpd.run(None, x)
    assert short.get_total_flops() < 0.75 * whole.get_total_flops()


def test_a_model_that_would_compute_something_else_is_run_whole(model):
    """As one whose later blocks look at what an earlier one did."""
    vpd, x = model.vpd, tokens()
    seen, calls = [], Calls(inner(model.blocks[0]))
    inner(model.blocks[0]).register_forward_hook(lambda *_: seen.append(1))
    inner(model.blocks[1]).register_forward_hook(
        lambda _module, _args, y: y * (1 + bool(seen and seen.pop()))
    )
    with vpd.kept_below(), torch.no_grad():
        vpd.run(None, x)
        vpd.run(None, x)
        before = calls.n
        vpd.run(None, x)
    assert vpd.forwards.passable is False
    assert calls.n == before + 1


def test_nothing_is_passed_by_where_the_first_block_is_decomposed():
    model = attach(native("grouped"), n_subcomponents=7, importance=IMPORTANCE)
    calls, x = Calls(inner(model.blocks[0])), tokens()
    with model.vpd.kept_below(), torch.no_grad():
        model.vpd.target(x)
        model.vpd.target(x)
    assert calls.n == 2


def test_importances_run_no_block_above_the_last_site():
    """And are the same; under masks that follow from them the model runs whole, once."""
    model = attach(native("grouped"), r"blocks\.0\.", n_subcomponents=7, importance=IMPORTANCE)
    x = tokens()
    expected = model.vpd.target(x)[1]
    calls = Calls(inner(model.blocks[1]))
    found = model.vpd.inputs(x)
    model.vpd.causal_importance(x)
    assert calls.n == 0
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    with torch.no_grad(), model.vpd.masked("ci"):
        model(x)
    assert calls.n == 1
    with torch.no_grad():
        model(x)
    assert calls.n == 2


def test_an_adversary_runs_the_blocks_below_twice(model):
    """In the target's forward, and in the masked one that a user's hooks see."""
    vpd, x = model.vpd, tokens()
    calls = Calls(inner(model.blocks[0]))
    with torch.no_grad(), vpd.masked("adversarial", n_steps=5, seed=0):
        found = model(x)
    assert calls.n == 2
    assert not torch.equal(found, model(x))
