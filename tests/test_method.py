"""The mathematics of the method: sigmoids, masks, routing, losses, adversary, schedules."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_bridge
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vpd_lens.config import AdversaryConfig, MinimalityConfig, OptimiserConfig
from vpd_lens.decomposition import CausalImportanceConfig, Divergence, Layout
from vpd_lens.decomposition.adversary import ascend, shared_sources
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.importance import (
    GlobalMLP,
    PerSubcomponentMLP,
    SharedMLP,
    VectorMLP,
    build_importance,
    lower_leaky,
    sized_importance,
    upper_leaky,
)
from vpd_lens.decomposition.masks import (
    Masks,
    Sources,
    interpolate,
    masked_site,
    uniform_k_subset,
    uniform_sources,
)
from vpd_lens.decomposition.subcomponents import Subcomponents, paper_count
from vpd_lens.sites.discovery import module_sites
from vpd_lens.training.adversary import PersistentAdversary
from vpd_lens.training.losses import (
    faithfulness,
    layerwise_reconstruction,
    stochastic_reconstruction,
)
from vpd_lens.training.minimality import Power, minimality, penalty, penalty_sum
from vpd_lens.training.optimiser import adversary_lr, learning_rate


@pytest.mark.parametrize(
    ("z", "upstream", "expected"),
    [
        (-1.0, 1.0, 0.0),
        (-1.0, -1.0, -0.01),
        (0.0, 1.0, 0.0),
        (0.0, -1.0, -0.01),
        (0.5, 3.0, 3.0),
        (0.5, -3.0, -3.0),
        (1.0, 2.0, 2.0),
        (1.5, 2.0, 0.0),
        (1.5, -2.0, 0.0),
    ],
)
def test_lower_leaky_gradient(z, upstream, expected):
    x = torch.tensor([z], requires_grad=True)
    y = lower_leaky(x)
    assert 0 <= y.item() <= 1
    assert y.item() == min(max(z, 0), 1)
    y.backward(torch.tensor([upstream]))
    assert x.grad.item() == pytest.approx(expected)


def test_upper_leaky_values_and_slopes():
    x = torch.tensor([-2.0, 0.3, 1.0, 2.0], requires_grad=True)
    y = upper_leaky(x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.3, 1.0, 1.01]))
    y.sum().backward()
    torch.testing.assert_close(x.grad[[0, 1, 3]], torch.tensor([0.0, 1.0, 0.01]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.floats(0.3, 2.5))
def test_power_sum_matches_autograd(seed, p):
    generator = torch.Generator().manual_seed(seed)
    z = (torch.rand(3, 4, 7, generator=generator, dtype=torch.float64) * 3 - 1).requires_grad_()
    weight = torch.rand(7, generator=generator, dtype=torch.float64)
    plain = (upper_leaky(z) + 1e-12).pow(p).flatten(0, 1).sum(0)
    (expected,) = torch.autograd.grad((plain * weight).sum(), z)
    got = penalty_sum(z, Power(p))
    (gradient,) = torch.autograd.grad((got * weight).sum(), z)
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(gradient, torch.where(z > 0, expected, 0))


def test_minimality_oracle():
    ones = torch.ones(4, 1, 1)
    s = penalty_sum(ones, Power(0.7))
    assert float(minimality(s, 4, 0.5)) == pytest.approx(1 + 0.5 * math.log2(5))
    # The log sees the sum over the global batch: twice the positions, all at 1.
    assert float(minimality(2 * s, 8, 0.5)) == pytest.approx(1 + 0.5 * math.log2(9))


def test_faithfulness_is_one_global_mean():
    small, large = torch.ones(2, 5), torch.zeros(9, 10)
    assert float(faithfulness([small, large])) == pytest.approx(0.1)


def test_interpolate_is_between_importance_and_one_with_its_gradients():
    g = torch.rand(5, 7, dtype=torch.float64, requires_grad=True)
    r = torch.rand(5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(interpolate(g, r), g + (1 - g) * r)
    assert torch.equal(interpolate(g, torch.ones_like(r)), torch.ones_like(r))
    torch.testing.assert_close(interpolate(g, torch.zeros_like(r)), g)
    assert torch.autograd.gradcheck(interpolate, (g, r))
    shared = torch.rand(1, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(interpolate, (g, shared))


def test_sources_are_uniform_independent_and_reproducible():
    layout = Layout(("a", "b"), (3, 4))
    draws = [uniform_sources(torch.zeros(150, 101, 7), layout, _generator(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0].components, draws[1].components)
    assert not torch.equal(draws[0].components, draws[2].components)
    r = draws[0].components
    assert r.min() >= 0
    assert r.max() < 1
    share = torch.histc(r, 16, 0, 1) / r.numel()
    torch.testing.assert_close(share, torch.full((16,), 1 / 16), atol=3e-3, rtol=0)
    # Neighbours come from the same draw of 64 bits.
    correlation = torch.corrcoef(torch.cat([r, draws[0].delta], -1).flatten(0, 1).T)
    assert (correlation - torch.eye(9)).abs().max() < 0.03
    assert r.unique().numel() > 0.5 * 2**16


def test_uniform_k_subset_distribution():
    n_sites, n = 24, 40_000
    generator = torch.Generator().manual_seed(0)
    routed = uniform_k_subset((n, n_sites), torch.device("cpu"), generator)
    counts = routed.sum(-1)
    assert counts.min() >= 1
    assert routed.float().mean().item() == pytest.approx(25 / 48, abs=0.004)
    share = torch.bincount(counts, minlength=n_sites + 1)[1:] / n
    torch.testing.assert_close(share, torch.full((n_sites,), 1 / n_sites), atol=0.006, rtol=0)
    torch.testing.assert_close(
        routed.float().mean(0), torch.full((n_sites,), 25 / 48), atol=0.015, rtol=0
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("routing", [True, False])
def test_masked_site_equals_dense_weight_with_exact_gradients(bias, routing):
    torch.manual_seed(0)
    n, d_in, c, d_out = 6, 5, 9, 4
    options = {"dtype": torch.float64, "requires_grad": True}
    x = torch.randn(n, d_in, **options)
    w = torch.randn(d_in, d_out, dtype=torch.float64)
    b = torch.randn(d_out, dtype=torch.float64) if bias else None
    v, u = torch.randn(d_in, c, **options), torch.randn(c, d_out, **options)
    mask, delta = torch.rand(n, c, **options), torch.rand(n, 1, **options)
    routed = (torch.rand(n, 1) > 0.4) if routing else None

    def fast(x, v, u, mask, delta):
        y = x @ w if b is None else x @ w + b
        return masked_site(x, y, v, u, Masks(mask, delta, routed), b)

    def dense(x, v, u, mask, delta):
        parts = torch.einsum("ic,nc,co->nio", v, mask, u) + delta[..., None] * (w - v @ u)
        if routed is not None:
            parts = torch.where(routed[..., None], parts, w)
        y = torch.einsum("ni,nio->no", x, parts)
        return y if b is None else y + b

    arguments = (x, v, u, mask, delta)
    torch.testing.assert_close(fast(*arguments), dense(*arguments))
    upstream = torch.randn(n, d_out, dtype=torch.float64)
    got = torch.autograd.grad(fast(*arguments), arguments, upstream)
    expected = torch.autograd.grad(dense(*arguments), arguments, upstream)
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_masks_of_another_number_of_sites_are_refused():
    layout = Layout(("a", "b"), (2, 3))
    for n in (1, 3):
        with pytest.raises(ValueError, match="zip"):
            Masks(torch.ones(4, 5), torch.ones(4, n)).per_site(layout)


def test_all_masks_c_scale_the_weight_by_c():
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 5), torch.randn(5, 4), torch.randn(4)
    masks = Masks(torch.full((3, 8), 0.3), torch.full((3, 1), 0.3), None)
    got = masked_site(x, x @ w + b, torch.randn(5, 8), torch.randn(8, 4), masks, b)
    torch.testing.assert_close(got, 0.3 * (x @ w) + b, atol=1e-6, rtol=1e-5)
    ones = Masks(torch.ones(3, 8), torch.ones(3, 1), None)
    y = x @ w + b
    assert torch.equal(masked_site(x, y, torch.randn(5, 8), torch.randn(8, 4), ones, b), y)


def test_kl_is_target_to_masked_in_nats_with_its_gradient(monkeypatch):
    torch.manual_seed(0)
    target = torch.randn(3, 4, 11)
    masked = torch.randn(3, 4, 11, requires_grad=True)
    log_p, log_q = target.log_softmax(-1), masked.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(expected, masked)
    for chunk in (2**26, 25):  # whole, and two rows at a time
        monkeypatch.setattr("vpd_lens.decomposition.divergence._CHUNK_ELEMENTS", chunk)
        divergence = Divergence(target)
        got = divergence(masked)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, masked)[0], gradient)
        torch.testing.assert_close(divergence.per_position(masked).mean(), expected)
    assert Divergence(target)(target).abs() < 1e-6


def test_kl_of_narrow_logits_is_exact_and_keeps_nothing_wide(monkeypatch):
    monkeypatch.setattr("vpd_lens.decomposition.divergence._CHUNK_ELEMENTS", 3 * 50)
    torch.manual_seed(0)
    target = (5 * torch.randn(4, 5, 50)).bfloat16()
    masked = (5 * torch.randn(4, 5, 50)).bfloat16().requires_grad_()
    divergence = Divergence(target)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        got = divergence(masked)
    held = [*kept, *(t for t in vars(divergence).values() if torch.is_tensor(t))]
    assert not any(t.dtype == torch.float32 and t.numel() >= target.numel() for t in held)
    wide = masked.detach().float().requires_grad_()
    expected = Divergence(target.float())(wide)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(got, masked)
    (wanted,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(gradient, wanted.bfloat16())


def test_adversary_first_step_is_the_learning_rate_and_ignores_the_scale_of_the_loss():
    layout = Layout(("a", "b"), (3, 2))
    config = AdversaryConfig(lr=0.01, eps=1e-2)
    moved = []
    for scale in (1.0, 1e-9):
        adversary = PersistentAdversary(config, layout, (2, 4), torch.device("cpu"), _generator(0))
        gradient = torch.randn(2, 4, 5, generator=_generator(1))
        components, delta = adversary.leaves()
        components.data.fill_(0.5)
        components.grad, delta.grad = gradient * scale, torch.zeros_like(delta)
        adversary.ascend(scale)
        moved.append(components.detach() - 0.5)
        expected = 0.01 * gradient / (gradient.abs() + 1e-2)
        torch.testing.assert_close(moved[-1], expected, atol=1e-6, rtol=1e-3)
        assert components.grad is None
    torch.testing.assert_close(*moved)


def test_adversary_stays_in_the_unit_interval():
    layout = Layout(("a",), (3,))
    adversary = PersistentAdversary(
        AdversaryConfig(lr=0.9), layout, (2, 4), torch.device("cpu"), _generator(0)
    )
    for _ in range(3):
        for leaf in adversary.leaves():
            leaf.grad = torch.ones_like(leaf)
        adversary.ascend(1.0)
    assert all(torch.equal(leaf, torch.ones_like(leaf)) for leaf in adversary.leaves())


@pytest.mark.parametrize(
    ("scope", "shape"),
    [("position", (2, 4)), ("sequence", (2, 1)), ("batch", (1, 4)), ("single", (1, 1))],
)
def test_adversary_scopes(scope, shape):
    layout = Layout(("a", "b"), (3, 2))
    adversary = PersistentAdversary(
        AdversaryConfig(scope=scope), layout, (2, 4), torch.device("cpu")
    )
    assert adversary.sources.components.shape == (*shape, 5)
    assert adversary.sources.delta.shape == (*shape, 2)
    masks = adversary.masks(torch.zeros(2, 4, 5))
    assert masks.computed().components.shape == (2, 4, 5)
    assert masks.delta.shape == (2, 4, 2)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_restarted_sources_are_new_and_have_no_memory(probability):
    layout = Layout(("a", "b"), (3, 2))
    config = AdversaryConfig(scope="sequence", restart=probability, lr=0.1)
    shape = (400, 4)
    adversary = PersistentAdversary(config, layout, shape, torch.device("cpu"), _generator(0))
    for leaf in adversary.leaves():
        leaf.grad = torch.ones_like(leaf)
    adversary.ascend(1.0)
    before = [leaf.detach().clone() for leaf in adversary.leaves()]
    adversary.restart()
    moved = [(a != b).all(-1) for a, b in zip(before, adversary.leaves(), strict=True)]
    assert torch.equal(moved[0], moved[1])
    assert moved[0].float().mean().item() == pytest.approx(probability, abs=0.08)
    for leaf in adversary.leaves():
        state = adversary.optimiser.state[leaf]
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            assert torch.equal((moment == 0).all(-1), moved[0])
        assert leaf.requires_grad


def test_pgd_reaches_the_corners_of_a_monotone_loss_and_records_its_curve():
    layout = Layout(("a", "b"), (3, 2))
    importance = torch.full((2, 4, 5), 0.25)

    def loss(masks):
        return masks.computed().components.sum() - masks.delta.sum()

    start = shared_sources(importance, layout, _generator(0))
    sources, curve = ascend(loss, importance, start, 20, 0.1, checkpoints=(0, 5, 20))
    assert torch.equal(sources.components, torch.ones(1, 1, 5))
    assert torch.equal(sources.delta, torch.zeros(1, 1, 2))
    assert curve[0] < curve[5] < curve[20] == pytest.approx(40.0)


def test_pgd_on_fp16_logits_moves_as_on_fp32_ones():
    """Also where a mean over the positions has gradients that fp16 rounds to 0."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(32768, 64, generator=generator)
    effect = 0.02 * torch.randn(12, 64, generator=generator)
    layout = Layout(("a",), (12,))
    start = shared_sources(torch.zeros(32768, 12), layout, generator)
    found = []
    for dtype in (torch.float16, torch.float32):
        distance = Divergence(target.to(dtype), "kl")

        def loss(masks, dtype=dtype, distance=distance):
            shift = masks.components.to(dtype) @ effect.to(dtype) * masks.delta.to(dtype)
            return distance(target.to(dtype) + shift)

        found.append(ascend(loss, torch.zeros(32768, 12), start, 3, 0.1)[0].components)
    assert torch.equal(*found)


