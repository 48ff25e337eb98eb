"""Compiled masked forwards: the step's numbers to rounding, on both model classes."""

import shutil
import warnings

import pytest
import torch
from conftest import tiny_bridge

from vpd_lens.decomposition import CausalImportanceConfig
from vpd_lens.decomposition.attach import attach
from vpd_lens.training import VPDConfig, forwards
from vpd_lens.training.step import Stepper

IMPORTANCE = CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2, d_ffn=32)


def hooked_transformer():
    lens = pytest.importorskip("transformer_lens")
    if not hasattr(lens, "HookedTransformer"):
        pytest.skip("this TransformerLens has no HookedTransformer")
    cfg = lens.HookedTransformerConfig(
        n_layers=1, d_model=16, n_ctx=12, d_head=8, n_heads=2, d_mlp=24, d_vocab=29, act_fn="gelu",
        normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=8, seed=0,
        device="cpu",
    )  # fmt: skip
    return lens.HookedTransformer(cfg).eval()


def stepper(model, **changes):
    attach(model, n_subcomponents=12, importance=IMPORTANCE)
    config = VPDConfig.small(steps=8, batch_size=4, importance=IMPORTANCE)
    changes = {"faithfulness.coefficient": 1.0, **changes}
    return Stepper(model.vpd, config.replaced(changes))


def bridge():
    return tiny_bridge(n_layers=1)


compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler on this machine"
)


@pytest.mark.parametrize(
    ("make", "compiled"),
    [
        (hooked_transformer, False),
        (bridge, False),
        pytest.param(bridge, True, marks=compiler),
    ],
)
def test_a_compiled_step_is_the_step(make, compiled, tokens, monkeypatch):
    """Also of the record alone: what compiles it does not see which class it is of."""
    if not compiled:
        monkeypatch.setattr(torch, "compile", lambda graph, dynamic: graph)
    models = make(), make()
    plain, fused = stepper(models[0]), stepper(models[1], compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for step in range(2):
            batch = tokens[4 * step : 4 * step + 4]
            losses, _ = plain.step(batch, step)
            again, _ = fused.step(batch, step)
            for name, loss in losses.items():
                torch.testing.assert_close(again[name], loss, rtol=1e-3, atol=1e-6)
    for a, b in zip(plain.adversary.leaves(), fused.adversary.leaves(), strict=True):
        # Adam's sign-like steps turn rounding of near-zero gradients into whole steps.
        assert (a - b).abs().gt(1e-4).float().mean() < 0.01
    # One with U and V frozen, for the adversary's inner passes, and one for both losses.
    graphs = fused.run.__self__._graphs
    assert len(graphs) == 2
    assert not any(graph == fused.run.__self__._plain for graph in graphs.values())


def test_where_nothing_can_be_compiled_the_model_runs(monkeypatch, tokens):
    def refuse(_function):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(forwards, "make_fx", refuse)
    plain, fallen = stepper(tiny_bridge()), stepper(tiny_bridge(), compile=True)
    expected, _ = plain.step(tokens[:4], 0)
    with pytest.warns(RuntimeWarning, match="no compiler here"):
        got, _ = fallen.step(tokens[:4], 0)
    assert {k: float(v) for k, v in got.items()} == {k: float(v) for k, v in expected.items()}


def test_a_graph_that_differs_from_the_model_is_not_used(monkeypatch, tokens):
    """A record that has baked in the first batch is noticed on the second."""

    def stuck(function):
        return lambda *arguments: lambda *_: function(*arguments)

    monkeypatch.setattr(forwards, "make_fx", stuck)
    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: graph)
    with pytest.warns(RuntimeWarning, match="differ from the model's"):
        stepper(tiny_bridge(), compile=True).step(tokens[:4], 0)


def with_slopes(to_sources, to_delta):
    """A forward whose output never changes, but whose gradients are what is asked for."""

    def forward(importance, components, delta, routed, batch):
        for leaf, slope in ((components, to_sources), (delta, to_delta)):
            importance = importance + slope * (leaf - leaf.detach()).sum()
        return importance + batch

    return forward


def test_gradients_are_compared_on_the_scale_of_the_largest(monkeypatch):
    """Where `V U = W` the deltas' gradients are all rounding, and a graph rounds differently."""
    sources = (torch.rand(2, 3, requires_grad=True), torch.rand(2, 1, requires_grad=True))
    arguments = (torch.rand(2, 3), *sources, None, torch.ones(2, 3))
    graphs = forwards.CompiledForwards(stepper(tiny_bridge()).vpd)
    monkeypatch.setattr(graphs, "_plain", with_slopes(1.0, 1e-8))
    graphs._check(with_slopes(1.0, -1e-8), arguments)
    with pytest.raises(ValueError, match="differ from the model's"):
        graphs._check(with_slopes(1.01, 1e-8), arguments)
    with pytest.raises(ValueError, match="differ from the model's"):
        graphs._check(with_slopes(1.0, 0.01), arguments)
