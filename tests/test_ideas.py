"""The ideas of `benchmarks`, against their formulas."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import tiny_bridge

from vpd_lens.decomposing import decompose
from vpd_lens.decomposition import CausalImportanceConfig
from vpd_lens.training import VPDConfig
from vpd_lens.training.losses import minimality

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "idea_steps.py"
SPEC = importlib.util.spec_from_file_location("idea_steps", PATH)
ideas = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ideas)


def stepper(name, options=None, **changes):
    """An idea's step for a tiny model, on the way to 10 steps."""
    importance = CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2, d_ffn=32)
    config = VPDConfig.small(steps=10, batch_size=6, importance=importance).replaced(changes)
    model = decompose(tiny_bridge(), n_subcomponents=7, importance=importance)
    idea = ideas.IDEAS[name]
    made = idea(model.vpd, config.replaced(idea.changes), options)
    made.now = 0
    return made


@pytest.fixture
def batch():
    return torch.randint(0, 29, (6, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ideas.IDEAS)
def test_the_total_is_the_weighted_sum_of_an_ideas_losses(name, batch):
    made = stepper(name)
    for step in range(2):
        losses, _ = made.step(batch, step)
    weighted = [weight * losses[n] for n, weight in made._weights() if n in losses]
    torch.testing.assert_close(losses["total"], torch.stack(weighted).sum())
    assert made.adversary is not None
    assert ("merged" in losses) == (name == "merged")
    assert ("stochastic" in losses) == (name != "merged")


def test_smooth_l0_counts_what_is_above_gamma():
    made = stepper("smooth-l0", {"gamma_end": 0.01})
    z = torch.tensor([-1.0, 0.0, 0.1, 0.5, 1.0]).repeat(3, 1).requires_grad_()
    torch.testing.assert_close(
        made.size(z), torch.tensor([0, 0, 2 * 0.01 / 1.01, 2 * 0.25 / 1.25, 1]) * 3
    )
    made.now = 9  # the last tenth of training
    size = made.size(z)
    torch.testing.assert_close(
        size, torch.tensor([0, 0, 0.99019, 0.9997, 1]) * 3, atol=1e-4, rtol=0
    )
    # The steepest slope is 3 sqrt(3) / (8 gamma), at gamma / sqrt(3); that of c^0.4 has no end.
    near_zero = torch.linspace(0, 0.05, 10_001)[:, None].requires_grad_()
    (slope,) = torch.autograd.grad(made.size(near_zero).sum(), near_zero)
    assert slope.max().item() == pytest.approx(3 * 3**0.5 / 8 / 0.01, rel=1e-3)


def test_frequency_without_average_is_the_fused_loss():
    made = stepper("frequency", {"weight": 0.5, "reference": 48.0, "half_life": 0})
    size = (48 * torch.rand(20, generator=torch.Generator().manual_seed(0))).requires_grad_()
    apart, fused = made.price(size, 48), minimality(size, 48, 0.5)
    torch.testing.assert_close(apart, fused)
    gradients = [torch.autograd.grad(loss, size)[0] for loss in (apart, fused)]
    torch.testing.assert_close(*gradients)


def test_frequency_is_that_of_the_average():
    """After uses 0.2 and 0.8 with half-life 1 the debiased average is 0.6."""
    made = stepper("frequency", {"weight": 1.0, "reference": 5.0, "half_life": 1})
    made.price(torch.tensor([0.2 * 48]), 48)
    made.now = 1
    size = torch.tensor([0.8 * 48]).requires_grad_()
    loss = made.price(size, 48)
    assert loss.item() == pytest.approx(0.8 + 0.6 * 2)  # log2(1 + 5 * 0.6) = 2
    (gradient,) = torch.autograd.grad(loss, size)
    slope = 1 + 2 + 0.6 * 5 / (4 * torch.log(torch.tensor(2.0)))
    assert gradient.item() == pytest.approx(slope.item() / 48)


def test_relative_faithfulness_weighs_sites_alike():
    made = stepper("relative-faithfulness")
    with torch.no_grad():
        for u in made.vpd.subcomponents.u:
            u.zero_()
    assert made._faithfulness().item() == pytest.approx(1.0)
    first, weight = made.vpd.sites[0].name, made.weights[0]
    with torch.no_grad():
        made.vpd.v(first)[:], made.vpd.u(first)[:] = 0, 0
        made.vpd.v(first)[:, 0], made.vpd.u(first)[0] = weight[:, 0], 0
        made.vpd.u(first)[0, 0] = 1  # the first column is right, the rest is missing
    missing = 1 - float(weight[:, 0].square().sum() / weight.square().sum())
    n = len(made.weights)
    assert made._faithfulness().item() == pytest.approx((n - 1 + missing) / n, rel=1e-5)


def test_merged_masks_are_the_adversarys_in_its_share_of_sequences(batch):
    """With coefficients 1 and 0.5 a third."""
    made = stepper("merged")
    made.step(batch, 0)
    seen = []
    run = made.run
    made.run = lambda masks, tokens: seen.append(masks) or run(masks, tokens)
    parts = made._prepare(batch)
    shares = []
    for _ in range(40):
        assert set(made._reconstruction(parts[0], 1)) == {"merged"}
        sources = made.adversary.sources
        taken = (seen[-1].components == sources.components).float().mean((1, 2))  # [sequence]
        assert ((taken == 1) | (taken < 0.01)).all()
        deltas = (seen[-1].delta == sources.delta).float().mean((1, 2))
        assert torch.equal(taken == 1, deltas == 1)
        shares.append((taken == 1).float().mean())
    assert torch.stack(shares).mean().item() == pytest.approx(1 / 3, abs=0.1)
