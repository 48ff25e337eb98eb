"""The audit against its definitions on small models, and the verdict against its bounds."""

import itertools
import math

import pytest
import torch
from conftest import tiny_bridge

import vpd_lens
from vpd_lens.data import Batch
from vpd_lens.decomposition import Divergence
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.masks import Layout, Masks
from vpd_lens.evaluation import audit as audits
from vpd_lens.evaluation.audit import DONORS, SETS, Audited, layers_of
from vpd_lens.evaluation.verdict import PROMISES, findings, in_words

LAYOUT = Layout(("blocks.0.mlp.in", "blocks.1.mlp.in"), (5, 7))
IMPORTANCE = vpd_lens.CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2, d_ffn=32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def needs(share=0.2, shape=(4, 6)):
    return torch.rand(*shape, 12, generator=generator()) < share


def sets(kind, needed, real=None):
    return dict(audits._sets(kind, needed, real, LAYOUT, generator(1)))


@pytest.fixture(scope="module")
def model():
    model = tiny_bridge()
    attach(model, n_subcomponents=8, importance=IMPORTANCE)
    return model


@pytest.fixture(scope="module")
def report(model):
    rows = torch.randint(0, 29, (6, 8), generator=generator(1))
    return vpd_lens.evaluate(
        model, rows, batch_size=3, pgd_steps=(2,), audit=True, audit_batches=2, progress=False
    )


# ------------------------------------------------------------------------------------- sets


@pytest.mark.parametrize("kind", SETS)
def test_sets_only_grow_with_donors(kind):
    found = sets(kind, needs())
    assert tuple(found) == DONORS
    for fewer, more in itertools.pairwise(found.values()):
        assert not (fewer & ~more).any()


def test_donors_are_tokens():
    needed = needs()
    first = sets("donors", needed)[1].flatten(0, 1)
    every = {tuple(row.tolist()) for row in needed.flatten(0, 1)}
    assert {tuple(row.tolist()) for row in first} <= every
    # With as many donors as that, everything that any token needs is on.
    assert torch.equal(sets("donors", needed)[64].any(0).any(0), needed.any(0).any(0))


def test_donors_of_the_same_text_need_what_it_needs():
    needed = needs()
    last = sets("same text", needed)[64]
    assert not (last & ~needed.any(1, keepdim=True)).any()
    assert not torch.equal(needed.any(1)[0], needed.any(1)[1])  # else this would say nothing


def test_random_sets_are_as_large_at_every_site():
    needed = needs()
    random, donors = (sets(kind, needed).values() for kind in ("random", "donors"))
    for mine, theirs in zip(random, donors, strict=True):
        for a, b in zip(LAYOUT.split(mine), LAYOUT.split(theirs), strict=True):
            assert torch.equal(a.sum(-1), b.sum(-1))


def test_frequency_sets_have_every_subcomponent_as_often_as_k_tokens():
    needed = needs(shape=(100, 100))
    frequency = needed.float().mean((0, 1))
    found = sets("frequency", needed)
    for k in (1, 4):
        expected = 1 - (1 - frequency) ** k
        torch.testing.assert_close(found[k].float().mean((0, 1)), expected, atol=0.02, rtol=0)


def test_padding_neither_gives_nor_counts():
    needed = needs(0.0)
    needed[:, 4:] = True  # only pads need anything
    real = torch.ones(4, 6, dtype=torch.bool)
    real[:, 4:] = False
    for kind in SETS:
        assert not sets(kind, needed, real)[64].any()


# ---------------------------------------------------------------------------------- figures


def divergence_under(model, rows, masks):
    output, _ = model.vpd.target(rows)
    return float(Divergence(output, "kl")(model.vpd.run(masks, rows)))