def test_layerwise_is_the_mean_of_single_site_losses(model, tokens):
    attach(model, n_subcomponents=5)
    vpd = model.vpd
    output, inputs = vpd.target(tokens[:4])
    importance = lower_leaky(vpd.pre_importance(inputs))
    divergence = Divergence(output)

    def divergence_of(masks):
        return divergence(vpd.run(masks, tokens[:4]))

    got = layerwise_reconstruction(divergence_of, importance, vpd.layout, _generator(3))
    sources = uniform_sources(importance, vpd.layout, _generator(3))
    losses = []
    for index, name in enumerate(vpd.layout.names):
        masks = sources.masks(importance)
        own = {name: masks.components[..., vpd.layout.columns(name)]}
        with vpd.masked(own, delta={name: masks.delta[..., index]}):
            losses.append(divergence(model(tokens[:4])))
    torch.testing.assert_close(got, torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)


def test_stochastic_loss_averages_its_samples(model, tokens):
    attach(model, n_subcomponents=5)
    vpd = model.vpd
    importance = torch.rand(4, 8, vpd.layout.total)
    output, _ = vpd.target(tokens[:4])
    divergence = Divergence(output)

    def divergence_of(masks):
        return divergence(vpd.run(masks, tokens[:4]))

    generator = _generator(5)
    one_by_one = [
        stochastic_reconstruction(divergence_of, importance, vpd.layout, "subset", 1, generator)
        for _ in range(3)
    ]
    together = stochastic_reconstruction(
        divergence_of, importance, vpd.layout, "subset", 3, _generator(5)
    )
    torch.testing.assert_close(together, torch.stack(one_by_one).mean())


