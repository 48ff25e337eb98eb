"""The authors' later recipe, piece by piece, against its formulas (METHOD 11), and the price."""

import math

import pytest
import torch
from conftest import tiny_bridge
from hypothesis import given, settings
from hypothesis import strategies as st

from vpd_lens import VPDConfig, decompose, load, train
from vpd_lens.config import (
    AdversaryConfig,
    CausalImportanceConfig,
    LocalityConfig,
    MinimalityConfig,
    StochasticConfig,
)
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.conditioning import Conditioning, two_sided_leaky
from vpd_lens.decomposition.folding import Columns, fold, unfold
from vpd_lens.decomposition.importance import first_of_each_block, upper_leaky
from vpd_lens.decomposition.masks import Layout, SourceMasks, routed, uniform_sources
from vpd_lens.decomposition.ranks import ranks
from vpd_lens.errors import ConfigError
from vpd_lens.training import losses as losses_module
from vpd_lens.training.adversary import PersistentAdversary
from vpd_lens.training.locality import Locality, soft_count, units_of
from vpd_lens.training.log import Diagnostics, TrainingWarning
from vpd_lens.training.losses import (
    aggregate,
    faithfulness,
    mixed,
    squared_sizes,
    stochastic_reconstruction,
)
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
DRAWN_DONORS = losses_module._drawn_donors
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
    found = float(faithfulness(deltas, squared_sizes(weights)))
    assert found == pytest.approx((0.25 + 0.01 + 0.01) / 3)  # of zeros: per entry


def test_the_sizes_of_fixed_weights_are_computed_once(tokens, monkeypatch):
    one = stepper(**{"faithfulness.relative": True})
    expected = torch.stack([site.weight.square().sum() for site in one.vpd.sites])
    torch.testing.assert_close(one.sizes, expected)
    monkeypatch.setattr("vpd_lens.training.step.squared_sizes", None)
    losses, _ = one.step(tokens[:4], 0)
    assert losses["faithfulness"] > 0


# ------------------------------------------------------------------------------- locality


def written_out(directions, n_units, t):
    """The soft count of the formula, unit by unit."""
    counts = []
    for row in directions.tolist():
        size = len(row) // n_units
        squares = [
            sum(x * x for x in row[u * size : (u + 1) * size]) / sum(x * x for x in row)
            for u in range(n_units)
        ]
        counts.append((1 + t / n_units) * sum(f / (f + t / n_units) for f in squares))
    return torch.tensor(counts, dtype=directions.dtype)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n_units=st.sampled_from([1, 2, 6, 12]),
    threshold=st.floats(0.1, 10),
    length=st.floats(1e-6, 1e6),
)
def test_the_soft_count_is_its_formula_whatever_the_length(seed, n_units, threshold, length):
    directions = torch.randn(3, 12, dtype=torch.float64, generator=generator(seed))
    expected = written_out(directions, n_units, threshold)
    torch.testing.assert_close(soft_count(length * directions, n_units, threshold), expected)
    assert (expected <= (n_units + threshold) / (1 + threshold) + 1e-9).all()


def test_the_soft_count_s_gradient_is_that_of_finite_differences():
    directions = torch.randn(3, 12, dtype=torch.float64, generator=generator(), requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: soft_count(d, 4, 2.0), (directions,))


def test_one_unit_counts_1_some_equal_ones_about_their_number_and_none_0():
    directions = torch.zeros(4, 4096, requires_grad=True)
    with torch.no_grad():
        for row, n in enumerate((1, 10, 30)):
            directions[row, :n] = 1e-3
    counts = soft_count(directions, 4096, 2.0)
    assert counts.tolist() == pytest.approx([1, 10, 30, 0], rel=0.02)
    counts.sum().backward()
    assert directions.grad[3].eq(0).all()
    heads = torch.zeros(2, 32)
    heads[0, 8:16], heads[1, [0, 9, 17, 25]] = 1.0, 1.0  # one of four heads, and all of them
    assert soft_count(heads, 4, 1e-3).tolist() == pytest.approx([1, 4], rel=0.01)


