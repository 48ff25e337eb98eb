"""The authors' own numbers for their checkpoints, reproduced by what is imported from them.

The stored arrays (`data/NOTES.md`) are a part of theirs; where all of them lie beside the
repository, those are checked too.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compat.builders import has_hooked_transformer
from conftest import shared_folder
from safetensors.torch import load_file
from torch.testing import assert_close

import vpd_lens
from vpd_lens.decomposition import Divergence, Masks
from vpd_lens.decomposition.adversary import ascend
from vpd_lens.decomposition.importance import lower_leaky, upper_leaky
from vpd_lens.decomposition.masks import Sources
from vpd_lens.evaluation.metrics import next_token_cross_entropy
from vpd_lens.interop.param_decomp import import_param_decomp, recognise
from vpd_lens.interop.param_decomp.checkpoint import read_checkpoint
from vpd_lens.training.losses import faithfulness
from vpd_lens.training.minimality import Power, minimality, penalty_sum

pytestmark = [
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:no tokenizer:UserWarning"),  # all of theirs come without
]

SHIPPED = Path(__file__).parent / "data" / "param_decomp"
TOYS = sorted(path.parent for path in SHIPPED.glob("layerwise*/*/golden.json"))

# The tolerances that the data comes with.
IMPORTANCE, OUTPUT, KL, LOSS, PGD = 1e-5, 2e-5, 5e-6, 1e-5, 1e-4

MODES = {"unmasked": "all_ones", "ci": "ci", "rounded": "rounded", "zero": "zero"}


class Golden:
    """An imported decomposition, and what the authors' code computes for it."""

    def __init__(self, folder, checkpoint, **arguments):
        self.model = import_param_decomp(checkpoint, **arguments)
        self.vpd = self.model.vpd
        self.paths = recognise(self.model, read_checkpoint(checkpoint).state)
        self.arrays = load_file(folder / "golden.safetensors")
        self.json = json.loads((folder / "golden.json").read_text())
        self.x = self.arrays.get("x", self.arrays.get("tokens"))
        # Masks are kept of some sequences, and results of some of their positions.
        self.sequences = self.arrays.get("sequences", torch.arange(len(self.x)))
        self.positions = self.arrays.get("positions", slice(None))
        with torch.no_grad():
            self.output, self.inputs = self.vpd.target(self.x)
            self.z = self.vpd.pre_importance(self.inputs)

    @property
    def names(self):
        return self.vpd.layout.names

    def by_site(self, prefix):
        return [self.arrays[f"{prefix}.{self.paths[name]}"] for name in self.names]

    def part(self, values):
        """Of values for the whole batch, those that are stored."""
        return self.results(values[self.sequences])

    def results(self, values):
        return values if values.ndim == 2 else values[:, self.positions]

    def assert_close(self, values, expected, tolerance):
        assert_close(self.part(values), expected, atol=tolerance, rtol=0)

    def masks(self, delta, routed):
        components = torch.cat(self.by_site("masks.random"), -1)
        deltas = torch.stack(self.by_site("delta_masks.random"), -1)
        where = torch.stack(self.by_site("routing.subset"), -1) if routed else None
        return Masks(components, deltas if delta else torch.zeros_like(deltas), where)


@pytest.fixture(scope="module", params=["bridge", "hooked_transformer"])
def model_class(request):
    if request.param == "hooked_transformer" and not has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    return request.param


@pytest.fixture(scope="module", params=["shipped", "complete"])
def golden(request, model_class):
    folder = SHIPPED
    if request.param == "complete":
        folder = shared_folder("param_decomp_format")
    folder = folder / "llama_simple_mlp"
    where = {"target": folder / "target", "model_class": model_class}
    return Golden(folder, folder / "decomposition", **where)


def test_the_target(golden):
    golden.assert_close(golden.output, golden.arrays["logits.target"], OUTPUT)
    ce, _ = next_token_cross_entropy(golden.output, golden.x)
    assert ce == pytest.approx(golden.json["target_ce"], abs=KL)


def test_importances_and_activations(golden):
    for kind, values in (
        ("pre_sigmoid", golden.z),
        ("lower_leaky", lower_leaky(golden.z)),
        ("upper_leaky", upper_leaky(golden.z)),
    ):
        golden.assert_close(values, torch.cat(golden.by_site(f"ci.{kind}"), -1), IMPORTANCE)
    acts = golden.vpd.subcomponents.acts(golden.inputs).detach()
    golden.assert_close(acts, torch.cat(golden.by_site("component_acts"), -1), OUTPUT)


