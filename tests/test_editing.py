"""Edits of write vectors, what they are fitted to, and what else they change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_bridge
from torch import Tensor, nn

import vpd_lens
from vpd_lens import plots
from vpd_lens.baselines.lora import LoRA
from vpd_lens.decomposition.attach import attach
from vpd_lens.editing import Rescale, Rewrite, Swap, toward
from vpd_lens.editing.effects import AFTER, AROUND, AT, ELSEWHERE, regimes
from vpd_lens.editing.goal import goal_of
from vpd_lens.errors import ArtefactError, ConfigError, DataError, InputError, VPDError

OUT, IN = "blocks.1.mlp.out", "blocks.1.mlp.in"

pytestmark = pytest.mark.filterwarnings("ignore:this decomposition is untrained")


@pytest.fixture(scope="module")
def edited_model() -> nn.Module:
    """Left by every test as it was found."""
    importance = vpd_lens.CausalImportanceConfig(
        kind="transformer", d_model=16, n_blocks=1, n_heads=2
    )
    return attach(tiny_bridge(), n_subcomponents=6, importance=importance)


@pytest.fixture
def rows() -> Tensor:
    return torch.randint(0, 29, (6, 8), generator=torch.Generator().manual_seed(2))


# ----------------------------------------------------------------------- at run time


@torch.no_grad()
def test_edits_act_on_masks_and_activations_as_other_hooks_leave_them(
    edited_model: Any, rows: Tensor
) -> None:
    """Under masks, after an edit of activations, and after a hook that comes later."""
    model, vpd = edited_model, edited_model.vpd
    write = torch.randn(16, generator=torch.Generator().manual_seed(0))
    u = vpd.u(OUT).detach().clone()
    mask = torch.rand(6, 8, vpd.layout.total, generator=torch.Generator().manual_seed(1))

    def halve(acts: Tensor, hook: Any) -> Tensor:
        return 0.5 * acts

    hooks = [(f"{OUT}.vpd.hook_acts", halve)]
    with vpd.masked(mask, delta=0.3), vpd_lens.edited(model, Rewrite(f"{OUT}:2", write)):
        got = model.run_with_hooks(rows, fwd_hooks=hooks)
    column = vpd.layout.columns(OUT).start + 2
    added: dict[str, Tensor] = {}

    def keep(acts: Tensor, hook: Any) -> None:
        added["y"] = (acts[..., 2] * mask[..., column])[..., None] * (write - u[2])

    def add(y: Tensor, hook: Any) -> Tensor:
        return y + added["y"]

    hooks += [(f"{OUT}.vpd.hook_acts", keep), (f"{OUT}.vpd.hook_out", add)]
    with vpd.masked(mask, delta=0.3):
        expected = model.run_with_hooks(rows, fwd_hooks=hooks)
        assert float((model(rows) - expected).abs().max()) > 1e-2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rescaling_is_scaling_and_positions_hold(edited_model: Any, rows: Tensor) -> None:
    model = edited_model
    for factor in (0.0, -2.0):
        with vpd_lens.edited(model, vpd_lens.Scale(f"{IN}:3", factor, slice(2, 5))):
            expected = model(rows)
        with vpd_lens.edited(model, Rescale(f"{IN}:3", factor, positions=slice(2, 5))):
            torch.testing.assert_close(model(rows), expected, atol=1e-5, rtol=1e-5)
    with vpd_lens.edited(model, Rescale(f"{IN}:3@4", -2.0)):
        assert torch.equal(model(rows)[:, :4], model(rows)[:, :4])
    apart = [Rescale(f"{IN}:3@1", 0.0), Rescale(f"{IN}:3@4", 2.0)]
    with vpd_lens.edited(model, apart):
        one = model(rows)
    with vpd_lens.edited(model, [vpd_lens.Ablate(f"{IN}:3@1"), vpd_lens.Scale(f"{IN}:3@4", 2.0)]):
        torch.testing.assert_close(one, model(rows), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_swapping_twice_in_the_weights_is_nothing(edited_model: Any, rows: Tensor) -> None:
    swap, before = Swap(f"{OUT}:0", "blocks.0.attn.o:1"), edited_model(rows)
    with vpd_lens.baked(edited_model, swap):
        assert float((edited_model(rows) - before).abs().max()) > 1e-2
        with vpd_lens.baked(edited_model, swap):
            torch.testing.assert_close(edited_model(rows), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(edited_model(rows), before)


@torch.no_grad()
def test_baked_edits_keep_the_delta_and_hold_under_masks(edited_model: Any, rows: Tensor) -> None:
    model, vpd = edited_model, edited_model.vpd
    edits = [Rescale(f"{OUT}:1", -1.0), vpd_lens.Ablate(f"{OUT}:3")]
    delta = vpd.delta(OUT)
    with vpd.masked("unmasked"), vpd_lens.edited(model, edits):
        expected = model(rows)
    with vpd_lens.baked(model, edits):
        torch.testing.assert_close(vpd.delta(OUT), delta, atol=1e-5, rtol=1e-5)
        with vpd.masked("unmasked"):
            torch.testing.assert_close(model(rows), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError), vpd_lens.baked(model, edits):
        raise RuntimeError
    assert torch.equal(vpd.delta(OUT), delta)


def test_what_contradicts_or_does_not_fit_is_refused(edited_model: Any, tmp_path: Any) -> None:
    model, one = edited_model, f"{OUT}:1"
    for edits, message in [
        ([Rescale(one, 0.0), Rewrite(one, torch.zeros(16))], r"Rescale\(.*and by Rewrite\("),
        ([Swap(one, f"{OUT}:2"), Rescale([f"{OUT}:2"], 2.0)], "two new write vectors"),
        (Rewrite(one, torch.zeros(15)), "expected 16 finite numbers"),
        (Rescale([one], [1.0, 2.0]), "2 factors for 1 subcomponents"),
        (Swap(one, f"{IN}:0"), "writes 16 numbers and"),
        (Rescale(f"{OUT}:6"), "has 6 subcomponents"),
        (Rescale("blocks.9.mlp.out:0"), "no site"),
    ]:
        with pytest.raises(InputError, match=message), vpd_lens.edited(model, edits):
            pass
        with pytest.raises(InputError, match=message):
            vpd_lens.bake(model, edits)
    for edit, message in [
        (Rescale(one, positions=3), "depends on the position"),
        (vpd_lens.Ablate(f"{one}@3"), "depends on the position"),
        (vpd_lens.Patch(one, [1, 2]), "depends on the position"),
        (Rescale(one, above=0.1), "depends on the importance"),
    ]:
        with pytest.raises(InputError, match=message):
            vpd_lens.bake(model, edit)
    with pytest.raises(VPDError, match="masks are active"), model.vpd.masked("ci"):
        vpd_lens.bake(model, Rescale(one))
    gated = Rescale(one, above=0.1)
    too_late = pytest.raises(VPDError, match="importances of these positions")
    with too_late, vpd_lens.edited(model, gated), model.vpd.masked("target"):
        model(torch.zeros(1, 4, dtype=torch.long))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    from vpd_lens.exporting import save_model

    with pytest.raises(ArtefactError, match="something else than a model"):
        save_model(model, tmp_path / "mine")
    with pytest.raises(ConfigError, match="expected a HookedTransformer"):
        save_model(nn.Linear(2, 2), tmp_path / "linear")


# ---------------------------------------------------------------------------- fitting


def test_the_goal_is_its_formula_and_gradients_those_of_a_dense_weight(
    edited_model: Any, rows: Tensor
) -> None:
    """Of a LoRA and of a write vector, against the model with `W + A B` in the place of `W`."""
    model, vpd = edited_model, edited_model.vpd
    at = torch.zeros_like(rows, dtype=torch.bool)
    at[:, 4] = True
    goal = goal_of(model, rows, 7, at, weight=0.5)
    adapter = LoRA(model, [OUT], rank=2)
    with torch.no_grad():
        adapter.b[OUT].normal_(generator=torch.Generator().manual_seed(0))
    with vpd.frozen_subcomponents():
        loss = goal.loss(vpd, adapter.on, 6, torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(loss, adapter.parameters)
    a, b = (p.detach().clone().requires_grad_() for p in adapter.parameters)
    clean = model(rows).detach().log_softmax(-1)
    weight = vpd.site(OUT).weight

    def dense(y: Tensor, hook: Any) -> Tensor:
        return y + (inputs["x"] @ (weight + a @ b) - inputs["x"] @ weight)

    inputs: dict[str, Tensor] = {}

    def read(x: Tensor, hook: Any) -> None:
        inputs["x"] = x

    hooks = [("blocks.1.mlp.out.hook_in", read), (f"{OUT}.vpd.hook_out", dense)]
    log_q = model.run_with_hooks(rows, fwd_hooks=hooks).log_softmax(-1)
    kl = (clean.exp() * (clean - log_q)).sum(-1)[~at].mean()
    expected = -log_q[at][:, 7].mean() + 0.5 * kl
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for got, want in zip(gradients, torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_fit_reaches_its_goal_and_leaves_the_model_alone(edited_model: Any, rows: Tensor) -> None:
    model, before = edited_model, edited_model(rows).detach()
    fit = vpd_lens.fit_edit(model, f"{OUT}:2", rows[:1], 7, weight=0.0, lr=2.0, steps=30)
    assert torch.equal(model(rows), before)
    assert all(p.grad is None for p in model.vpd.parameters())
    with vpd_lens.edited(model, fit.edit), torch.no_grad():
        after = model(rows[:1])[0, -1].softmax(-1)[7]
    assert fit.losses[-1] < fit.losses[0]
    assert float(after) > 3 * float(before[0, -1].softmax(-1)[7])
    names = [f"{OUT}:{c}" for c in range(3)]
    scales = vpd_lens.fit_edit(model, names, rows, what="scale", retain=rows, steps=20)
    assert len(scales.edit.factor) == 3  # type: ignore[arg-type]
    assert scales.losses[-1] < scales.losses[0]
    assert "loss" in str(scales)
    again = vpd_lens.fit_edit(model, names, rows, what="scale", retain=rows, steps=20)
    assert again.losses == scales.losses


def test_what_cannot_be_fitted_is_refused(edited_model: Any, rows: Tensor) -> None:
    fit, name = vpd_lens.fit_edit, f"{OUT}:2"
    with pytest.raises(DataError, match="examples are empty"):
        fit(edited_model, name, [], 7)
    with pytest.raises(DataError):
        fit(edited_model, name, rows, 7, retain=rows[:0])
    with pytest.raises(InputError, match="expected 'write' with one"):
        fit(edited_model, [name, f"{OUT}:3"], rows, 7)
    with pytest.raises(InputError, match="expected 'last' or a mask"):
        fit(edited_model, name, rows, 7, where="first")
    with pytest.raises(InputError, match="expected a mask of shape"):
        fit(edited_model, name, rows, 7, where=torch.ones(2, 2).bool())
    with pytest.raises(InputError, match="steps=0"):
        fit(edited_model, name, rows, 7, steps=0)
    with pytest.raises(InputError, match="rank=0"):
        LoRA(edited_model, rank=0)
    with pytest.raises(InputError, match="no site named"):
        LoRA(edited_model, ["blocks.7.mlp.out"])


# ----------------------------------------------------------------------- side effects


def test_regimes_of_a_row_by_hand() -> None:
    acts = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, 1, 0]]).bool()
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1, 0]]).bool()
    found = regimes(acts, real, after=2, around=3)
    expected = {
        AT: [0, 0, 0, 1, 0, 0, 0, 0, 1, 0],
        AFTER: [0, 0, 0, 0, 1, 1, 0, 0, 0, 0],
        AROUND: [1, 1, 1, 0, 1, 1, 1, 1, 0, 0],
        ELSEWHERE: [1, 1, 1, 0, 1, 1, 1, 1, 0, 0],
    }
    assert {name: at[0].int().tolist() for name, at in found.items()} == expected


@torch.no_grad()
def test_side_effects_are_means_over_positions_with_errors_over_sequences(
    edited_model: Any, rows: Tensor
) -> None:
    model, edit = edited_model, Rescale(f"{OUT}:1", -4.0)

    def where(tokens: Tensor) -> Tensor:
        return tokens > 20

    data = {"first": rows[:4], "second": rows[4:]}
    settings = {"where": where, "batch_size": 3, "after": 2, "around": 3, "progress": False}
    found = vpd_lens.side_effects(model, edit, data, 7, **settings)
    clean = model(rows).log_softmax(-1)
    with vpd_lens.edited(model, edit):
        new = model(rows).log_softmax(-1)
    kl = (clean.exp() * (clean - new)).sum(-1)
    at = where(rows)
    assert found.kl[AT].mean == pytest.approx(float(kl[at].mean()), rel=1e-3)
    assert found.kl[ELSEWHERE].mean == pytest.approx(float(kl[~at].mean()), rel=1e-3)
    assert found.kl[ELSEWHERE].n == int((~at).sum())
    assert found.target["after"].mean == pytest.approx(float(new.exp()[at][:, 7].mean()), rel=1e-3)
    # The error of a ratio of sums over sequences.
    sums, counts = (kl * ~at).sum(1), (~at).sum(1)
    residuals = sums - found.kl[ELSEWHERE].mean * counts
    error = math.sqrt(float(residuals.square().sum()) * 6 / 5) / int(counts.sum())
    assert found.kl[ELSEWHERE].error == pytest.approx(error, rel=1e-3)
    losses = [F.nll_loss(p[4:, :-1].flatten(0, 1), rows[4:, 1:].flatten()) for p in (clean, new)]
    cost = found.cost["second"]
    assert cost.before == pytest.approx(math.exp(float(losses[0])), rel=1e-4)
    assert cost.rise.mean == pytest.approx(float(losses[1] - losses[0]), abs=1e-5)
    assert "everywhere else" in str(found)
    shown = [measured for measured in found.kl.values() if measured.n]
    assert len(plots.side_effects(found).axes[0].patches) == len(shown)
    nothing = vpd_lens.side_effects(model, Rescale(f"{OUT}:1", 1.0), rows, **settings)
    assert abs(nothing.kl[ELSEWHERE].mean) < 1e-6
    assert not nothing.target


def test_side_effects_say_what_is_missing(edited_model: Any, rows: Tensor) -> None:
    edit = Rescale(f"{OUT}:1")
    with pytest.raises(DataError):
        vpd_lens.side_effects(edited_model, edit, rows[:0], progress=False)
    with pytest.raises(InputError, match="nothing says where"):
        vpd_lens.side_effects(edited_model, LoRA(edited_model).on, rows, progress=False)
    with pytest.raises(InputError, match="where is empty"):
        vpd_lens.side_effects(edited_model, edit, rows, where=[], progress=False)


# ---------------------------------------------------------------------------- finding


def test_subcomponents_are_found_by_what_their_firings_predict(
    edited_model: Any, rows: Tensor
) -> None:
    model, vpd = edited_model, edited_model.vpd
    harvest = vpd_lens.harvest(
        model, rows, batch_size=3, n_batches=2, threshold=0.3, progress=False
    )
    found = vpd_lens.find_subcomponents(model, harvest, token=7, least=0.0, k=5)
    best: dict[str, float] = {}
    for site in vpd.layout.names:
        for index in range(6):
            tokens = harvest.tokens(site, index, "output", 29)
            best |= {f"{site}:{index}": t.pmi for t in tokens if t.token == 7}
    expected = sorted((pmi for pmi in best.values() if pmi > 0), reverse=True)[:5]
    assert [score for _, score in found] == pytest.approx(expected)
    assert all(best[name] == pytest.approx(score) for name, score in found)
    g = vpd.causal_importance(rows)
    odd = rows % 2 == 1
    found = vpd_lens.find_subcomponents(
        model, contrast=(rows, rows), where=lambda tokens: tokens % 2 == 1, k=1
    )
    difference = g[odd].mean(0) - g.flatten(0, 1).mean(0)
    assert found[0].score == pytest.approx(float(difference.max()), abs=1e-6)
    labels = {f"{OUT}:3": "closing brackets", f"{IN}:0": "names"}
    assert vpd_lens.find_subcomponents(model, label="bracket", labels=labels) == [(f"{OUT}:3", 1.0)]
    by_text = vpd_lens.find_subcomponents(model, harvest, text=".", k=3)
    assert all(score == 1.0 for _, score in by_text)
    for question, message in [
        ({}, "give exactly one"),
        ({"token": 7, "label": "x"}, "give exactly one"),
        ({"token": 7}, "needs harvest"),
        ({"label": "x"}, "needs labels"),
    ]:
        with pytest.raises(InputError, match=message):
            vpd_lens.find_subcomponents(model, **question)
    with pytest.raises(DataError):
        vpd_lens.find_subcomponents(model, contrast=(rows, rows[:0]))


def test_toward_raises_a_logit_with_the_sign_of_the_firing(edited_model: Any, rows: Tensor) -> None:
    """Directly, through the final norm; and clear of what later matrices read."""
    from vpd_lens.analysis.reads_writes import Directions

    model, vpd = edited_model, edited_model.vpd
    harvest = vpd_lens.harvest(
        model, rows, batch_size=3, n_batches=2, threshold=0.3, progress=False
    )
    directions, site = Directions(vpd), "blocks.0.mlp.out"
    fired = harvest.usage.signed[vpd.layout.columns(site)].nonzero().flatten().tolist()
    for index in fired[:2]:
        name, old = f"{site}:{index}", vpd.u(site)[index].detach()
        edit = toward(model, name, 7, harvest, 2.0)
        added, u = edit.write - old, directions.towards(7)
        assert float(added.norm()) == pytest.approx(2 * float(old.norm()), rel=1e-4)
        sign = float(harvest.usage.signed[vpd.layout.columns(site)][index])
        assert float(F.cosine_similarity(added, u, dim=0)) * sign > 0
        clear = toward(model, name, 7, harvest, 2.0, keep=False, clear_of=3).write
        strongest = torch.linalg.svd(directions.read_after(site)).Vh[:3]
        assert float((strongest @ clear).abs().max()) < 1e-4 * float(clear.norm())
    with pytest.raises(InputError, match="does not write to the residual stream"):
        toward(model, f"{IN}:0", 7, harvest)
    with pytest.raises(InputError, match="ask for fewer"):
        toward(model, f"{site}:{fired[0]}", 7, harvest, clear_of=16)
