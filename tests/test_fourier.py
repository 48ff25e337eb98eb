"""Fourier figures of modular addition, on functions whose frequencies are known."""

import math

import pytest
import torch

import vpd_lens
from toy_runs.frequencies import site_frequencies
from vpd_lens.toys.fourier import logit_waves, pair_spectrum, spectrum, wave_share
from vpd_lens.toys.modular_addition import ModularAddition, last_position_kl

P = 11
N = torch.arange(P)


def wave(k, n, phase=0.3):
    return torch.cos(2 * math.pi * k * n / P + phase)


def test_a_wave_has_one_frequency_whatever_its_phase_and_mean():
    f = torch.stack([3 * wave(2, N), wave(2, N, 1.7) + 5, wave(-2, N)], dim=1)
    expected = torch.zeros(5, 3)
    expected[1] = 1
    torch.testing.assert_close(spectrum(f), expected)


def test_shares_follow_squared_amplitudes():
    shares = spectrum(3 * wave(1, N) + wave(4, N)).tolist()
    assert shares == pytest.approx([0.9, 0, 0, 0.1, 0], abs=1e-6)
    assert spectrum(torch.ones(P)).tolist() == [0] * 5


def test_products_of_one_frequency_belong_to_it():
    a, b = N[:, None], N[None, :]
    f = wave(3, a) * wave(3, b, 1.1) + 0.5 * wave(3, a) + wave(3, a - b, 2.0)
    assert pair_spectrum(f + 7).tolist() == pytest.approx([0, 0, 1, 0, 0], abs=1e-6)


def test_products_of_two_frequencies_belong_to_none():
    a, b = N[:, None], N[None, :]
    assert pair_spectrum(wave(3, a) * wave(1, b)).tolist() == pytest.approx([0] * 5, abs=1e-6)
    both = pair_spectrum(wave(3, a) + wave(1, a) * wave(1, b))
    assert both.tolist() == pytest.approx([1 / 3, 0, 2 / 3, 0, 0], abs=1e-6)


def sums_logits(amplitudes):
    """`sum_k A_k cos(2 pi k (a + b - c) / p)`, and something that no answer depends on."""
    distance = N[:, None, None] + N[:, None] - N
    logits = sum(a * wave(k, distance, 0.0) for k, a in amplitudes.items())
    return logits + torch.randn(P, P, 1, generator=torch.Generator().manual_seed(0))


def test_waves_of_the_logits():
    logits = sums_logits({2: 3.0, 5: -1.5})
    centred = logits - logits.mean(-1, keepdim=True)
    assert logit_waves(centred).tolist() == pytest.approx([0, 3, 0, 0, -1.5], abs=1e-5)
    assert wave_share(logits) == pytest.approx(1.0)
    noise = torch.randn(P, P, P, generator=torch.Generator().manual_seed(1))
    assert wave_share(noise) < 0.05


class Constant(torch.nn.Module):
    """Answers the same, whatever it is asked."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, _):
        return self.output


def test_the_task():
    task = ModularAddition(P)
    rows = task.all_rows()
    assert rows.shape == (P * P, 3)
    assert rows[P + 2].tolist() == [1, 2, P]
    assert task.answers(torch.tensor([[7, 9, P]])).tolist() == [5]
    drawn = task(torch.Generator().manual_seed(0), 500)
    assert (drawn[:, 2] == P).all()
    assert drawn[:, :2].unique().tolist() == list(range(P))
    # A model that knows the answer: logits in the order that `all_rows` has.
    perfect = torch.zeros(P * P, 3, P + 1)
    perfect[torch.arange(P * P), -1, task.answers(rows)] = 5
    model = Constant(perfect)
    assert task.accuracy(model) == 1.0
    assert wave_share(task.logits(model)) == pytest.approx(1.0)


def test_only_the_last_position_counts():
    target = torch.randn(4, 3, P + 1, generator=torch.Generator().manual_seed(2))
    masked = target.clone()
    masked[:, :2] += torch.randn(4, 2, P + 1)
    assert last_position_kl(masked, target).item() == pytest.approx(0, abs=1e-6)
    masked[:, 2, 0] += 1
    p, q = target[:, 2].softmax(-1), masked[:, 2].log_softmax(-1)
    expected = (p * (p.log() - q)).sum(-1).mean()
    assert last_position_kl(masked, target).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("site", ["blocks.0.attn.k", "blocks.0.attn.v"])
def test_a_key_or_value_is_live_at_either_number(site, position):
    """The one that is on at the second number only counts too, with its frequencies there."""
    task = ModularAddition(P)
    model = vpd_lens.decompose(task.train_target(steps=1, progress=False), n_subcomponents=4)
    vpd = model.vpd
    z = -torch.ones(P * P, 3, sum(vpd.layout.sizes))
    z[:, position, vpd.layout.columns(site)] = torch.tensor([-1.0, -1.0, 1.0, -1.0])
    vpd.pre_importance = lambda *_, **__: z
    read = wave(3, N)[:, None] * torch.ones(4)
    unread = wave(2, N)[:, None] * torch.ones(4)
    acts = torch.zeros(P, P, 3, 4)
    acts[:, :, position] = read if position else read[:, None]
    acts[:, :, 1 - position] = unread[:, None] if position else unread
    index = vpd.layout.names.index(site)
    inputs = [torch.zeros(P * P, 3, vpd.v(name).shape[0]) for name in vpd.layout.names]
    inputs[index][..., :4] = acts.flatten(0, 1)
    with torch.no_grad():
        vpd.v(site).copy_(torch.eye(64, 4))
    vpd.inputs = lambda *_, **__: inputs
    found = site_frequencies(model, task, site)
    assert found.index.tolist() == [2]
    assert found.frequency.tolist() == [3]
    assert found.share.item() == pytest.approx(1)
