"""Toy models: data, targets, and ground-truth figures on cases worked out by hand."""

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import toys
from recorded.record import RunRecord, json_in_rows
from recorded.run import perform
from toy_runs.measure import measure
from toy_runs.page import render
from toy_runs.presets import METHODS, method_of, preset
from vpd_lens.decomposition.attach import attach
from vpd_lens.errors import ConfigError
from vpd_lens.toys import TMS, TOYS, ResidualMLP, SparseFeatures
from vpd_lens.toys.ground_truth import (
    alive,
    cosine_to_features,
    dense_ci_error,
    identity_ci_error,
    identity_order,
    l2_ratio,
    mmcs,
    represented_features,
)
from vpd_lens.toys.models import add_relu

N, C, D = 5, 12, 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perfect_matrix():
    """A permuted identity with dead columns."""
    return torch.eye(N, C)[:, torch.randperm(C, generator=generator())]


# ------------------------------------------------------------------- data and models


def test_features_are_sparse_and_uniform():
    x = SparseFeatures(20, 0.05, low=-1.0)(generator(), 50_000)
    active = x != 0
    assert active.float().mean().item() == pytest.approx(0.05, abs=0.001)
    assert x[active].mean().item() == pytest.approx(0.0, abs=0.01)
    assert x[active].var().item() == pytest.approx(1 / 3, abs=0.01)
    together = (active[:, 0] & active[:, 1]).float().mean().item()
    assert together == pytest.approx(0.05**2, abs=0.001)
    assert SparseFeatures(5, 0.5)(generator(), 1000).min() >= 0


def test_the_same_seed_gives_the_same_features():
    data = SparseFeatures(5, 0.3)
    assert torch.equal(data(generator(3), 7), data(generator(3), 7))
    assert not torch.equal(data(generator(3), 7), data(generator(4), 7))


def test_label_of_the_residual_mlp():
    x = torch.tensor([[-1.0, 0.0, 0.5]])
    assert torch.equal(add_relu(x), torch.tensor([[-1.0, 0.0, 1.0]]))


@pytest.mark.parametrize("identity", [False, True])
def test_tms_is_its_tied_function(identity):
    model = TMS(N, D, identity)
    with torch.no_grad():
        model.linear1.weight.copy_(torch.randn(D, N))
        model.linear2.bias.copy_(torch.randn(N))
    model.untie()
    x = torch.rand(30, N)
    w = model.linear1.weight.T
    torch.testing.assert_close(model(x), torch.relu(x @ w @ w.T + model.linear2.bias))
    torch.testing.assert_close(model(x), model.forward_tied(x))


@pytest.mark.parametrize("name", ["tms-5-2-id", "resid-mlp-2"])
def test_targets_touch_no_global_random_state(name, monkeypatch):
    def refused(_):
        raise AssertionError("a global generator was seeded")

    monkeypatch.setattr(torch, "manual_seed", refused)
    toy, state = replace(TOYS[name], steps=2), torch.get_rng_state()
    one, other, again = (toy.train_target(seed).state_dict() for seed in (0, 1, 0))
    assert torch.equal(torch.get_rng_state(), state)
    for key in ("linear1.weight", "hidden.weight") if "tms" in name else ("embedding",):
        assert torch.equal(one[key], again[key])
        assert torch.equal(one[key], other[key]) == (key == "hidden.weight")


def test_residual_mlp_adds_to_the_embedding():
    model = ResidualMLP(6, 50, 4, 2)
    e = model.embedding
    torch.testing.assert_close(e.norm(dim=1), torch.ones(6))
    x = torch.randn(9, 6)
    r = x @ e
    for layer in model.layers:
        r = r + torch.relu(r @ layer.mlp_in.weight.T) @ layer.mlp_out.weight.T
    torch.testing.assert_close(model(x), r @ e.T)
    assert "embedding" not in dict(model.named_parameters())


# ---------------------------------------------------------------------- CI matrices


def test_identity_error_of_a_permuted_identity_is_zero():
    importance = perfect_matrix()
    assert identity_ci_error(importance, 0.1) == 0
    assert torch.equal(importance[:, identity_order(importance)], torch.eye(N, C))
    assert sorted(identity_order(importance)) == list(range(C))
    again = torch.randperm(C, generator=generator(9))
    assert identity_ci_error(importance[:, again], 0.1) == 0


def test_identity_error_counts_each_defect():
    importance = perfect_matrix()
    first = importance[0].argmax()
    empty = importance.amax(0).argmin()
    weak = importance.clone()
    weak[0, first] = 0.85
    assert identity_ci_error(weak, 0.1) == 1
    assert identity_ci_error(weak, 0.2) == 0
    extra = importance.clone()
    extra[0, empty] = 0.15  # a second subcomponent on the same feature
    assert identity_ci_error(extra, 0.1) == 1
    assert identity_ci_error(extra, 0.2) == 0
    merged = importance.clone()
    merged[:, importance[1].argmax()] = 0
    merged[1, first] = 1.0  # one subcomponent for two features: one missing, one too many
    assert identity_ci_error(merged, 0.2) == 2


