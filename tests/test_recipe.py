"""The authors' later recipe, piece by piece, against its formulas (METHOD 11), and the price."""

import math

import pytest
import torch
from conftest import tiny_bridge
from hypothesis import given, settings
from hypothesis import strategies as st

from vpd_lens import VPDConfig, decompose, load, train
from vpd_lens.config import AdversaryConfig, CausalImportanceConfig, MinimalityConfig
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.conditioning import Conditioning, two_sided_leaky
from vpd_lens.decomposition.folding import Columns, fold, unfold
from vpd_lens.decomposition.importance import first_of_each_block, upper_leaky
from vpd_lens.decomposition.masks import Layout, SourceMasks, routed
from vpd_lens.decomposition.subcomponents import numerical_rank
from vpd_lens.errors import ConfigError
from vpd_lens.training.adversary import PersistentAdversary
from vpd_lens.training.losses import faithfulness, mixed
from vpd_lens.training.minimality import (
    Minimality,
    Power,
    SmoothL0,
    minimality,
    penalty,
    penalty_sum,
)
from vpd_lens.training.price import Price, allowance
from vpd_lens.training.step import Stepper

IMPORTANCE = {"d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 32}
LAYOUT = Layout(("a", "b"), (3, 4))
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def config(**changes):
    small = VPDConfig.small(steps=8, batch_size=4, seq_len=8, importance=IMPORTANCE)
    return small.replaced({"n_subcomponents": 6, "faithfulness.warmup_steps": 0, **changes})


def stepper(model=None, **changes):
    cfg = config(**changes)
    model = tiny_bridge() if model is None else model
    attach(model, n_subcomponents=6, importance=cfg.importance)
    return Stepper(model.vpd, cfg)


# ---------------------------------------------------------------------------- minimality


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), gamma=st.floats(0.01, 1.0), leak=st.sampled_from([0.01, 1.0]))
def test_the_smooth_penalty_is_its_formula(seed, gamma, leak):
    z = torch.rand(3, 4, 7, generator=generator(seed), dtype=torch.float64) * 3 - 1
    z.requires_grad_()
    weight = torch.rand(7, generator=generator(seed), dtype=torch.float64)
    g = upper_leaky(z, leak)
    plain = ((1 + gamma**2) * g.square() / (g.square() + gamma**2)).sum((0, 1))
    (expected,) = torch.autograd.grad((plain * weight).sum(), z)
    got = penalty_sum(z, SmoothL0(gamma), leak=leak)
    (gradient,) = torch.autograd.grad((got * weight).sum(), z)
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(gradient, torch.where(z > 0, expected, 0))


def test_the_smooth_penalty_counts_and_its_slope_is_bounded():
    g = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for gamma in (1.0, 0.1, 0.01):
        value, slope = SmoothL0(gamma).with_slope(g.clone())
        assert float(value[-1]) == pytest.approx(1)
        assert float(slope.max()) <= 0.65 * (1 + gamma**2) / gamma
    assert float(value[50_000]) == pytest.approx(1, abs=1e-3)  # a count, at the end
    assert float(Power(0.4).with_slope(g[:2].clone())[1].max()) > 1e3


def test_penalties_reach_their_end_when_told():
    smooth = MinimalityConfig(penalty="smooth_l0", anneal=0.9)
    assert penalty(smooth, 0, 100) == SmoothL0(1.0)
    assert penalty(smooth, 45, 100).gamma == pytest.approx(0.505)
    assert penalty(smooth, 90, 100).gamma == penalty(smooth, 99, 100).gamma == pytest.approx(0.01)
    power = MinimalityConfig()
    assert [penalty(power, s, 100).p for s in (0, 50, 100)] == pytest.approx([2.0, 1.2, 0.4])


def test_the_frequency_term_with_a_reference_does_not_depend_on_the_batch():
    f = torch.tensor([0.5, 0.01])
    expected = f.sum() + 0.5 * (f * torch.log2(1 + 1000 * f)).sum()
    for n in (10, 1000):
        torch.testing.assert_close(minimality(n * f, n, 0.5, reference=1000), expected)
    # The paper's is the reference to the batch's own positions.
    torch.testing.assert_close(minimality(64 * f, 64, 0.5), minimality(64 * f, 64, 0.5, 64))


