"""The five hook points of a site, seen and edited by the ordinary TransformerLens verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from .builders import tokens
from .dense import dense_weights, error, masked_weights, random_masks

C = 5
CASES = [
    "bridge-gpt2-default",
    "bridge-llama-processed",
    "native-ln",
    "hooked-ln",
    "hooked-grouped",
]
SITES = ["blocks.0.attn.q", "blocks.1.attn.v", "blocks.0.mlp.out"]
POINTS = ("hook_acts", "hook_ci", "hook_mask", "hook_delta_mask", "hook_out")


class Pair(NamedTuple):
    """A decomposed model and its undecomposed reference."""

    model: nn.Module
    reference: nn.Module


@pytest.fixture(scope="module", params=CASES)
def built(
    request: pytest.FixtureRequest,
    decomposed: Callable[[str], nn.Module],
    undecomposed: Callable[[str], nn.Module],
) -> Pair:
    return Pair(decomposed(request.param), undecomposed(request.param))


@pytest.fixture
def pair(built: Pair) -> Iterator[Pair]:
    yield built
    built.model.reset_hooks()


def hooked_run(model: nn.Module, point: str, function: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens(), fwd_hooks=[(point, function)])


@torch.no_grad()
def dense_run(reference: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    with dense_weights(reference, weights):
        return reference(tokens())


def test_every_site_has_five_hook_points(pair: Pair) -> None:
    vpd = pair.model.vpd
    expected = {f"{name}.vpd.{point}" for name in vpd.layout.names for point in POINTS}
    assert expected == {name for name in pair.model.hook_dict if ".vpd." in name}
    assert set(SITES) <= set(vpd.layout.names)


@torch.no_grad()
def test_cache_holds_the_right_values_and_shapes(pair: Pair) -> None:
    model, x = pair.model, tokens()
    vpd = model.vpd
    importances = vpd.layout.split(vpd.causal_importance(x))
    _, inputs = vpd.target(x)
    logits, cache = model.run_with_cache(x)
    assert torch.equal(logits, pair.reference(x))
    for site, read, importance in zip(vpd.sites, inputs, importances, strict=True):
        seen = {point: cache[f"{site.name}.vpd.{point}"] for point in POINTS}
        assert error(seen["hook_acts"], read @ vpd.v(site.name)) < 1e-6
        assert torch.equal(seen["hook_ci"], importance)
        assert torch.equal(seen["hook_mask"], torch.ones(*x.shape, C))
        assert torch.equal(seen["hook_delta_mask"], torch.ones(*x.shape, 1))
        bias = 0 if site.bias is None else site.bias
        assert error(seen["hook_out"], read @ site.weight + bias) < 1e-5
        assert seen["hook_out"].shape == (*x.shape, site.shape[1])


@torch.no_grad()
def test_cache_under_masks_holds_the_masks_in_use(pair: Pair) -> None:
    model, x = pair.model, tokens()
    masks, deltas = random_masks(model.vpd)
    with model.vpd.masked(masks, delta=deltas):
        plain = model(x)
        logits, cache = model.run_with_cache(x)
    assert error(logits, plain) < 1e-5
    for name in SITES:
        assert torch.equal(cache[f"{name}.vpd.hook_mask"], masks[name].expand(*x.shape, C))
        expected = torch.full((*x.shape, 1), deltas[name])
        assert torch.equal(cache[f"{name}.vpd.hook_delta_mask"], expected)


@torch.no_grad()
def test_names_filter(pair: Pair) -> None:
    wanted = "blocks.0.attn.q.vpd.hook_mask"
    for names_filter in (wanted, [wanted], lambda name: name == wanted):
        logits, cache = pair.model.run_with_cache(tokens(), names_filter=names_filter)
        assert list(cache.keys()) == [wanted]
        assert torch.equal(logits, pair.reference(tokens()))


@pytest.mark.parametrize("site", SITES)
def test_zeroing_a_mask_ablates_one_subcomponent(pair: Pair, site: str) -> None:
    vpd = pair.model.vpd

    def ablate(mask: Tensor, hook: Any) -> Tensor:
        return mask * torch.tensor([1.0, 1, 1, 0, 1])

    weight = vpd.site(site).weight - torch.outer(vpd.v(site)[:, 3], vpd.u(site)[3]).detach()
    got = hooked_run(pair.model, f"{site}.vpd.hook_mask", ablate)
    assert error(got, dense_run(pair.reference, {site: weight})) < 1e-5
    assert error(got, pair.reference(tokens())) > 1e-4


@pytest.mark.parametrize("site", SITES)
def test_zeroing_the_delta_mask_leaves_v_u(pair: Pair, site: str) -> None:
    vpd = pair.model.vpd
    got = hooked_run(pair.model, f"{site}.vpd.hook_delta_mask", lambda m, hook: 0 * m)
    weight = (vpd.v(site) @ vpd.u(site)).detach()
    assert error(got, dense_run(pair.reference, {site: weight})) < 1e-4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_scaling_acts_steers_without_touching_the_delta(
    pair: Pair, site: str, masked: bool
) -> None:
    model, vpd = pair.model, pair.model.vpd
    scale = torch.tensor([1.0, -2.0, 1.0, 3.0, 0.5])
    masks, deltas = random_masks(vpd)
    if not masked:
        masks = {name: torch.ones(C) for name in masks}
        deltas = dict.fromkeys(deltas, 1.0)
    with vpd.masked(masks, delta=deltas):
        got = hooked_run(model, f"{site}.vpd.hook_acts", lambda acts, hook: acts * scale)
    scaled = {**masks, site: masks[site] * scale}
    expected = dense_run(pair.reference, masked_weights(vpd, scaled, deltas))
    assert error(got, expected) < 1e-4
    if not masked:
        outside = hooked_run(model, f"{site}.vpd.hook_acts", lambda acts, hook: acts * scale)
        assert error(outside, expected) < 1e-4


@pytest.mark.parametrize("point", ["hook_acts", "hook_mask", "hook_delta_mask", "hook_out"])
@pytest.mark.parametrize("masked", [False, True])
def test_editing_in_place_equals_returning_a_new_tensor(
    pair: Pair, point: str, masked: bool
) -> None:
    model, name = pair.model, f"blocks.0.attn.v.vpd.{point}"
    masks, deltas = random_masks(model.vpd) if masked else ({}, {})

    def in_place(x: Tensor, hook: Any) -> None:
        x[:, 1:3].mul_(0.5)

    def anew(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, 1:3] *= 0.5
        return x

    with model.vpd.masked(masks, delta=deltas):
        plain = model(tokens()).detach()
        got = hooked_run(model, name, in_place)
        assert torch.equal(got, hooked_run(model, name, anew))
        assert error(got, plain) > 1e-4
        # The edit lasted for one call: neither masks nor weights were written to.
        assert torch.equal(model(tokens()), plain)


def test_edits_in_place_do_not_reach_the_masks_of_the_user(pair: Pair) -> None:
    model = pair.model
    masks = torch.rand(*tokens().shape, model.vpd.layout.total)
    before = masks.clone()

    def zero(mask: Tensor, hook: Any) -> None:
        mask.zero_()

    with model.vpd.masked(masks):
        plain = model(tokens())
        assert not torch.equal(hooked_run(model, "blocks.0.attn.q.vpd.hook_mask", zero), plain)
        assert torch.equal(model(tokens()), plain)
    assert torch.equal(masks, before)


@torch.no_grad()
def test_editing_hook_ci_changes_the_masks_that_follow(pair: Pair) -> None:
    model, vpd = pair.model, pair.model.vpd
    importance = vpd.causal_importance(tokens())
    columns = vpd.layout.columns("blocks.1.mlp.out")
    edited = importance.clone()
    edited[..., columns] *= 0.5
    with vpd.masked("ci"):
        got = hooked_run(model, "blocks.1.mlp.out.vpd.hook_ci", lambda ci, hook: 0.5 * ci)
        plain = model(tokens())
    with vpd.masked(edited, delta=0.0):
        assert torch.equal(got, model(tokens()))
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_acts_is_the_output_gradient_through_u(pair: Pair, masked: bool) -> None:
    model, vpd = pair.model, pair.model.vpd
    masks, deltas = random_masks(vpd) if masked else ({}, {})
    gradients: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        gradients[hook.name] = gradient.clone()

    points = [f"{site}.vpd.{point}" for site in SITES for point in ("hook_acts", "hook_out")]
    with (
        vpd.masked(masks, delta=deltas),
        model.hooks(bwd_hooks=[(name, keep) for name in points]),
    ):
        model(tokens())[:, -1, 7].sum().backward()
    vpd.zero_grad()
    for site in SITES:
        expected = gradients[f"{site}.vpd.hook_out"] @ vpd.u(site).T
        expected = expected * (masks[site] if masked else 1.0)
        assert expected.abs().max() > 0
        assert error(gradients[f"{site}.vpd.hook_acts"], expected) < 1e-4


def test_backward_hooks_leave_logits_almost_untouched(pair: Pair) -> None:
    point = "blocks.0.attn.q.vpd.hook_acts"
    with pair.model.hooks(bwd_hooks=[(point, lambda gradient, hook: None)]):
        assert error(pair.model(tokens()), pair.reference(tokens())) < 1e-5


@torch.no_grad()
def test_stop_at_layer(pair: Pair) -> None:
    model, vpd, x = pair.model, pair.model.vpd, tokens()
    assert torch.equal(model(x, stop_at_layer=1), pair.reference(x, stop_at_layer=1))
    masks, deltas = random_masks(vpd)
    with vpd.masked(masks, delta=deltas):
        got, cache = model.run_with_cache(x, stop_at_layer=1)
        assert torch.equal(model(x, stop_at_layer=0), pair.reference(x, stop_at_layer=0))
    with dense_weights(pair.reference, masked_weights(vpd, masks, deltas)):
        assert error(got, pair.reference(x, stop_at_layer=1)) < 1e-4
    assert "blocks.0.mlp.out.vpd.hook_mask" in cache
    assert "blocks.1.attn.q.vpd.hook_mask" not in cache


@pytest.mark.parametrize("mode", ["ci", "rounded", "stochastic", "adversarial"])
@torch.no_grad()
def test_stop_at_layer_under_masks_that_need_importances(pair: Pair, mode: str) -> None:
    model, vpd, x = pair.model, pair.model.vpd, tokens()
    with vpd.masked(mode, seed=3, n_steps=2):
        stopped = model(x, stop_at_layer=1)
    with vpd.masked(mode, seed=3, n_steps=2):
        _, cache = model.run_with_cache(x, names_filter="blocks.1.hook_resid_pre")
    assert torch.equal(stopped, cache["blocks.1.hook_resid_pre"])