def test_levels_are_the_masks_they_say(model, report):
    rows = torch.randint(0, 29, (6, 8), generator=generator(1))
    g = model.vpd.causal_importance(rows)
    nothing = torch.zeros(6, 8, 12)
    for s in ("0", "0.5", "1"):
        raised = g + float(s) * (1 - g)
        in_use = Masks(torch.where(g > 0, raised, 0), nothing)
        mean = report.audit.levels[s].mean
        assert mean == pytest.approx(divergence_under(model, rows, in_use), rel=1e-4)
        unused = g.amax((0, 1)) <= 0.1
        kept = Masks(torch.where(unused, 0, raised), nothing + float(s))
        mean = report.audit.unused["0.1"][s].mean
        assert mean == pytest.approx(divergence_under(model, rows, kept), rel=1e-4)
        assert report.audit.n_unused["0.1"] == int(unused.sum())
    assert 0 < report.audit.n_unused["0.1"] < 96  # else the last figures would say nothing


def test_masks_on_all_layers_are_the_modes_of_the_report(report):
    for mode, tolerance in (("ci", 1e-4), ("stochastic", 0.2)):
        subsets = report.audit.subsets[mode]
        assert list(subsets) == ["1", "2"]
        if mode == "ci":
            assert subsets["2"].mean == pytest.approx(report.modes[mode]["kl"], rel=tolerance)
        assert 0 < subsets["1"].mean < subsets["2"].mean


def test_in_parallel_every_layer_reads_the_target_s_stream(model):
    """Of masks on the last layer nothing reaches another; of those on the first, something does."""
    vpd = model.vpd
    rows = torch.randint(0, 29, (3, 8), generator=generator(2))
    output, inputs = vpd.target(rows)
    g = vpd.pre_importance(inputs).clamp(0, 1)
    one = Audited(Batch(rows, None), g, Divergence(output, "kl"))
    points = audits.stream_points(model, 2)
    layer_of = torch.tensor([0] * 6 + [1] * 6)
    for layer, same in ((0, False), (1, True)):
        ones = torch.ones_like(g)
        only = (layer_of == layer).repeat_interleave(8)
        masks = Masks(torch.where(only, g, ones), (layer_of != layer).float().expand(3, 8, 12))
        plain = vpd.run(masks, rows)
        parallel = audits._in_parallel(one, vpd, masks, layer_of, points, lambda: None)
        assert bool((parallel - plain).abs().max() < 1e-4) == same
        assert (parallel - output).abs().max() > 1e-2
    with vpd.undisturbed():  # and nothing is left behind
        torch.testing.assert_close(vpd.run(None, rows), output)


def test_errors_are_of_sequences(model):
    rows = torch.randint(0, 29, (5, 8), generator=generator(3))
    output, inputs = model.vpd.target(rows)
    g = model.vpd.pre_importance(inputs).clamp(0, 1)
    divergence = Divergence(output, "kl")
    masked = model.vpd.run(Masks(g, torch.zeros(5, 8, 12)), rows)
    sums = audits._Estimates()
    sums.add(("x",), Audited(Batch(rows, None), g, divergence), masked)
    each = divergence.per_position(masked).mean(1)
    estimate = sums.estimate(("x",))
    assert estimate.mean == pytest.approx(float(each.mean()), rel=1e-5)
    assert estimate.error == pytest.approx(float(each.std()) / math.sqrt(5), rel=1e-4)


def test_an_audit_survives_its_file_and_changes_nothing_else(model, report, tmp_path):
    again = vpd_lens.EvalReport.from_json(report.to_json(tmp_path / "report.json"))
    assert again.audit == report.audit
    rows = torch.randint(0, 29, (6, 8), generator=generator(1))
    options = {"batch_size": 3, "pgd_steps": (2,), "progress": False}
    without = vpd_lens.evaluate(model, rows, **options)
    assert without.audit is None
    assert without == report.model_copy(update={"audit": None})


def test_layers_are_blocks_and_what_is_in_none():
    names = ("blocks.0.attn.q", "blocks.0.mlp.in", "blocks.3.mlp.in", "unembed")
    assert layers_of(Layout(names, (1, 1, 1, 1))) == [[0, 1], [2], [3]]