@pytest.mark.parametrize("kind", ["bridge", "grouped", "hooked", "single"])
def test_locality_is_a_mean_over_neurons_and_one_over_heads(kind):
    from compat.builders import has_hooked_transformer, hooked, native

    if kind == "hooked" and not has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    make = {
        "bridge": tiny_bridge,
        "grouped": lambda: native("grouped"),
        "hooked": lambda: hooked("rms"),
        "single": lambda: tiny_bridge(n_heads=1, d_head=16),
    }
    model = make[kind]()
    attach(model, n_subcomponents={"attn.q": 3, "mlp.in": 5, ".": 6})
    vpd, cfg = model.vpd, model.cfg
    neurons, heads = [], []
    for name in vpd.layout.names:
        part = name.rpartition(".")[2]
        directions = (vpd.v(name).T if part in ("o", "out") else vpd.u(name)).double()
        if ".mlp." in name:
            neurons.append(written_out(directions, cfg.d_mlp, 8 - 6 * 0.5))
            continue
        n_heads = vpd.sites[vpd.layout.names.index(name)].shape[part != "o"] // cfg.d_head
        heads.append(cfg.n_heads / n_heads * written_out(directions, n_heads, 8 - 6 * 0.5))
    expected = torch.cat(neurons).mean() + torch.cat(heads).mean()
    own = Locality(LocalityConfig(coefficient=1.0), vpd)
    torch.testing.assert_close(own(0.5).double(), expected.detach(), rtol=1e-5, atol=0)
    if kind == "single":
        torch.testing.assert_close(torch.cat(heads), torch.ones(len(torch.cat(heads))).double())


def test_training_with_locality_lowers_the_count_and_compacts(tokens, tmp_path):
    changes = {"steps": 12, "log_every": 1, "compaction.window": 4, "compaction.threshold": 0.5}
    changes |= {"optimiser.kind": "adamw", "optimiser.lr": 0.05, "faithfulness.coefficient": 1.0}
    cfg = config(**changes, initialisation="random")
    ends = []
    for coefficient in (0.0, 10.0):
        model = tiny_bridge()
        run = cfg.replaced({"locality.coefficient": coefficient})
        result = train(model, tokens, run, output=tmp_path / f"{coefficient}", progress=False)
        ends.append(Locality(LocalityConfig(threshold_end=2.0), model.vpd)(1.0).item())
        assert ("locality" in result.metrics) == (coefficient > 0)
    assert ends[1] < 0.8 * ends[0]
    assert model.vpd.layout.total < 72  # something was folded on the way
    assert result.metrics["locality"] == pytest.approx(ends[1], rel=0.1)


def test_without_a_coefficient_locality_is_never_computed(tokens):
    one = stepper()
    losses, _ = one.step(tokens[:4], 0)
    assert one.locality is None
    assert "locality" not in losses


def test_locality_needs_neurons_or_heads():
    toy = torch.nn.Sequential(torch.nn.Linear(4, 4))
    importance = CausalImportanceConfig(kind="mlp")
    attach(toy, n_subcomponents=4, importance=importance, example=torch.zeros(2, 4))
    assert units_of(toy.vpd, 0) is None
    with pytest.raises(ConfigError, match=r"locality.coefficient=1, but none .*\(0\)"):
        Stepper(toy.vpd, config(**{"locality.coefficient": 1.0}))


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


# ---------------------------------------------------------------------------------- donors


def drawn(shape=(5, 40), seed=0, **changes):
    """Importances at 0 and between 0.05 and 1, and uniform masks over them."""
    g = torch.rand(*shape, LAYOUT.total, generator=generator(seed))
    g = torch.where(g < 0.8, 0.0, g).mul(0.95).add(0.05)
    masks = uniform_sources(g, LAYOUT, generator(seed)).over(g)
    masks.routed = routed("subset", masks.delta.shape, CPU, generator(seed))
    return masks


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_donors_masks_are_a_brute_force_union(share, padded, monkeypatch):
    seen = {}

    def spy(*args):
        seen["attacked"], seen["donors"] = DRAWN_DONORS(*args)
        return seen["attacked"], seen["donors"]

    monkeypatch.setattr(losses_module, "_drawn_donors", spy)
    masks, before = drawn(), drawn()
    real = None
    if padded:
        real = torch.ones(5, 40, dtype=torch.bool)
        real[0, 3:] = real[3, 20:] = False
    aggregate(masks, share, real, generator())
    attacked, donors = seen["attacked"].tolist(), seen["donors"]
    assert len(set(attacked)) == len(attacked) == math.ceil(share * 200)
    needs = before.importance.flatten(0, 1) > 0.1
    got, old, g = masks.computed(), before.computed(), before.importance.flatten(0, 1)
    numbers = []
    for row in range(200):
        same = [t.flatten(0, 1)[row] for t in (got.components, got.delta, got.routed)]
        if row not in attacked:
            kept = [t.flatten(0, 1)[row] for t in (old.components, old.delta, old.routed)]
            assert all(map(torch.equal, same, kept))
            continue
        place = attacked.index(row)
        numbers.append(
            int(sum(round(len(attacked) * (1 - math.log(i + 1, 65))) > place for i in range(64)))
        )
        own = donors[: numbers[-1], place]
        assert row not in own
        assert real is None or real.flatten()[own].all()
        union = needs[own].any(0)
        assert torch.equal(same[0], torch.where(union, 1.0, g[row]))
        assert same[1].eq(0).all()
        assert same[2].all()
    if share == 1:  # log-uniform: as many from 1 to 8 as from 8 to 64
        assert min(numbers) == 1
        assert 48 <= max(numbers) <= 64
        assert sum(n < 8 for n in numbers) == pytest.approx(100, abs=5)