def test_a_moving_average_takes_the_place_of_the_frequency_but_not_of_its_gradient():
    sums = torch.tensor([3.0, 1.0], requires_grad=True)
    average = torch.tensor([0.2, 0.7])
    loss = minimality(sums, 10, 0.5, average=average)
    f = sums.detach() / 10
    torch.testing.assert_close(
        loss.detach(), f.sum() + 0.5 * (average * torch.log2(1 + 10 * average)).sum()
    )
    (gradient,) = torch.autograd.grad(loss, sums)
    slope = torch.log2(1 + 10 * average) + 10 * average / (1 + 10 * average) / math.log(2)
    torch.testing.assert_close(gradient, (1 + 0.5 * slope) / 10)


def test_the_moving_average_is_unbiased_from_the_first_step():
    own = Minimality(MinimalityConfig(half_life=3.0), torch.zeros(2))
    same = torch.tensor([0.25, 0.5])
    for step in range(4):
        torch.testing.assert_close(own._updated(same, step), same)
    later = own._updated(torch.zeros(2), 4)
    weights = [0.5 ** (k / 3) for k in range(5)]
    torch.testing.assert_close(later, same * sum(weights[1:]) / sum(weights))


def test_what_is_stuck_above_one_feels_the_whole_slope_with_a_leak_of_one():
    z = torch.tensor([[5.0]], requires_grad=True)
    slopes = [
        torch.autograd.grad(penalty_sum(z, Power(1.0), leak=leak).sum(), z)[0].item()
        for leak in (0.01, 1.0)
    ]
    assert slopes == pytest.approx([0.01, 1.0])


# -------------------------------------------------------------------------- faithfulness


def test_relative_faithfulness_is_a_mean_over_sites_of_shares():
    weights = [torch.full((2, 3), 2.0), torch.full((5, 5), 0.1), torch.zeros(2, 2)]
    deltas = [0.5 * weights[0], 0.1 * weights[1], torch.full((2, 2), 0.1)]
    found = float(faithfulness(deltas, weights))
    assert found == pytest.approx((0.25 + 0.01 + 0.01) / 3)  # of zeros: per entry


# ---------------------------------------------------------------------------- merged pass


def attacked(shape=(400, 50)):
    g = torch.zeros(*shape, LAYOUT.total)
    ones = torch.full((*shape, LAYOUT.total), 2.0), torch.full((*shape, 2), 2.0)
    return SourceMasks(g, *ones)


def test_a_merged_pass_attacks_whole_positions_with_the_given_probability():
    masks = mixed(attacked(), 0.3, LAYOUT, "subset", generator())
    coin = masks.components[..., 0] == 2.0
    assert coin.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert (masks.components == 2.0).eq(coin[..., None]).all()
    assert (masks.delta == 2.0).eq(coin[..., None]).all()
    assert masks.routed[coin].all()  # the adversary masks every site
    # A subset of two sites: one is routed with probability 1/2 + 1/4.
    assert masks.routed[~coin].float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert mixed(attacked((2, 2)), 0.5, LAYOUT, "all", generator()).routed is None


def test_a_merged_pass_that_attacks_everywhere_is_the_adversarial_pass(tokens):
    both = [stepper(), stepper(**{"adversary.merge": 1.0})]
    alone, merged = (s.step(tokens[:4], 0)[0] for s in both)
    torch.testing.assert_close(merged["merged"], alone["adversarial"])
    assert "stochastic" not in merged
    assert both[1].coefficients["merged"] == 1.5
    assert both[1].attack == 1.5


def test_without_an_adversary_there_is_nothing_to_merge(tokens):
    one = stepper(**{"adversary.merge": 0.5, "adversary.coefficient": 0.0})
    losses, _ = one.step(tokens[:4], 0)
    assert "merged" not in losses
    assert one.coefficients["stochastic"] == 1.0


def test_the_gradient_of_a_merged_pass_reaches_the_sources(tokens):
    one = stepper(**{"adversary.merge": 0.5, "adversary.lr_warmup": 0.0, "adversary.restart": 0})
    one.step(tokens[:4], 1)
    before = one.adversary.sources.components.detach().clone()
    one.step(tokens[4:8], 2)
    assert (one.adversary.sources.components != before).float().mean() > 0.3


