"""What `evaluate` reports, checked against dense references and direct counts."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vpd_lens
from vpd_lens.data import Batch
from vpd_lens.decomposition import Divergence, Layout, Masks
from vpd_lens.decomposition.adversary import ascend, shared_sources
from vpd_lens.errors import ArtefactError, AttachError, ConfigError, InputError
from vpd_lens.evaluation.metrics import (
    Sparsity,
    delta_sizes,
    hidden_errors,
    next_token_cross_entropy,
    pgd_curve,
)
from vpd_lens.sites import find_sites

VOCABULARY, LENGTH = 29, 8
SETTINGS = {
    "batch_size": 4,
    "n_batches": 2,
    "pgd_steps": (1, 10),
    "pgd_restarts": 2,
    "progress": False,
}


ONE = {"batch_size": 7, "pgd_steps": (2,), "pgd_restarts": 1, "progress": False}


def new_model():
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_native(
        TransformerBridgeConfig(
            d_model=16,
            d_head=4,
            n_heads=4,
            n_layers=2,
            n_ctx=LENGTH,
            d_vocab=VOCABULARY,
            d_mlp=24,
            act_fn="gelu",
            normalization_type="LN",
            seed=0,
        )
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    """A decomposed model whose importances cover 0, 1 and everything between."""
    model = vpd_lens.decompose(new_model(), n_subcomponents=20, seed=2)
    *_, last = model.vpd.importance.parameters()
    with torch.no_grad():
        last += torch.randn(last.shape, generator=torch.Generator().manual_seed(3))
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(
        VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(4)
    )  # [batch, pos]


@pytest.fixture(scope="module")
def report(model, tokens):
    return vpd_lens.evaluate(model, tokens, **SETTINGS)


@pytest.fixture(scope="module")
def importance(model, tokens):
    g = model.vpd.causal_importance(tokens)
    assert (g == 0).any()
    assert (g == 1).any()
    assert ((g > 0.1) & (g < 0.9)).any()
    return g


def kl(target, masked):
    log_p, log_q = target.log_softmax(-1), masked.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def cross_entropy(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


@torch.no_grad()
def dense(model, weight_of):
    """The same model with every decomposed matrix replaced."""
    other = new_model()
    for site in find_sites(other):
        site.weight.copy_(weight_of(site.name))
        assert torch.equal(site.weight, weight_of(site.name))
    return other


# --------------------------------------------------------------------- masking modes


def test_unmasked_is_the_model_with_the_weights_v_u(model, tokens, report):
    vpd = model.vpd
    swapped = dense(model, lambda name: (vpd.v(name) @ vpd.u(name)).detach())
    with torch.no_grad():
        target, logits = model(tokens), swapped(tokens)
    assert kl(target, logits) > 0.1
    assert report.modes["unmasked"]["kl"] == pytest.approx(kl(target, logits), rel=1e-4)
    assert report.modes["unmasked"]["ce"] == pytest.approx(cross_entropy(logits, tokens), rel=1e-5)


def test_zero_is_the_model_without_its_matrices(model, tokens, report):
    empty = dense(model, lambda name: torch.zeros(model.vpd.site(name).shape))
    with torch.no_grad():
        target, logits = model(tokens), empty(tokens)
    assert report.modes["zero"]["kl"] == pytest.approx(kl(target, logits), rel=1e-4)
    assert report.modes["zero"]["ce_recovered"] == pytest.approx(0.0, abs=1e-12)
    assert report.modes["target"]["kl"] == 0.0
    assert report.modes["target"]["ce_recovered"] == 1.0
    assert report.modes["target"]["ce"] == pytest.approx(cross_entropy(target, tokens), rel=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_rounded_masks_are_zeros_and_ones(model, tokens, importance, report, threshold):
    vpd = model.vpd
    masks = dict(
        zip(vpd.layout.names, vpd.layout.split((importance > threshold).float()), strict=True)
    )
    with torch.no_grad():
        target = model(tokens)
        with vpd.masked(masks, delta=0.0):
            logits = model(tokens)
    assert report.modes[f"rounded>{threshold:g}"]["kl"] == pytest.approx(
        kl(target, logits), rel=1e-4
    )


def test_importances_as_masks_leave_the_delta_out(model, tokens, importance, report):
    vpd = model.vpd
    with torch.no_grad():
        target = model(tokens)
        with vpd.masked(importance, delta=0.0):
            logits = model(tokens)
    assert report.modes["ci"]["kl"] == pytest.approx(kl(target, logits), rel=1e-4)
    ce = report.modes["ci"]["ce"]
    zero, whole = report.modes["zero"]["ce"], report.modes["target"]["ce"]
    assert report.modes["ci"]["ce_recovered"] == pytest.approx((zero - ce) / (zero - whole))


def test_cross_entropy_counts_one_term_per_predicted_token():
    tokens = torch.randint(5, (3, 7))
    logits = torch.randn(3, 7, 5)
    terms = [
        -logits[b, t].log_softmax(-1)[tokens[b, t + 1]] for b in range(3) for t in range(7 - 1)
    ]
    assert len(terms) == 3 * (7 - 1)
    mean, n = next_token_cross_entropy(logits, tokens)
    assert mean == pytest.approx(float(torch.stack(terms).mean()), rel=1e-6)
    assert n == len(terms)
    real = torch.arange(7) < torch.tensor([[7], [3], [1]])
    mean, n = next_token_cross_entropy(logits, tokens, real)
    assert mean == pytest.approx(float(torch.stack(terms[:6] + terms[6:8]).mean()), rel=1e-6)
    assert n == 6 + 2


# -------------------------------------------------------------------------- sparsity


def test_l0_is_a_count(importance, report, model):
    layout = model.vpd.layout
    for key, values in report.l0.items():
        counts = (importance > float(key)).double().sum(-1).mean()
        assert values["total"] == pytest.approx(float(counts))
        for name in layout.names:
            part = importance[..., layout.columns(name)]
            assert values[name] == pytest.approx(float((part > float(key)).double().sum(-1).mean()))


def test_sums_per_layer_and_total(report):
    for values in [*report.l0.values(), report.alive]:
        sites = list(report.n_subcomponents)
        assert values["total"] == pytest.approx(sum(values[name] for name in sites))
        for layer in ("blocks.0", "blocks.1"):
            mine = [values[name] for name in sites if name.startswith(layer + ".")]
            assert len(mine) == 6
            assert values[layer] == pytest.approx(sum(mine))


def test_alive_means_a_mean_importance_above_one_in_a_million(importance, report):
    mean = importance.double().flatten(0, -2).mean(0)
    assert report.alive["total"] == int((mean > 1e-6).sum())
    sparsity = Sparsity(Layout(("a", "b"), (2, 1)), [0.0], torch.device("cpu"))
    sparsity.add(torch.tensor([[0.0, 4e-6, 0.9e-6], [0.0, 0.0, 0.9e-6]]))  # means 0, 2e-6, 0.9e-6
    assert sparsity.alive() == {"a": 1.0, "b": 0.0, "total": 1.0}


def test_importances_are_counted_and_sorted(importance, report, model):
    assert sum(report.ci_histogram) == importance.numel()
    assert report.ci_histogram[0] >= int((importance == 0).sum())
    mean = importance.flatten(0, -2).mean(0)
    for name, values in report.mean_ci.items():
        expected = mean[model.vpd.layout.columns(name)].sort(descending=True).values
        assert torch.allclose(torch.tensor(values), expected, atol=1e-6)
    assert report.n_positions == 8 * LENGTH
    assert report.batch_shape == [4, LENGTH]


# ------------------------------------------------------------------------- adversary


def test_the_curve_is_a_forward_with_the_sources_found(model, tokens, importance):
    vpd = model.vpd
    with torch.no_grad():
        target = model(tokens)
    divergence = Divergence(target, "kl")
    start = shared_sources(importance, vpd.layout, torch.Generator().manual_seed(5))
    divergence_of = lambda masks: divergence(vpd.run(masks, tokens))  # noqa: E731
    sources, _ = ascend(divergence_of, importance, start, n_steps=5, step_size=0.2)
    generator = torch.Generator().manual_seed(5)
    curve = pgd_curve(vpd, Batch(tokens), importance, divergence, [0, 5], 0.2, generator)
    masks = importance + (1 - importance) * sources.components
    with torch.no_grad(), vpd.masked(masks, delta=_by_site(vpd, sources.delta)):
        logits = model(tokens)
    assert curve[5] == pytest.approx(kl(target, logits), rel=1e-4)
    assert curve[5] > curve[0]


def _by_site(vpd, delta):
    return {name: float(delta[..., i]) for i, name in enumerate(vpd.layout.names)}


def test_the_adversary_ends_in_a_corner(model, tokens, importance):
    vpd = model.vpd
    with torch.no_grad():
        divergence = Divergence(model(tokens), "kl")
    start = shared_sources(importance, vpd.layout, torch.Generator().manual_seed(5))
    divergence_of = lambda masks: divergence(vpd.run(masks, tokens))  # noqa: E731
    sources, _ = ascend(divergence_of, importance, start, n_steps=5, step_size=1.0)
    assert sources.components.shape == (1, 1, vpd.layout.total)
    free = (importance < 1).flatten(0, -2).any(0)  # elsewhere the mask is 1 whatever the source
    corners = torch.cat([sources.components[..., free], sources.delta], -1)
    assert ((corners == 0) | (corners == 1)).all()


def test_the_adversary_is_worse_than_chance(report):
    assert report.pgd["10"]["mean"] > report.pgd["1"]["mean"]
    assert report.pgd["10"]["mean"] > report.modes["stochastic"]["kl"]
    assert all(value["max"] >= value["mean"] for value in report.pgd.values())
    assert report.n_pgd_runs == 2


# ---------------------------------------------------------------------- faithfulness


def test_delta_sizes(model):
    vpd = model.vpd
    squares, weights, entries = 0.0, 0.0, 0
    sizes = delta_sizes(vpd)
    for site in vpd.sites:
        delta = vpd.delta(site.name)
        assert torch.allclose(delta, site.weight - vpd.v(site.name) @ vpd.u(site.name), atol=1e-5)
        assert sizes[site.name]["mse"] == pytest.approx(float(delta.square().mean()), rel=1e-5)
        assert sizes[site.name]["relative"] == pytest.approx(
            float(delta.norm() / site.weight.norm()), rel=1e-5
        )
        squares += float(delta.square().sum())
        weights += float(site.weight.square().sum())
        entries += delta.numel()
    assert sizes["total"]["mse"] == pytest.approx(squares / entries, rel=1e-5)
    assert sizes["total"]["relative"] == pytest.approx((squares / weights) ** 0.5, rel=1e-5)


def test_an_exact_decomposition_has_no_error(tokens):
    model = vpd_lens.decompose(new_model(), n_subcomponents=lambda site: site.shape[0])
    vpd = model.vpd
    with torch.no_grad():
        for site in vpd.sites:
            vpd.v(site.name).copy_(torch.eye(site.shape[0]))
            vpd.u(site.name).copy_(site.weight)
    ones = Masks(torch.ones(1, 1, vpd.layout.total), torch.zeros(1, 1, vpd.layout.n_sites))
    _, inputs = vpd.target(tokens)
    _, outputs = vpd.run_recording(ones, tokens)
    assert max(hidden_errors(vpd, inputs, outputs).values()) < 1e-10
    report = vpd_lens.evaluate(model, tokens, **{**SETTINGS, "pgd_steps": ()})
    assert report.modes["unmasked"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert report.modes["unmasked"]["ce_recovered"] == pytest.approx(1.0, abs=1e-5)
    assert report.delta["total"]["relative"] == 0.0
    assert report.pgd == {}


# --------------------------------------------------------------- what is measured on


def figures(report):
    """What two reports of the same rows share: everything but random numbers and batches."""
    modes = {
        mode: row
        for mode, row in report.modes.items()
        if mode in ("target", "unmasked", "ci", "zero") or mode.startswith("rounded")
    }
    flat = [value for row in modes.values() for value in row.values()]
    flat += [report.n_positions, *report.hidden_error["ci"].values(), *report.alive.values()]
    return flat + [value for row in report.l0.values() for value in row.values()]


@pytest.fixture(scope="module")
def seven(tokens):
    return tokens[:7]


@pytest.fixture(scope="module")
def whole(model, seven):
    return vpd_lens.evaluate(model, seven, **ONE)


def test_a_short_last_batch_counts_by_its_positions(model, seven, whole):
    report = vpd_lens.evaluate(model, seven, batch_size=3, pgd_steps=(), progress=False)
    assert report.n_positions == 7 * LENGTH
    kls = whole.modes["ci"]["kl"], report.modes["ci"]["kl"]
    assert kls[0] == pytest.approx(kls[1], rel=1e-4)
    assert report.modes["zero"]["ce"] == pytest.approx(whole.modes["zero"]["ce"], rel=1e-5)
    assert report.l0 == whole.l0


@pytest.mark.parametrize("kind", ["stream", "npy", "iterable"])
def test_no_row_is_measured_twice(model, seven, whole, kind, tmp_path):
    np.save(tmp_path / "rows.npy", seven.numpy())
    data = {"stream": seven.flatten(), "npy": tmp_path / "rows.npy", "iterable": [seven]}[kind]
    assert vpd_lens.evaluate(model, data, n_batches=5, **ONE) == whole


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, tokens, side):
    lengths = (8, 5, 3)
    alone = [
        vpd_lens.evaluate(
            model, row[None, :n], seq_len=n, pgd_steps=(), rounding=(0.1,), progress=False
        )
        for row, n in zip(tokens, lengths, strict=False)
    ]
    rows = tokens[:3].clone()
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    if side == "left":
        rows = torch.stack([r.roll(LENGTH - n) for r, n in zip(rows, lengths, strict=True)])
        mask = mask.flip(1)
    data = {"input_ids": rows, "attention_mask": mask}
    report = vpd_lens.evaluate(
        model, data, batch_size=3, pgd_steps=(2,), pgd_restarts=1, rounding=(0.1,), progress=False
    )
    assert report.n_positions == sum(lengths)
    for mode in ("unmasked", "ci", "rounded>0.1", "zero"):
        kl = sum(r.modes[mode]["kl"] * n for r, n in zip(alone, lengths, strict=True))
        ce = sum(r.modes[mode]["ce"] * (n - 1) for r, n in zip(alone, lengths, strict=True))
        assert report.modes[mode]["kl"] == pytest.approx(kl / 16, rel=1e-3, abs=1e-5)
        assert report.modes[mode]["ce"] == pytest.approx(ce / 13, rel=1e-4)
    l0 = sum(r.l0["0.1"]["total"] * n for r, n in zip(alone, lengths, strict=True))
    assert report.l0["0.1"]["total"] == pytest.approx(l0 / 16, rel=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_a_block_without_gradients(model, seven, whole, context):
    with context():
        assert vpd_lens.evaluate(model, [seven + 0], **ONE) == whole


# ---------------------------------------------------------- models of other kinds


class Classifier(nn.Module):
    """Classes of rows, from features or from tokens; counts its forwards."""

    def __init__(self, classes=3, tokens=False):
        super().__init__()
        self.calls = 0
        self.embed = nn.Embedding(9, 5) if tokens else nn.Identity()
        self.inside, self.out = nn.Linear(5, 6), nn.Linear(6, classes)

    def forward(self, x):
        self.calls += 1
        x = self.embed(x)
        return self.out(self.inside(x.mean(1) if x.ndim == 3 else x).relu())


def classifier(data, **kw):
    torch.manual_seed(0)
    model = Classifier(tokens=not data.is_floating_point(), **kw)
    return vpd_lens.decompose(model, n_subcomponents=4, example=data, divergence="kl")


def measured(model, data):
    return vpd_lens.evaluate(
        model, [data], batch_size=len(data), pgd_steps=(1,), pgd_restarts=1, progress=False
    )


@pytest.mark.parametrize("data", [torch.rand(6, 5), torch.randint(9, (6, 4))])
def test_a_classifier_has_no_next_token(data):
    model = classifier(data)
    report = measured(model, data)
    assert "ce" not in report.modes["zero"]
    assert report.modes["zero"]["kl"] > 0
    assert report.n_positions == 6
    before = model.calls
    vpd_lens.evaluate(model, [data], batch_size=6, pgd_steps=(), progress=False)
    assert model.calls - before == 1 + len(report.modes)


def test_a_single_logit_has_no_kl():
    data = torch.rand(6, 5)
    with pytest.raises(InputError, match="one logit"):
        measured(classifier(data, classes=1), data)


def test_a_divergence_that_sees_nothing_is_reported():
    data = torch.rand(6, 5)
    model = classifier(data)
    with torch.no_grad():
        model.out.weight.zero_()
    with pytest.warns(UserWarning, match="say nothing"):
        report = measured(model, data)
    assert report.delta["out"]["relative"] != report.delta["out"]["relative"]  # no number
    assert report.delta["inside"]["relative"] < 10
    assert report.delta["total"]["relative"] < 10
    assert report.hidden_error["ci"]["inside"] >= 0
    with torch.no_grad():
        model.vpd.u("out").zero_()
    assert delta_sizes(model.vpd)["out"]["relative"] == 0.0


# ----------------------------------------------------------------- report and page


def test_another_seed_draws_other_masks(model, seven, whole):
    other = vpd_lens.evaluate(model, seven, **{**ONE, "pgd_steps": ()}, seed=1)
    assert other.modes["stochastic"] != whole.modes["stochastic"]
    assert other.modes["unmasked"] == whole.modes["unmasked"]


def test_a_configuration_is_no_data():
    with pytest.raises(ConfigError, match="pass config="):
        vpd_lens.decompose(nn.Linear(2, 2), vpd_lens.VPDConfig.small())


def test_without_a_decomposition():
    with pytest.raises(AttachError, match="decompose"):
        vpd_lens.evaluate(new_model(), torch.zeros(1, 2, dtype=torch.long))


def test_json_round_trip(report, tmp_path):
    path = report.to_json(tmp_path / "report.json")
    assert vpd_lens.EvalReport.from_json(path) == report
    odd = copy.deepcopy(report)
    odd.modes["ci"]["ce_recovered"] = float("nan")
    again = vpd_lens.EvalReport.from_json(odd.to_json(tmp_path / "odd.json"))
    assert again.modes["ci"]["ce_recovered"] != again.modes["ci"]["ce_recovered"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"modes": {}}', None, "extra"])
def test_damaged_json(report, tmp_path, damage):
    path = tmp_path / "report.json"
    if damage == "extra":
        path.write_text(report.model_dump_json()[:-1] + ', "new": 1}')
    elif damage is not None:
        path.write_text(damage)
    with pytest.raises(ArtefactError, match=r"report\.json"):
        vpd_lens.EvalReport.from_json(path)


def test_the_tables_name_every_site_and_mode(report):
    text = str(report)
    assert all(name in text for name in [*report.n_subcomponents, *report.modes])
    assert "kl_pgd_10=" in repr(report)
    assert "blocks.0.attn.q" in report._repr_html_()


def test_progress_moves_with_every_forward(model, seven, monkeypatch):
    ticks = []
    monkeypatch.setattr(
        "vpd_lens.progress.Progress.advance", lambda bar: ticks.append((bar.title, bar.total))
    )
    vpd_lens.evaluate(model, seven, n_batches=1, **ONE)
    assert ticks.count(("Evaluating", 10 + 3)) == 10 + 3


@pytest.mark.slow
def test_the_page_stands_alone(report, tmp_path):
    beside = copy.deepcopy(report)
    beside.pgd["10"]["mean"] = 12.345
    path = report.to_html(tmp_path / "report.html", "A <title>", beside, "without the adversary")
    page = path.read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    assert "http://" not in page
    assert "https://" not in page
    assert not re.search(r"<script|<link|<img|@import|\bsrc=", page)
    references = set(re.findall(r'(?:href="|url\()([^")]*)', page))
    assert references
    assert all(reference.startswith("#") for reference in references)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert {reference[1:] for reference in references} <= set(ids)
    assert "prefers-color-scheme: dark" in page
    assert "A &lt;title&gt;" in page
    assert "<title>A <title>" not in page
    assert "without the adversary" in page
    assert "12.35" in page or "12.34" in page
    for name in [*report.n_subcomponents, *(mode.replace(">", "&gt;") for mode in report.modes)]:
        assert name in page


@pytest.mark.slow
def test_the_page_of_a_toy_model(tmp_path):
    toy = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 5))
    data = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    vpd_lens.decompose(toy, n_subcomponents=6, example=data)
    report = vpd_lens.evaluate(
        toy, iter([data]), batch_size=8, n_batches=1, pgd_steps=(), progress=False
    )
    assert report.divergence == "mse"
    assert "ce" not in report.modes["zero"]
    with torch.no_grad():
        expected = (toy(data) - toy[1].bias).square().mean()
    assert report.modes["zero"]["kl"] == pytest.approx(float(expected), rel=1e-5)
    page = report.to_html(tmp_path / "toy.html").read_text(encoding="utf-8")
    assert "Unmasked MSE" in page
    assert "cross-entropy" not in page