def test_every_other_real_position_is_a_donor_equally_often():
    real = torch.tensor([[True] * 6 + [False] * 2])
    counts = torch.zeros(8, 8)
    for seed in range(300):
        attacked, donors = DRAWN_DONORS(8, 1.0, real, CPU, generator(seed))
        for place, row in enumerate(attacked.tolist()):
            counts[row] += torch.bincount(donors[:, place], minlength=8)
    shares = counts / counts.sum(1, keepdim=True)
    assert shares[:, 6:].eq(0).all()
    assert shares[:6, :6].diagonal().eq(0).all()
    others = shares[:6, :6][~torch.eye(6, dtype=torch.bool)]
    torch.testing.assert_close(others, torch.full((30,), 0.2), atol=0.02, rtol=0)


def test_a_lonely_position_has_nobody_but_itself():
    for real in (torch.tensor([[True, False, False]]), torch.zeros(1, 3, dtype=torch.bool)):
        _, donors = DRAWN_DONORS(3, 1.0, real, CPU, generator())
        assert donors.eq(0).all()


def test_the_gradient_of_an_attacked_position_reaches_its_own_importances():
    masks = drawn((2, 3))
    g = masks.importance.requires_grad_()
    aggregate(masks, 1.0, None, generator())
    (gradient,) = torch.autograd.grad(masks.computed().components.sum(), g)
    assert torch.equal(gradient, 1 - masks.components)


def test_a_share_of_no_donors_changes_nothing_bit_for_bit(tokens, monkeypatch):
    monkeypatch.setattr(losses_module, "aggregate", None)  # never called
    g = torch.rand(3, 4, LAYOUT.total, generator=generator())
    found = []
    mask = lambda masks: found.append(masks) or masks.delta.sum()  # noqa: E731
    stochastic_reconstruction(mask, g, LAYOUT, "subset", 1, generator())
    expected = uniform_sources(g, LAYOUT, random := generator()).over(g)
    assert torch.equal(found[0].components, expected.components)
    assert torch.equal(found[0].routed, routed("subset", (3, 4, 2), CPU, random))
    stepper(**{"adversary.merge": 0.5}).step(tokens[:4], 0)


def test_donors_act_in_the_merged_pass_where_the_adversary_does_not():
    g = attacked()
    masks = mixed(g, 0.3, LAYOUT, "subset", generator(), donors=0.5)
    adversary = masks.components[..., 0] == 2.0
    assert adversary.float().mean().item() == pytest.approx(0.3, abs=0.01)
    donors = masks.delta.eq(0).all(-1)  # all importances are 0: the unions are empty
    assert donors.float().mean().item() == pytest.approx(0.7 * 0.5, abs=0.01)
    assert masks.components[donors].eq(0).all()
    assert masks.routed[donors].all()
    assert mixed(attacked((2, 2)), 0.5, LAYOUT, "all", generator(), donors=0.5).routed is None


@pytest.mark.parametrize("merge", [0.0, 0.5])
def test_training_with_donors_sees_other_masks(merge, tokens):
    losses = []
    for donors in (0.0, 0.5):
        one = stepper(**{"adversary.merge": merge, "stochastic.donors": donors})
        losses.append(one.step(tokens[:4], 0)[0]["merged" if merge else "stochastic"])
    assert losses[0] != losses[1]


def test_donors_without_a_pass_are_refused():
    with pytest.raises(ConfigError, match=r"stochastic.donors=0.1 .* there is neither"):
        VPDConfig(stochastic=StochasticConfig(coefficient=0.0, donors=0.1))
    merged = AdversaryConfig(merge=0.5)
    VPDConfig(stochastic=StochasticConfig(coefficient=0.0, donors=0.1), adversary=merged)


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


def test_a_pool_has_no_more_sets_than_positions():
    pool(size=5)
    with pytest.raises(ConfigError, match=r"adversary.pool=6 .* the 5 positions"):
        pool(size=6)


# ------------------------------------------------------------------- importance function