def test_schedules():
    cosine = OptimiserConfig(lr=1.0, final_fraction=0.1)
    assert learning_rate(cosine, 1.0, 0, 100) == pytest.approx(1.0)
    assert learning_rate(cosine, 1.0, 99, 100) == pytest.approx(0.1)
    warm = OptimiserConfig(lr=1.0, warmup=0.1)
    assert learning_rate(warm, 1.0, 0, 100) == 0
    assert learning_rate(warm, 1.0, 5, 100) == pytest.approx(0.5)
    assert learning_rate(warm, 1.0, 10, 100) == pytest.approx(1.0)
    adversary = AdversaryConfig(lr=0.01, lr_warmup=0.025)
    assert adversary_lr(adversary, 0, 400) == 0
    assert adversary_lr(adversary, 5, 400) == pytest.approx(0.005)
    assert adversary_lr(adversary, 400, 400) == 0.01
    own = MinimalityConfig()
    assert penalty(own, 0, 100) == Power(2.0)
    assert penalty(own, 100, 100).p == pytest.approx(0.4)
    assert penalty(own, 50, 100).p == pytest.approx(1.2)


def test_initialisation_scales():
    model = tiny_bridge(d_model=64, d_head=32, n_heads=2, d_mlp=128, n_layers=1)
    attach(model, n_subcomponents=400)
    for v, u in zip(model.vpd.subcomponents.v, model.vpd.subcomponents.u, strict=True):
        assert v.std().item() == pytest.approx(v.shape[0] ** -0.5, rel=0.05)
        assert u.std().item() == pytest.approx(400**-0.5, rel=0.05)


