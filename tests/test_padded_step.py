"""Training on padded batches, and how often sources start over."""

import pytest
import torch
from test_training import fresh_stepper

from vpd_lens.config import AdversaryConfig
from vpd_lens.decomposition import Divergence, Layout
from vpd_lens.training.adversary import PersistentAdversary
from vpd_lens.training.minimality import Power, penalty_sum


def padded_step(tokens, real, **changes):
    """Losses, gradients and importances of one step on a batch with padding."""
    stepper = fresh_stepper({"adversary": {"restart": 0.0}, **changes})
    gradients = {}
    for name, parameter in stepper.vpd.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: gradients.__setitem__(name, p.grad.clone())
        )
    losses, importance = stepper.step(tokens, 0, real)
    return losses, gradients, importance


def test_what_stands_at_pads_changes_nothing(tokens):
    real = torch.ones(4, 8, dtype=torch.bool)
    real[1, 5:], real[3, 2:] = False, False
    other = torch.where(real, tokens[:4], (tokens[:4] + 7) % 29)
    expected, gradients, importance = padded_step(tokens[:4], real)
    got, again, _ = padded_step(other, real)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(again, gradients, atol=1e-7, rtol=1e-4)
    g = importance.whole()
    assert (g[~real] == 0).all()
    torch.testing.assert_close(
        importance.mean((g > 0).sum(-1)), (g[real] > 0).sum(-1).float().mean()
    )


def test_losses_of_a_padded_batch_are_means_over_real_positions(tokens):
    stepper = fresh_stepper({})
    real = torch.ones(4, 8, dtype=torch.bool)
    real[1, 5:] = False
    with torch.no_grad():
        output, inputs = stepper.vpd.target(tokens[:4], attention_mask=real.long())
        masked = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        z = stepper.vpd.pre_importance(inputs, real)
    for kind in ("kl", "mse"):
        whole = Divergence(output, kind, real)
        chosen = masked[real].clone().requires_grad_()
        expected = Divergence(output[real], kind)(chosen)
        leaf = masked.clone().requires_grad_()
        got = whole(leaf)
        torch.testing.assert_close(got, expected)
        got.backward()
        expected.backward()
        torch.testing.assert_close(leaf.grad[real], chosen.grad)
        assert (leaf.grad[~real] == 0).all()
    torch.testing.assert_close(penalty_sum(z, Power(0.7), real), penalty_sum(z[real], Power(0.7)))


def test_micro_batches_of_a_padded_batch_have_the_gradient_of_the_whole(tokens):
    """Parts with unequal numbers of real tokens count by their share of them."""
    real = torch.ones(4, 8, dtype=torch.bool)
    real[2:, 3:] = False
    # Without random masks, so that both draw the same numbers: none.
    changes = {"stochastic": {"coefficient": 0.0}, "adversary": {"restart": 0.0, "inner_steps": 1}}
    whole, expected, _ = padded_step(tokens[:4], real, **changes)
    parts, got, _ = padded_step(tokens[:4], real, micro_batches=2, **changes)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sources_start_over_as_often_as_they_should(dtype):
    layout = Layout(("a",), (2,))
    config = AdversaryConfig(scope="sequence", restart=0.001)
    generator = torch.Generator().manual_seed(0)
    shape, device = (200_000, 1), torch.device("cpu")
    adversary = PersistentAdversary(config, layout, shape, device, generator, dtype=dtype)
    for leaf in adversary.leaves():
        leaf.grad = torch.ones_like(leaf)
    adversary.ascend(1.0)
    adversary.restart()
    moments = adversary.optimiser.state[adversary.leaves()[0]]["exp_avg"]
    share = float((moments == 0).all(-1).float().mean())
    assert share == pytest.approx(0.001, rel=0.3)