def test_a_causal_importance_is_refused_for_an_encoder():
    importance = CausalImportanceConfig(**IMPORTANCE, causal=True)
    model = tiny_bridge(attention_dir="bidirectional")
    with pytest.raises(ConfigError, match=r"importance.causal=True .* is an encoder"):
        attach(model, n_subcomponents=6, importance=importance)
    attach(model, n_subcomponents=6, importance=CausalImportanceConfig(**IMPORTANCE))
    causal = tiny_bridge()
    causal.adapter.supports_generation = False  # all that BERT's says
    with pytest.raises(ConfigError, match="is an encoder"):
        attach(causal, n_subcomponents=6, importance=importance)


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


def test_rank99_holds_99_percent_of_the_energy_and_rank_is_torchs():
    for values, rank99 in [
        ((3.0, 2.0, 1.0), 3),
        ((10.0, 1.1, 0.1), 2),  # 100 of 101.2 is less than 99 %
        ((10.0, 0.9, 0.1), 1),
    ]:
        weight = matrix(*values)
        assert ranks(weight) == (3, rank99)
        assert ranks(weight).rank == torch.linalg.matrix_rank(weight)
    assert ranks(torch.zeros(3, 4)) == (0, 0)
    assert ranks(torch.zeros(3, 4, device="meta")) is None


def test_the_sites_are_printed_with_their_ranks_and_the_handle_without():
    model = decompose(tiny_bridge(), n_subcomponents={r"mlp\.in": 7, "": 5})
    vpd = model.vpd
    with torch.no_grad():
        vpd.sites[0].weight[:, 1:] = 0
    assert "\n" not in repr(vpd)
    assert "ranks" not in vars(vpd)  # no singular value was computed
    sizes = [
        sum(p.numel() for p in part.parameters()) for part in (vpd.subcomponents, vpd.importance)
    ]
    assert "V and U have {:,} parameters, the causal importance function {:,}".format(*sizes) in (
        " ".join(str(vpd).split())
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in str(vpd).splitlines()]
    assert ["blocks.0.attn.q", "16 x 16", "5", "1", "1"] in rows
    assert ["blocks.0.mlp.in", "16 x 24", "7", "16"] in [row[:4] for row in rows]


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


METRICS = {"l0": 5.0, "ci_max": 1.0, "grad_norm/importance": 1.0, "worst": 2.0}


@pytest.mark.parametrize("relative", [False, True])
def test_a_tolerance_that_the_subcomponents_alone_exceed_is_warned_of(relative, recwarn):
    own = MinimalityConfig(tolerance=0.1, relative=relative)
    allowed = 0.2 if relative else 0.1
    reachable = METRICS | {"unmasked": 0.99 * allowed}
    Diagnostics(72, 100, own).look(60, METRICS)
    Diagnostics(72, 100, own).look(60, reachable)
    Diagnostics(72, 100).look(60, METRICS | {"unmasked": 9.0})
    assert not recwarn.list
    with pytest.warns(TrainingWarning, match=r"minimality.tolerance=0.1 .* are at 0.4"):
        Diagnostics(72, 100, own).look(60, METRICS | {"unmasked": 0.4})


def test_training_measures_once_what_no_tolerance_can_be_below(tokens, tmp_path):
    # One subcomponent per matrix explains nearly nothing.
    changes = {"minimality.tolerance": 1e-4, "n_subcomponents": 1, "log_every": 10, "steps": 40}
    model = tiny_bridge()
    with pytest.warns(TrainingWarning, match=r"step 30: minimality.tolerance=0.0001"):
        found = train(
            model, tokens, config(**changes), output=tmp_path / "run", progress=False
        ).history
    assert ["unmasked" in line for line in found] == [False, False, True, True]
    one = stepper(**{"minimality.tolerance": 0.1, "micro_batches": 2})
    one.config = one.config.replaced({"steps": 1})
    with one.vpd.masked("unmasked"):
        alone = one.vpd.model(tokens[:4])
    p = one.vpd.target(tokens[:4])[0].log_softmax(-1)
    one.step(tokens[:4], 0)
    expected = (p.exp() * (p - alone.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(one.price.unmasked, expected, rtol=1e-4, atol=1e-6)


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
    "locality.coefficient": 1e-3,
    "stochastic.donors": 0.2,
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

    def stopping(self, batch, step, *rest):
        if step == 4:
            raise Stop
        return original(self, batch, step, *rest)

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
    own = recent.locality
    assert (own.coefficient, own.threshold_start, own.threshold_end) == (3e-5, 8.0, 2.0)
    assert VPDConfig.from_mapping({"preset": "recent"}) == recent
    model = tiny_bridge()
    small = {"d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 32}
    decompose(model, config=recent.replaced({f"importance.{k}": v for k, v in small.items()}))
    assert model.vpd.importance.causal
