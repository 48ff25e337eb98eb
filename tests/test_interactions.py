"""Interactions in neurons: their formula, and the second difference that they predict."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_bridge

import vpd_lens
from vpd_lens.analysis.clustering import Best
from vpd_lens.analysis.interactions import measure
from vpd_lens.errors import ArtefactError, DataError, InputError
from vpd_lens.sites import find_sites

SITE = "blocks.0.mlp.in"


@pytest.fixture(scope="module")
def planted():
    """Eight subcomponents of equal size, which write to eight neurons each, the next one 2 on."""
    model = tiny_bridge()
    vpd = vpd_lens.decompose(model, sites=[SITE], n_subcomponents=8).vpd
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        vpd.v(SITE).copy_(torch.randn(16, 8, generator=generator) / 16)
        vpd.u(SITE).zero_()
        for c in range(8):
            vpd.u(SITE)[c, 2 * c : 2 * c + 8] = 0.4
    monkeypatch = pytest.MonkeyPatch()  # importances of which none is 0 everywhere
    monkeypatch.setattr(
        vpd, "pre_importance", lambda inputs, real=None: inputs[0][..., :8].sigmoid()
    )
    yield model
    monkeypatch.undo()


def test_values_are_those_of_the_formula(planted, tokens):
    vpd = planted.vpd
    found = vpd_lens.interactions(planted, tokens[:8], batch_size=3)[SITE]
    g, x = vpd.causal_importance(tokens[:8]).flatten(0, 1), vpd.inputs(tokens[:8])[0].flatten(0, 1)
    size, u = (g * (x @ vpd.v(SITE))).abs().detach(), vpd.u(SITE).abs().detach()
    for a in range(8):
        for b in range(8):
            neurons = (u[a] * u[b]).sum() / u[a].square().sum()
            positions = (size[:, a] * size[:, b]).sum() / size[:, a].square().sum()
            assert found.of(a, b) == pytest.approx(float(neurons * positions), rel=1e-4)
    assert found.of(2, 2) == pytest.approx(1)
    assert found.of(0, 4) == 0  # no neuron in common
    first, second, value = found.top(1)[0]
    assert value == found.others().max() == found.of(int(first[-1]), int(second[-1]))
    assert len(found.others()) == 56


def test_the_second_difference_is_that_of_the_neurons(planted, tokens):
    vpd = planted.vpd
    found = vpd_lens.interactions(planted, tokens[:8])[SITE]
    measured = measure(found, planted, tokens[:8], indices=[0, 1, 5])
    assert measured.n_positions == 64
    site = vpd.sites[0]
    x = vpd.inputs(tokens[:8])[0].flatten(0, 1)
    g = vpd.causal_importance(tokens[:8]).flatten(0, 1)
    parts = (g * (x @ vpd.v(SITE)))[:, :, None] * vpd.u(SITE)

    def neurons(*without):
        return F.gelu(x @ site.weight + site.bias - sum(parts[:, c] for c in without))

    for (first, second), value in zip(measured.pairs, measured.measured, strict=True):
        a, b = int(first[-1]), int(second[-1])
        whole = neurons()
        difference = whole - neurons(a) - neurons(b) + neurons(a, b)
        alone = (whole - neurons(a)).abs().sum()
        assert value == pytest.approx(float(difference.abs().sum() / alone), rel=1e-3, abs=1e-6)


def test_sharing_of_neurons_predicts_the_second_difference(planted, tokens):
    found = vpd_lens.interactions(planted, tokens[:8])[SITE]
    measured = measure(found, planted, tokens[:8], n=8)
    assert len(measured.pairs) == 56
    apart = measured.predicted == 0
    assert 0 < apart.sum() < 56
    assert measured.measured[apart].max() < 1e-5
    assert measured.measured[~apart].min() > 1e-4
    assert measured.rank_correlation > 0.9
    assert "rank correlation" in str(measured)


def test_tables_are_sorted_by_clusters(planted, tokens):
    clusters = vpd_lens.cluster(
        planted, tokens[:8], threshold=0.5, sampler=Best(), until_one=True, progress=False
    )
    clusters = clusters.at(max(1, len(clusters.names) // 2))
    found = vpd_lens.interactions(planted, tokens[:8], clusters=clusters)[SITE]
    known = [group for group in found.groups if group >= 0]
    assert known == sorted(known)
    assert known == clusters.numbers(f"{SITE}:{c}" for c in found.indices)[: len(known)]
    plain = vpd_lens.interactions(planted, tokens[:8])[SITE]
    assert plain.of(1, 2) == pytest.approx(found.of(1, 2))
    same = [
        plain.of(a, b)
        for a, group in zip(found.indices, found.groups, strict=True)
        for b, other in zip(found.indices, found.groups, strict=True)
        if a != b and group == other >= 0
    ]
    if same:
        assert found.inside()[0] == pytest.approx(sum(same) / len(same), rel=1e-4)
    with pytest.raises(InputError, match="made without clusters"):
        plain.inside()


@pytest.mark.compat
def test_of_a_gated_mlp_the_gate_is_looked_at(tokens):
    model = tiny_bridge(gated_mlp=True, act_fn="silu", normalization_type="RMS")
    vpd_lens.decompose(model, sites="mlp", n_subcomponents=6)
    found = vpd_lens.interactions(model, tokens[:4])
    assert list(found) == ["blocks.0.mlp.gate", "blocks.1.mlp.gate"]
    assert {s.name for s in find_sites(model, "mlp")} >= {"blocks.0.mlp.in", "blocks.0.mlp.gate"}
    measured = measure(found["blocks.1.mlp.gate"], model, tokens[:4], n=3)
    assert torch.isfinite(measured.measured).all()
    with pytest.raises(InputError, match="are not what goes into the nonlinearity of an MLP"):
        vpd_lens.interactions(model, tokens[:4], sites=["blocks.0.mlp.in"])


def test_what_has_no_interactions_is_refused(planted, tokens):
    model = tiny_bridge()
    vpd_lens.decompose(model, sites="attn", n_subcomponents=4)
    with pytest.raises(InputError, match="no input of an MLP's nonlinearity is decomposed"):
        vpd_lens.interactions(model, tokens)
    with pytest.raises(DataError):
        vpd_lens.interactions(planted, tokens, n_batches=0)
    clusters = vpd_lens.cluster(planted, tokens[:2], threshold=0.3, progress=False)
    other = tiny_bridge(seed=1)
    vpd_lens.decompose(other, sites=[SITE], n_subcomponents=8)
    with pytest.raises(ArtefactError, match="of another decomposition"):
        vpd_lens.interactions(other, tokens, clusters=clusters)
    found = vpd_lens.interactions(planted, tokens[:2])[SITE]
    with pytest.raises(ArtefactError, match="of another decomposition"):
        measure(found, other, tokens[:2])
    with pytest.raises(InputError, match="is important at none of"):
        found.of(1, 99)