def test_mixed_routing_is_all_sites_at_every_second_position():
    shape = (300, 100, 5)
    mixed_sites = routed("mixed", shape, CPU, generator())
    subset = routed("subset", shape, CPU, generator())
    assert routed("all", shape, CPU, generator()) is None
    whole = [float(r.all(-1).float().mean()) for r in (subset, mixed_sites)]
    assert whole[0] == pytest.approx(1 / 5, abs=0.01)  # k is uniform in 1 ... 5
    assert whole[1] == pytest.approx(0.5 + 0.5 / 5, abs=0.01)
    some = mixed_sites[~mixed_sites.all(-1)]
    assert some.float().mean().item() == pytest.approx(0.5, abs=0.01)


# ----------------------------------------------------------------------------------- pools


def pool(size=3, **changes):
    own = AdversaryConfig(scope="pool", pool=size, **changes)
    return PersistentAdversary(own, LAYOUT, (2, 5), CPU, generator())


def test_every_position_has_a_set_of_its_sequence_s_pool():
    adversary = pool()
    assert adversary.sources.components.shape == (2, 3, 7)
    adversary.draw((2, 5))
    masks = adversary.masks(torch.zeros(2, 5, 7))
    for row in range(2):
        sets = adversary.sources.components[row].detach()
        for position in range(5):
            which = adversary.chosen[row, position].argmax()
            assert torch.equal(masks.components[row, position], sets[which])
            assert torch.equal(masks.delta[row, position], adversary.sources.delta[row, which])
    first = adversary.chosen
    adversary.draw((2, 5))
    assert not torch.equal(first, adversary.chosen)


def test_a_set_s_gradient_is_the_sum_over_the_positions_that_have_it():
    adversary = pool()
    adversary.draw((2, 5))
    adversary.masks(torch.zeros(2, 5, 7)).components.sum().backward()
    expected = adversary.chosen.sum(1)[..., None].expand(2, 3, 7)
    torch.testing.assert_close(adversary.sources.components.grad, expected)


def test_a_pool_of_one_is_a_set_per_sequence(tokens):
    runs = [stepper(**{"adversary.scope": s, "adversary.pool": 1}) for s in ("pool", "sequence")]
    for one in runs:
        # The pool draws which set a position has; with the same masks afterwards.
        one.adversary = one.new_adversary((4, 8))
        one.adversary.draw((4, 8))
    sources = runs[1].adversary.sources
    with torch.no_grad():
        for mine, theirs in zip(
            runs[0].adversary.leaves(), runs[1].adversary.leaves(), strict=True
        ):
            mine.copy_(theirs)
    g = torch.rand(4, 8, sources.components.shape[-1], generator=generator())
    pooled, shared = (one.adversary.masks(g).computed() for one in runs)
    torch.testing.assert_close(pooled.components, shared.components)


def test_a_pool_needs_positions():
    adversary = pool()
    with pytest.raises(ConfigError, match="positions of a sequence"):
        adversary.draw((2,))


# ------------------------------------------------------------------- importance function


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_causal_importance_does_not_read_the_future(causal, padded, tokens):
    model = tiny_bridge()
    importance = CausalImportanceConfig(**IMPORTANCE, causal=causal)
    attach(model, n_subcomponents=6, importance=importance)
    rows = tokens[:3].clone()
    kwargs = {}
    if padded:
        kwargs["attention_mask"] = torch.ones(3, 8).long()
        kwargs["attention_mask"][0, 6:] = 0
    before = model.vpd.causal_importance(rows, **kwargs)
    rows[:, 5] = (rows[:, 5] + 1) % 29
    after = model.vpd.causal_importance(rows, **kwargs)
    moved = (before - after).abs().amax(-1)
    assert moved[:, 5].min() > 0
    assert bool(moved[:, :5].eq(0).all()) == causal
    if causal:  # and it is what the shorter sequence has
        short = model.vpd.causal_importance(rows[:, :4])
        torch.testing.assert_close(after[:, :4], short, atol=1e-5, rtol=1e-4)


def test_conditioning_is_its_formula():
    own = Conditioning(7).double()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(torch.randn(7, generator=generator(parameter.numel())))
    h = torch.randn(4, 7, dtype=torch.float64, generator=generator(), requires_grad=True)

    def sigma(x):
        return torch.where(x < 0, 0.01 * x, torch.where(x > 1, 1 + 0.01 * (x - 1), x))

    up = own.weight_up * sigma(own.scale_up * h + own.shift_up)
    down = own.weight_down * sigma(-own.scale_down * h + own.shift_down)
    torch.testing.assert_close(own(h), up + down + own.bias)
    assert torch.autograd.gradcheck(two_sided_leaky, (h + 0.003,))