def test_fewer_subcomponents_than_features_are_missing():
    assert identity_ci_error(torch.eye(5, 3), 0.1) == 2


def test_dense_error():
    block = torch.zeros(N, C)
    block[:, [3, 7]] = 1.0
    assert dense_ci_error(block, 2, 0.1) == 0
    assert dense_ci_error(block, 3, 0.1) == 1  # a third is missing
    assert dense_ci_error(block, 1, 0.1) == N  # a whole column too many
    block[0, 5] = 0.15
    assert dense_ci_error(block, 2, 0.1) == 1
    assert dense_ci_error(block, 2, 0.2) == 0


def test_alive_needs_one_input():
    importance = torch.zeros(4, 3)
    importance[2, 1] = 0.11
    importance[:, 2] = 0.09
    assert alive(importance).tolist() == [False, True, False]


# -------------------------------------------------------------------------- vectors


def perfect_vectors():
    """Subcomponents `scale_c e_i (sign w_i / scale_c)` in random order, and the truth `w`."""
    w = torch.randn(N, D, generator=generator(1))
    order = torch.randperm(N, generator=generator(2))
    scale = torch.tensor([0.5, -2.0, 1.0, -1.0, 3.0])
    v = torch.eye(N)[:, order] * scale
    return v, w[order] / scale[:, None], w


def test_similarity_is_perfect_up_to_order_sign_and_scale():
    v, u, w = perfect_vectors()
    cosine = cosine_to_features(v, u, w)
    assert mmcs(cosine) == pytest.approx(1.0)
    assert l2_ratio(cosine, v, u, w) == pytest.approx(1.0)


def test_similarity_is_the_frobenius_cosine_of_rank_one_matrices():
    v = torch.randn(N, C, generator=generator(5))
    u = torch.randn(C, D, generator=generator(6))
    w = torch.randn(N, D, generator=generator(7))
    cosine = cosine_to_features(v, u, w)
    for i, c in ((0, 3), (4, 11)):
        found = torch.outer(v[:, c], u[c]).flatten()
        true = torch.outer(torch.eye(N)[i], w[i]).flatten()
        expected = torch.cosine_similarity(found, true, dim=0)
        assert cosine[i, c].item() == pytest.approx(expected.item(), abs=1e-6)


def test_splitting_lowers_the_ratio_and_mixing_the_similarity():
    v, u, w = perfect_vectors()
    split_v, split_u = torch.cat([v, v], 1), torch.cat([u, u]) / 2
    cosine = cosine_to_features(split_v, split_u, w)
    assert mmcs(cosine) == pytest.approx(1.0)
    assert l2_ratio(cosine, split_v, split_u, w) == pytest.approx(0.5)
    doubled = torch.eye(N, 2 * N) + torch.eye(N, 2 * N).roll(N, 1)
    assert identity_ci_error(doubled, 0.1) == N
    mixed = torch.eye(N)
    mixed[1, 0] = 1.0  # reads feature 1 as well as feature 0
    cosine = cosine_to_features(mixed, w, w)
    assert cosine[0, 0].item() == pytest.approx(2**-0.5)


def test_a_wrong_sign_does_not_match():
    v, u, w = perfect_vectors()
    assert cosine_to_features(v, -u, w).amax() < 1 - 1e-3


def test_nothing_alive_is_no_similarity():
    empty = cosine_to_features(torch.zeros(N, 0), torch.zeros(0, D), torch.randn(N, D))
    assert mmcs(empty) == 0.0


# ----------------------------------------------------------------- degenerate targets


def test_a_dropped_feature_is_not_represented():
    output = 0.7 * torch.eye(N)
    output[3, 3] = 0.1
    found = represented_features(output, torch.zeros(N, N))
    assert found.tolist() == [True, True, True, False, True]
    # The residual MLP passes its input on, whatever the layers do.
    passed = 0.75 * torch.eye(N)
    assert torch.equal(represented_features(passed + output, passed), found)


def ground_truth_tms(dropped=None):
    """A TMS without superposition whose decomposition is set to the truth by hand."""
    model = TMS(N, N)
    with torch.no_grad():
        model.linear1.weight.copy_(torch.eye(N))
        if dropped is not None:
            model.linear1.weight[dropped] = 0
        model.untie()
    config = preset("tms-5-2", "spd")
    attach(model, ["linear1", "linear2"], 8, config.importance, torch.eye(N))
    vpd = model.vpd
    with torch.no_grad():
        for v, u in zip(vpd.subcomponents.v, vpd.subcomponents.u, strict=True):
            v.copy_(torch.eye(N, 8))
            u.copy_(torch.eye(8, N))
        if dropped is not None:
            for u in vpd.subcomponents.u:
                u[dropped] = 0
    # The importances of the truth: 10 x_i for subcomponent i, so 1 wherever it matters.
    vpd.pre_importance = lambda inputs, _=None: torch.cat(
        [10 * x @ torch.eye(N, 8) for x in inputs], -1
    )
    return vpd