def test_a_model_without_blocks_is_audited():
    toy = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    rows = torch.randn(8, 4, generator=generator())
    options = {"importance": {"kind": "mlp"}, "n_subcomponents": 6}
    vpd_lens.decompose(toy, config=vpd_lens.VPDConfig.spd(**options), example=rows)
    found = vpd_lens.evaluate(toy, [rows], pgd_steps=(), audit=True, progress=False).audit
    assert found.parallel == {}
    assert list(found.subsets["ci"]) == ["1", "2"]
    assert found.aggregation["donors"]["64"].mean >= 0


# ----------------------------------------------------------------------------------- verdict


def changed(report, **figures):
    """The report with other divergences, as shares of the cost of ablating everything."""
    modes = {name: dict(row) for name, row in report.modes.items()}
    modes["zero"]["kl"] = 2.0
    for name in ("unmasked", "stochastic", "ci"):
        modes[name]["kl"] = 2.0 * figures.get(name, 0.001)
    attack = {"mean": 2.0 * figures.get("attack", 0.01), "max": 9.0}
    audit = report.audit.model_copy(deep=True)
    for estimate in audit.aggregation["donors"].values():
        estimate.mean = 0.002
    audit.aggregation["donors"]["4"].mean = 2.0 * figures.get("company", 0.01)
    l0 = {t: {**row, "total": figures.get("l0", 0.1) * 96} for t, row in report.l0.items()}
    update = {"modes": modes, "pgd": {"20": attack}, "audit": audit, "l0": l0, "blind": 3.0}
    return report.model_copy(update=update)


def statuses(report):
    return {found.promise.name: found.status for found in findings(report)}


def test_a_good_decomposition_is_called_good(report):
    good = changed(report)
    assert set(statuses(good).values()) == {"holds"}
    assert in_words(good).startswith("This decomposition can be trusted")
    assert "What to change" not in in_words(good)


@pytest.mark.parametrize(
    ("figure", "name"),
    [
        ("unmasked", "faithful"),
        ("stochastic", "random masks"),
        ("ci", "importances"),
        ("attack", "adversary"),
        ("company", "company"),
        ("l0", "sparse"),
    ],
)
def test_every_promise_has_its_own_figure_and_its_bounds(report, figure, name):
    (promise,) = [p for p in PROMISES if p.name == name]
    for value, status in (
        (promise.holds * 0.99, "holds"),
        (promise.holds * 1.01, "partly"),
        (promise.fails * 0.99, "partly"),
        (promise.fails * 1.01, "fails"),
    ):
        one = changed(report, **{figure: value})
        assert statuses(one)[name] == status
        assert [s for n, s in statuses(one).items() if n != name] == ["holds"] * 5
    assert in_words(one).startswith("Do not trust this decomposition. Fails: " + name)
    assert promise.advice[1:] in in_words(one)


def test_figures_are_judged_by_knowing_nothing_of_the_input(report):
    """Ablating everything may cost much more than that, and make anything look good."""
    good = changed(report, stochastic=0.04)
    assert statuses(good)["random masks"] == "holds"
    blind = good.model_copy(update={"blind": 0.2})
    assert blind.worst == 0.2
    assert statuses(blind)["random masks"] == "fails"


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_blind_is_the_divergence_of_the_mean(kind):
    target = torch.randn(3, 5, 7, generator=generator()) * 2
    real = torch.ones(3, 5, dtype=torch.bool)
    real[0, 3:] = False
    kept = target[real]
    if kind == "kl":
        p = kept.softmax(-1)
        expected = (p * (p / p.mean(0)).log()).sum(-1).mean()
    else:
        expected = kept.var(0, unbiased=False).mean()
    torch.testing.assert_close(Divergence(target, kind, real).blind(), expected)
    torch.testing.assert_close(
        Divergence(kept, kind).blind(), Divergence(kept[:, None], kind).blind()
    )


def test_what_was_not_measured_is_said(report):
    blind = changed(report).model_copy(update={"audit": None, "pgd": {}})
    words = in_words(blind)
    assert words.startswith("This decomposition holds as far as it was tried.")
    assert "Not measured: adversary (pgd_steps), company (audit=True)." in words


def test_the_verdict_is_on_top_of_the_report(report):
    assert str(report).startswith(in_words(report)[:40])
    assert report.verdict() == in_words(report)