def test_conditioning_is_calibrated_once_to_the_largest_activations():
    own = Conditioning(2)
    acts = torch.stack([torch.linspace(-4, 2, 2001), torch.zeros(2001)], -1)
    own.calibrate(acts)
    quantile = acts[:, 0].abs().quantile(0.999)
    assert float(own.scale_up[0]) == pytest.approx(1 / float(quantile), rel=1e-3)
    assert float(own.scale_down[1]) == 1.0  # it is never active
    before = own.scale_up.clone()
    own.calibrate(10 * acts)
    assert torch.equal(own.scale_up, before)


def test_a_conditioned_function_teaches_v_and_is_folded_saved_and_loaded(tokens, tmp_path):
    changes = {"importance.conditioning": True, "importance.reads": "blocks"}
    model = tiny_bridge()
    one = stepper(model, **changes)
    one.step(tokens[:4], 0)
    assert one.vpd.importance.conditioning.scale_up.min() > 0
    _, inputs = one.vpd.target(tokens[:4])
    # Only conditioning lets the importances depend on V.
    (gradient,) = torch.autograd.grad(
        one.vpd.pre_importance(inputs).sum(), [one.vpd.subcomponents.v[0]]
    )
    assert gradient.abs().max() > 0
    before = one.vpd.causal_importance(tokens[:4])
    folder = one.vpd.save(tmp_path / "saved")
    again = load(folder, tiny_bridge()).vpd
    torch.testing.assert_close(again.causal_importance(tokens[:4]), before)
    keep = Columns(one.vpd.layout.sizes, [[0, 2, 5]] * 12, CPU)
    fold(one.vpd, keep)
    torch.testing.assert_close(one.vpd.causal_importance(tokens[:4]), before[..., keep.joined])
    unfold(one.vpd)
    after = one.vpd.causal_importance(tokens[:4])
    torch.testing.assert_close(after[..., keep.joined], before[..., keep.joined])
    gone = torch.ones(72, dtype=torch.bool)
    gone[keep.joined] = False
    assert after[..., gone].max() == 0


def test_a_function_of_the_stream_reads_the_first_site_of_every_block(tokens):
    names = ("blocks.0.mlp.in", "blocks.0.mlp.out", "blocks.2.attn.q", "unembed")
    assert first_of_each_block(names) == [0, 2, 3]
    one = stepper(**{"importance.reads": "blocks"})
    assert one.vpd.importance.project_in.in_features == 2 * 16
    _, inputs = one.vpd.target(tokens[:2])
    z = one.vpd.pre_importance(inputs)
    others = [x if i in (0, 6) else torch.zeros_like(x) for i, x in enumerate(inputs)]
    assert torch.equal(one.vpd.pre_importance(others), z)


# --------------------------------------------------------------------------------- counts


def matrix(*singular_values):
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator()))[0]
    values = torch.zeros(16)
    values[: len(singular_values)] = torch.tensor(singular_values)
    return (basis * values) @ basis.T


def test_the_numerical_rank_holds_99_percent_of_the_energy():
    assert numerical_rank(matrix(3.0, 2.0, 1.0)) == 3
    assert numerical_rank(matrix(10.0, 1.1, 0.1)) == 2  # 100 of 101.2 is less than 99 %
    assert numerical_rank(matrix(10.0, 0.9, 0.1)) == 1
    assert numerical_rank(matrix(10.0, 0.9, 0.1), share=0.99995) == 3
    assert numerical_rank(torch.zeros(3, 4)) == 0


def test_counts_follow_the_rank_and_tiny_matrices_are_not_rounded_up():
    toy = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 1))
    with torch.no_grad():
        toy[0].weight.copy_(matrix(3.0, 2.0, 1.0))
    options = {"importance": CausalImportanceConfig(kind="mlp"), "example": torch.zeros(2, 16)}
    attach(toy, n_subcomponents="2x-rank", **options)
    assert toy.vpd.layout.sizes == (6, 2)
    toy = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 1))
    attach(toy, n_subcomponents="faithful", **options)
    assert toy.vpd.layout.sizes == (24, 2)  # 4/3 of 16 and of 1, from 8 on in steps of 8


# ----------------------------------------------------------------------------------- price