@torch.no_grad()
@pytest.mark.parametrize(("mode", "name"), MODES.items())
def test_masking_modes(golden, mode, name):
    with golden.vpd.masked(mode):
        masked = golden.model(golden.x)
    golden.assert_close(masked, golden.arrays[f"logits.{name}"], OUTPUT)
    expected = golden.json["kl_ce_per_logits"][name]
    assert float(Divergence(golden.output)(masked)) == pytest.approx(expected["kl"], abs=KL)
    more = next_token_cross_entropy(masked, golden.x)[0] - golden.json["target_ce"]
    assert more == pytest.approx(expected["ce_difference"], abs=KL)


@torch.no_grad()
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("routed", [True, False])
def test_given_masks(golden, delta, routed):
    masked = golden.vpd.run(golden.masks(delta, routed), golden.x[golden.sequences])
    name = f"random_{'' if delta else 'no_'}delta{'_routed' if routed else ''}"
    assert_close(golden.results(masked), golden.arrays[f"logits.{name}"], atol=OUTPUT, rtol=0)
    if len(masked) == len(golden.x):
        kl = float(Divergence(golden.output)(masked))
        assert kl == pytest.approx(golden.json["kl_ce_per_logits"][name]["kl"], abs=KL)


@torch.no_grad()
def test_all_masks_one_is_the_target(golden):
    ones = Masks(torch.ones(golden.vpd.layout.total), torch.ones(len(golden.names)))
    masked = golden.vpd.run(ones, golden.x)
    golden.assert_close(masked, golden.arrays["logits.all_ones_delta_one"], OUTPUT)


def test_l0(golden):
    g = lower_leaky(golden.z)
    for threshold, expected in golden.json["ci_l0"].items():
        counts = golden.vpd.layout.sum_per_site((g > float(threshold)).float()).mean((0, 1))
        for name, count in zip(golden.names, counts.tolist(), strict=True):
            assert count == pytest.approx(expected[golden.paths[name]], abs=1e-5)
        assert float(counts.sum()) == pytest.approx(expected["total"], abs=1e-4)


@torch.no_grad()
def test_losses(golden):
    vpd, losses = golden.vpd, golden.json["losses"]
    deltas = vpd.subcomponents.deltas([site.weight for site in vpd.sites])
    assert float(faithfulness(deltas)) == pytest.approx(losses["faithfulness"], rel=LOSS)
    for name, delta in zip(golden.names, deltas, strict=True):
        expected = losses["faithfulness_per_module_mse"][golden.paths[name]]
        assert float(delta.square().mean()) == pytest.approx(expected, rel=LOSS)
    for case in golden.json["importance_minimality"]:
        sums = penalty_sum(golden.z, Power(case["effective_p"], case["args"]["eps"]))
        loss = minimality(sums, golden.x.numel(), case["args"]["beta"])
        assert float(loss) == pytest.approx(case["value"], rel=LOSS)


@torch.no_grad()
def test_hidden_activations_under_the_importances(golden):
    vpd, expected = golden.vpd, golden.json["losses"]["ci_hidden_acts_recon"]
    g = lower_leaky(golden.z)
    _, outputs = vpd.run_recording(Masks(g, g.new_zeros(*g.shape[:-1], 12)), golden.x)
    squares = []
    for site, x, y in zip(vpd.sites, golden.inputs, outputs, strict=True):
        squares.append((y - x @ site.weight).square().flatten())
        module = f"CIHiddenActsReconLoss/{golden.paths[site.name]}"
        assert float(squares[-1].mean()) == pytest.approx(expected[module], rel=LOSS)
    total = float(torch.cat(squares).mean())
    assert total == pytest.approx(expected["CIHiddenActsReconLoss"], rel=LOSS)