def test_measure_finds_the_truth():
    report = measure(TOYS["tms-5-2"], ground_truth_tms())
    assert report.represented == [0, 1, 2, 3, 4]
    for site in report.sites.values():
        assert (site.alive, site.expected, site.error_01, site.error_02) == (5, 5, 0, 0)
        assert site.mmcs == pytest.approx(1.0)
        assert site.matrix_mmcs == pytest.approx(1.0)
        assert site.l2_ratio == pytest.approx(1.0)
        assert site.true == site.found


def test_measure_leaves_a_dropped_feature_out():
    report = measure(TOYS["tms-5-2"], ground_truth_tms(dropped=2))
    assert report.represented == [0, 1, 3, 4]
    second = report.sites["linear2"]
    assert (second.alive, second.expected, second.error_01) == (4, 4, 0)
    assert second.mmcs == pytest.approx(1.0)


# ---------------------------------------------------------------------- experiments

RECORDS = Path(__file__).resolve().parents[1] / "docs" / "results" / "toys"


def test_a_matrix_takes_one_line_per_row():
    data = {"a": {"b": [[1.5, 0.0], [-2e-05, 3.0]], "c": [], "d": {}}, "e": ["x, [y]", None]}
    text = json_in_rows(data)
    assert json.loads(text) == data
    assert "\n   [1.5,0.0],\n   [-2e-05,3.0]\n" in text
    assert len(text.splitlines()) == 11


def test_stored_records_are_read_and_compact():
    """Those of version 0.1, too, which had a form of their own."""
    paths = sorted(RECORDS.glob("*/*.json"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        record, stored = RunRecord.read(path), json.loads(text)
        name = (record.target["toy"], method_of(record.config))
        assert name == tuple(path.parent.name.rsplit("-", 1)), path
        report = record.report.model_dump(mode="json")
        assert report == {key: stored[key] for key in ("represented", "sites")}, path
        assert json_in_rows(stored) + "\n" == text, path
    assert render([record]).count("<svg") == len(stored["sites"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TOYS)
def test_every_preset_is_what_its_method_is(name, method):
    config = preset(name, method)
    assert (config.adversary.coefficient > 0) == (method == "vpd")
    assert (config.minimality.frequency > 0) == (method == "vpd")
    assert config.stochastic.coefficient > 0


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="tms-5-2"):
        toys.toy_run("tms-6-2", "spd", 0)
    with pytest.raises(ConfigError, match="spd"):
        preset("tms-5-2", "apd")


@pytest.fixture
def short(monkeypatch):
    """Toys and runs cut to a few steps."""
    monkeypatch.setitem(TOYS, "tms-5-2", replace(TOYS["tms-5-2"], steps=20))
    cut = {"steps": 4, "batch_size": 16, "faithfulness.warmup_steps": 2, "log_every": 2}
    monkeypatch.setattr(toys, "preset", lambda *which: preset(*which).replaced(cut))


@pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")
def test_the_command_writes_and_reuses_records(tmp_path, short):
    arguments = ["tms-5-2", "--seeds", "1", "--output", str(tmp_path)]
    first = CliRunner().invoke(toys.app, arguments)
    assert first.exit_code == 0, first.output
    assert "linear2" in first.output
    path = tmp_path / "records" / "tms-5-2,vpd,seed=0.json"
    before = path.read_text()
    assert len(before.splitlines()) < 200  # and not one per number
    page = (tmp_path / "tms-5-2,vpd.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "")
    again = CliRunner().invoke(toys.app, arguments)
    assert again.exit_code == 0
    assert path.read_text() == before


@functools.cache
def trained(name):
    """A target that both methods decompose; that of `tms-5-2` after a quarter of its steps."""
    steps = {"tms-5-2": 2500}.get(name, TOYS[name].steps)
    return replace(TOYS[name], steps=steps).train_target(0)


def found(name, method, folder, steps):
    """What a toy's run finds in `steps` steps."""
    run = toys.toy_run(name, method, 0)
    target = replace(run.target, load=lambda: copy.deepcopy(trained(name)))
    run = replace(run, target=target, config=run.config.replaced({"steps": steps}))
    return perform(run, folder, progress=False).report


@pytest.mark.slow
@pytest.mark.xdist_group("tms-5-2-id")
@pytest.mark.parametrize(("method", "steps"), [("spd", 1400), ("vpd", 2000)])
def test_the_dense_block_of_tms_5_2_id_is_found(tmp_path, method, steps):
    """Two subcomponents for the identity, which every feature shares, and one per feature else.

    The toy without the identity is these two matrices, so it has no test of its own.
    """
    report = found("tms-5-2-id", method, tmp_path, steps)
    assert len(report.represented) == 5
    assert {name: site.alive for name, site in report.sites.items()} == {
        "linear1": 5,
        "hidden": 2,
        "linear2": 5,
    }
    for site in report.sites.values():
        assert site.error_02 == 0
    for name in ("linear1", "linear2"):
        assert report.sites[name].mmcs >= 0.999
    for feature in report.sites["hidden"].importance:
        assert min(feature[:2]) > 0.4
        assert max(feature[2:]) < 0.1