def test_a_coefficient_can_be_a_multiple_of_the_worst_divergence(tokens):
    one = stepper(**{"minimality.relative": True, "minimality.coefficient": 2e-3})
    one.step(tokens[:4], 0)
    output, _ = one.vpd.target(tokens[:4])
    with one.vpd.masked("zero"):
        ablated = one.vpd.model(tokens[:4])
    p = output.log_softmax(-1)
    cost = (p.exp() * (p - ablated.log_softmax(-1))).sum(-1).mean()
    blind = (p.exp() * (p - p.exp().mean((0, 1)).log())).sum(-1).mean()
    worst = torch.minimum(cost, blind)
    torch.testing.assert_close(one.price.worst, worst, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.price.coefficient, 2e-3 * worst, rtol=1e-4, atol=1e-9)


def test_the_price_falls_while_too_much_is_lost_and_rises_while_too_little_is():
    for divergence, sign in ((0.5, -1), (0.02, 1)):
        price = Price(MinimalityConfig(tolerance=0.1, slack=1.0, rate=10.0), CPU)
        price.see(torch.tensor(divergence), 0, 100)
        change = float(price.coefficient.log() - math.log(2e-4))
        assert change == pytest.approx(0.1 * math.log(0.1 / divergence), rel=1e-4)
        assert math.copysign(1, change) == sign


def test_without_a_tolerance_the_price_stays():
    price = Price(MinimalityConfig(), CPU)
    price.see(torch.tensor(9.0), 0, 100)
    assert float(price.coefficient) == pytest.approx(2e-4)


def test_the_price_keeps_a_model_that_follows_it_at_the_tolerance():
    """A stand-in for training: the divergence follows the coefficient, with some delay."""
    own = MinimalityConfig(tolerance=0.1, coefficient=1.0, slack=1.0)
    price, divergence = Price(own, CPU), 1.0
    for step in range(2000):
        divergence += 0.02 * (0.03 * float(price.coefficient) ** 0.5 - divergence)
        price.see(torch.tensor(divergence), step, 2000)
    assert divergence == pytest.approx(0.1, rel=0.05)


def test_what_is_allowed_ends_at_the_tolerance():
    assert allowance(0.0, 4.0) == 4.0
    assert allowance(0.4, 4.0) == pytest.approx(2.0)
    assert allowance(0.8, 4.0) == allowance(1.0, 4.0) == 1.0


# ----------------------------------------------------------------------------- everything

EVERYTHING = {
    "adversary.merge": 0.5,
    "adversary.scope": "pool",
    "adversary.pool": 2,
    "minimality.penalty": "smooth_l0",
    "minimality.half_life": 5.0,
    "minimality.reference": 1000,
    "minimality.tolerance": 0.1,
    "minimality.relative": True,
    "faithfulness.relative": True,
    "importance.causal": True,
    "importance.conditioning": True,
    "importance.reads": "blocks",
}


def test_a_run_with_everything_resumes_bit_identically(tokens, tmp_path):
    cfg = config(**EVERYTHING, steps=6, checkpoint_every=3, log_every=1)

    def run(folder, **options):
        model = tiny_bridge()
        return train(model, tokens, cfg, output=folder, progress=False, **options), model.vpd

    (whole, expected) = run(tmp_path / "whole")

    class Stop(Exception):
        pass

    original = Stepper.step

    def stopping(self, batch, step, real=None):
        if step == 4:
            raise Stop
        return original(self, batch, step, real)

    Stepper.step = stopping
    try:
        with pytest.raises(Stop):
            run(tmp_path / "cut")
    finally:
        Stepper.step = original
    resumed, got = run(tmp_path / "cut", resume=True)
    assert all(map(torch.equal, got.parameters(), expected.parameters()))
    assert resumed.metrics["coefficient"] == whole.metrics["coefficient"]


def test_the_recent_preset_is_the_authors_later_recipe():
    recent = VPDConfig.recent()
    assert recent.minimality.penalty == "smooth_l0"
    assert recent.adversary.scope == "pool"
    total = recent.adversary.coefficient + recent.stochastic.coefficient
    assert total == pytest.approx(1)
    assert recent.adversary.coefficient / total == pytest.approx(recent.adversary.merge)
    assert recent.minimality.coefficient * recent.minimality.frequency == pytest.approx(4.2e-5)
    assert VPDConfig.from_mapping({"preset": "recent"}) == recent
    model = tiny_bridge()
    small = {"d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 32}
    decompose(model, config=recent.replaced({f"importance.{k}": v for k, v in small.items()}))
    assert model.vpd.importance.causal