@pytest.mark.parametrize("tag", ["shared_delta", "shared_no_delta", "unique_delta"])
def test_projected_gradient_descent(golden, tag):
    if f"pgd.{tag}.init.{golden.paths[golden.names[0]]}" not in golden.arrays:
        pytest.skip("sources of every position are in the complete data only")
    expected, with_delta = golden.json["pgd"][tag], tag != "shared_no_delta"
    start, end = (_sources(golden.by_site(f"pgd.{tag}.{when}"), with_delta) for when in _WHEN)
    distance = Divergence(golden.output)

    def loss(masks):
        delta = masks.delta if with_delta else masks.delta * 0
        return distance(golden.vpd.run(replace(masks, delta=delta), golden.x))

    steps = (expected["n_steps"], expected["step_size"])
    with golden.vpd.frozen_subcomponents():
        sources, curve = ascend(loss, lower_leaky(golden.z), start, *steps, checkpoints=range(6))
    losses = [*expected["loss_before_each_step"], expected["final_loss"]]
    assert list(curve.values()) == pytest.approx(losses, rel=PGD)
    assert_close(sources.components, end.components, atol=1e-6, rtol=0)
    assert_close(sources.delta, end.delta, atol=1e-6, rtol=0)


_WHEN = ("init", "final")


def _sources(by_site, with_delta):
    if not with_delta:
        return Sources(torch.cat(by_site, -1), torch.zeros(*by_site[0].shape[:-1], len(by_site)))
    components = torch.cat([source[..., :-1] for source in by_site], -1)
    return Sources(components, torch.stack([source[..., -1] for source in by_site], -1))


def test_evaluation_reports_their_figures(golden):
    report = vpd_lens.evaluate(
        golden.model, golden.x, batch_size=4, seq_len=48, pgd_steps=(), progress=False
    )
    for mode, name in (("unmasked", "all_ones"), ("ci", "ci"), ("zero", "zero")):
        expected = golden.json["kl_ce_per_logits"][name]["kl"]
        assert report.modes[mode]["kl"] == pytest.approx(expected, abs=KL)
    l0 = {float(threshold): value for threshold, value in report.l0.items()}
    assert l0[0.0]["total"] == pytest.approx(golden.json["ci_l0"]["0.0"]["total"], abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("folder", TOYS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_toys(folder):
    golden = Golden(folder, folder)
    arrays, figures, vpd = golden.arrays, golden.json, golden.vpd
    golden.assert_close(golden.output, arrays["out.target"], OUTPUT)
    for name, x in zip(golden.names, golden.inputs, strict=True):
        assert_close(x, arrays[f"inputs.{golden.paths[name]}"], atol=OUTPUT, rtol=0)
    golden.assert_close(golden.z, torch.cat(golden.by_site("ci.pre_sigmoid"), -1), IMPORTANCE)
    upper = torch.cat(golden.by_site("ci.upper_leaky"), -1)
    golden.assert_close(upper_leaky(golden.z), upper, IMPORTANCE)
    acts = torch.cat(golden.by_site("component_acts"), -1)
    golden.assert_close(vpd.subcomponents.acts(golden.inputs), acts, OUTPUT)
    distance = Divergence(golden.output, "mse")
    for mode, name in MODES.items():
        if f"out.{name}" in arrays:
            with vpd.masked(mode):
                masked = golden.model(golden.x)
            golden.assert_close(masked, arrays[f"out.{name}"], OUTPUT)
            if "mse" in figures:
                assert float(distance(masked)) == pytest.approx(figures["mse"][name], rel=1e-4)
    for routed in (False, True):
        if (expected := arrays.get(f"out.random_delta{'_routed' * routed}")) is not None:
            golden.assert_close(vpd.run(golden.masks(True, routed), golden.x), expected, OUTPUT)
    deltas = vpd.subcomponents.deltas([site.weight for site in vpd.sites])
    assert float(faithfulness(deltas)) == pytest.approx(figures["faithfulness"], rel=LOSS)
    for case in figures.get("importance_minimality", []):
        sums = penalty_sum(golden.z, Power(case["pnorm"]))
        loss = minimality(sums, len(golden.x), case["beta"])
        assert float(loss) == pytest.approx(case["value"], rel=LOSS)
    for threshold, expected in figures.get("ci_l0", {}).items():
        counts = vpd.layout.sum_per_site((lower_leaky(golden.z) > float(threshold)).float())
        for name, count in zip(golden.names, counts.mean(0).tolist(), strict=True):
            assert count == pytest.approx(expected[golden.paths[name]], abs=1e-5)