class TestImportanceFunctions:
    d_inputs, sizes = (6, 6, 10), (4, 5, 3)
    layout = Layout(("a", "b", "c"), sizes)

    @pytest.fixture
    def subcomponents(self):
        torch.manual_seed(0)
        sites = module_sites(nn.Sequential(*(nn.Linear(d, 3) for d in self.d_inputs)))
        return Subcomponents(sites, self.sizes)

    @pytest.fixture
    def inputs(self):
        generator = _generator(1)
        return [torch.randn(2, 7, d, generator=generator) for d in self.d_inputs]

    def test_transformer_sees_both_directions_and_ignores_scale(self, subcomponents, inputs):
        config = CausalImportanceConfig(d_model=16, n_blocks=2, n_heads=2, d_ffn=32)
        function = build_importance(config, self.d_inputs, self.layout, 8, 1)
        z = function(inputs, subcomponents)
        assert z.shape == (2, 7, 12)
        later = [x.clone() for x in inputs]
        later[0][:, -1] += 1
        moved = (function(later, subcomponents) - z).abs().amax((0, 2))
        assert (moved > 1e-5).all()  # the first position sees the last
        scaled = [x * s for x, s in zip(inputs, (3.0, 0.5, 10.0), strict=True)]
        torch.testing.assert_close(function(scaled, subcomponents), z, atol=1e-4, rtol=1e-4)
        alone = function([x[:1] for x in inputs], subcomponents)
        torch.testing.assert_close(alone, z[:1], atol=1e-5, rtol=1e-5)

    def test_transformer_position_enters_only_through_differences(self, subcomponents, inputs):
        config = CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2)
        function = build_importance(config, self.d_inputs, self.layout, 8, 1)
        same = [x[:1, :1].expand(1, 6, -1) for x in inputs]
        z = function(same, subcomponents)  # one vector everywhere: rotations cannot matter
        torch.testing.assert_close(z, z[:, :1].expand_as(z), atol=1e-5, rtol=1e-5)
        swapped = [x[:, [1, 0, *range(2, 7)]] for x in inputs]
        z, other = function(inputs, subcomponents), function(swapped, subcomponents)
        assert (other[:, [1, 0]] - z[:, :2]).abs().max() > 1e-4  # but order does matter

    def test_sizes_follow_the_target(self):
        function = build_importance(CausalImportanceConfig(), self.d_inputs, self.layout, 64, 2)
        assert function.project_in.out_features == 128
        assert len(function.blocks) == 2
        assert function.blocks[0].n_heads == 4
        assert function.blocks[0].up.out_features == 512

    def test_sizes_follow_the_matrices_that_are_served(self):
        """One matrix of a deep, wide model needs no function as deep and wide as the model."""
        layout = Layout(("blocks.10.mlp.in",), (768,))
        size = sized_importance(CausalImportanceConfig(), [(576, 576)], layout, 576)
        assert size.n_blocks == 1
        function = build_importance(size, [576], layout, 576, 30)
        own = 768 * (576 + 576)
        assert sum(p.numel() for p in function.parameters()) <= 5.01 * own
        wider = {"d_model": 32 * (size.n_heads + 1), "n_heads": size.n_heads + 1, "d_ffn": None}
        more = size.model_copy(update=wider).filled(576, 1)
        function = build_importance(more, [576], layout, 576, 30)
        assert sum(p.numel() for p in function.parameters()) > 5 * own  # as wide as it may be
        two = Layout(("blocks.0.attn.q", "blocks.0.attn.k", "blocks.3.attn.q"), (512,) * 3)
        size = sized_importance(CausalImportanceConfig(), [(64, 64)] * 3, two, 64)
        assert (size.n_blocks, size.d_model) == (2, 128)
        asked = CausalImportanceConfig(d_model=1152, n_blocks=30)
        assert sized_importance(asked, [(576, 576)], layout, 576).d_model == 1152

    def test_per_subcomponent_mlp_is_independent_per_subcomponent(self):
        torch.manual_seed(0)
        own = Subcomponents(module_sites(nn.Sequential(nn.Linear(5, 5))), (5,))
        own.v[0].data.copy_(torch.eye(5))  # activations are the input itself
        function = PerSubcomponentMLP(5, 16)
        x = torch.randn(3, 5)
        jacobian = torch.autograd.functional.jacobian(lambda a: function([a], own)[0], x)[:, 0]
        assert (jacobian * (1 - torch.eye(5))).abs().max() == 0
        assert jacobian.diagonal().abs().min() > 0

    def test_without_hidden_units_the_mlps_are_affine(self, subcomponents, inputs):
        """So that an importance is monotone in the activation, and cannot open on both signs."""
        torch.manual_seed(0)
        own = PerSubcomponentMLP(12, 0)
        expected = own.w * subcomponents.acts(inputs) + own.b
        torch.testing.assert_close(own(inputs, subcomponents), expected)
        shared = SharedMLP(self.d_inputs, self.sizes, 0)
        halves = [x / 2 for x in inputs]
        nothing = shared([0 * x for x in inputs], subcomponents)
        middle = (shared(inputs, subcomponents) + nothing) / 2
        torch.testing.assert_close(shared(halves, subcomponents), middle)

    def test_shared_mlp_reads_its_own_site_only(self, subcomponents, inputs):
        function = SharedMLP(self.d_inputs, self.sizes, 16)
        z = function(inputs, subcomponents)
        inputs[1] = inputs[1] + 1
        moved = (function(inputs, subcomponents) - z).abs().amax((0, 1)) > 0
        assert moved.tolist() == [False] * 4 + [True] * 5 + [False] * 3

    def test_vector_mlp_reads_the_whole_input_of_its_own_site(self, subcomponents, inputs):
        function = VectorMLP(self.d_inputs, self.sizes, (6, 5), _generator(0))
        z = function(inputs, subcomponents)
        assert z.shape == (2, 7, 12)
        with torch.no_grad():
            for v in subcomponents.v:
                v.zero_()
        assert torch.equal(function(inputs, subcomponents), z)  # V does not matter
        inputs[1] = inputs[1] + 1
        moved = (function(inputs, subcomponents) - z).abs().amax((0, 1)) > 0
        assert moved.tolist() == [False] * 4 + [True] * 5 + [False] * 3
        before = function(inputs, subcomponents)
        with torch.no_grad():
            function.mlps[1][0].weight[2] += 1  # the network of one subcomponent
        moved = (function(inputs, subcomponents) - before).abs().amax((0, 1)) > 0
        assert moved.nonzero().flatten().tolist() == [4 + 2]

    def test_global_mlp_reads_every_site(self, subcomponents, inputs):
        function = GlobalMLP(self.d_inputs, 12, 16, _generator(0))
        z = function(inputs, subcomponents)
        inputs[1] = inputs[1] + 1
        assert ((function(inputs, subcomponents) - z).abs().amax((0, 1)) > 0).all()


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def test_sources_masks_leave_the_delta_its_own_source():
    sources = Sources(torch.rand(1, 1, 3), torch.rand(1, 1, 2))
    masks = sources.masks(torch.rand(2, 4, 3))
    torch.testing.assert_close(masks.delta, sources.delta.expand(2, 4, 2))


@pytest.mark.parametrize(
    ("part", "shape", "count"),
    [
        ("attn.q", (4096, 4096), 2736),
        ("attn.k", (4096, 1024), 688),
        ("attn.v", (4096, 1024), 1368),
        ("attn.o", (4096, 4096), 5464),
        ("attn.v", (768, 768), 1024),
        ("mlp.out", (3072, 768), 3584),
    ],
)
def test_paper_s_counts_follow_what_all_heads_write(part, shape, count):
    """Of grouped keys and values there are as many as their width, not the residual's, asks for."""
    assert paper_count(SimpleNamespace(name=f"blocks.0.{part}", shape=shape)) == count
