"""Exactness of an attached decomposition on every model class, architecture and mode.

Thirteen architectures as `TransformerBridge`, unprocessed and processed; native bridges; and
`HookedTransformer` in its variants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from .builders import ARCHITECTURES, HOOKED, MODES, NATIVE, tokens
from .dense import dense_weights, error, masked_weights, random_masks

COMPONENTS = 5
CASES = [f"bridge-{name}-{mode}" for name in ARCHITECTURES for mode in MODES]
CASES += [f"native-{name}" for name in NATIVE] + [f"hooked-{name}" for name in HOOKED]
GATED = {
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2"),
    *("ln_gated", "rms", "rms_gated", "llama_multi_query", "llama_one_head"),
}
GATED_HOOKED = ("hooked-grouped", "hooked-multi_query")


class Pair(NamedTuple):
    """A decomposed model and its undecomposed reference."""

    case: str
    model: nn.Module
    reference: nn.Module


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest,
    decomposed: Callable[[str], nn.Module],
    undecomposed: Callable[[str], nn.Module],
) -> Pair:
    return Pair(request.param, decomposed(request.param), undecomposed(request.param))


@pytest.fixture
def attached(pair: Pair) -> nn.Module:
    return pair.model


def expected_sites(case: str) -> list[str]:
    _, name = case.split("-")[:2]
    parts = [f"attn.{letter}" for letter in "qkvo"]
    if name in GATED or case in GATED_HOOKED:
        parts += ["mlp.gate"]
    if name not in ("mixtral", "attn_only"):
        parts += ["mlp.in", "mlp.out"]
    return [f"blocks.{layer}.{part}" for layer in range(2) for part in parts]


@torch.no_grad()
def test_attaching_leaves_logits_bit_identical(pair: Pair, attached: nn.Module) -> None:
    assert [site.name for site in attached.vpd.sites] == expected_sites(pair.case)
    assert torch.equal(attached(tokens()), pair.reference(tokens()))


@torch.no_grad()
def test_full_masks_leave_logits_bit_identical(pair: Pair, attached: nn.Module) -> None:
    ones = torch.ones(attached.vpd.layout.total)
    with attached.vpd.masked(ones, delta=1.0):
        assert torch.equal(attached(tokens()), pair.reference(tokens()))


@torch.no_grad()
def test_unmasked_equals_the_weights_swapped_for_v_u(pair: Pair, attached: nn.Module) -> None:
    vpd = attached.vpd
    weights = {name: vpd.v(name) @ vpd.u(name) for name in vpd.layout.names}
    with vpd.masked("unmasked"):
        got = attached(tokens())
    with dense_weights(pair.reference, weights):
        expected = pair.reference(tokens())
    assert error(got, expected) < 1e-4
    assert error(expected, pair.reference(tokens())) > 1e-2, "the swap changed nothing"


@torch.no_grad()
def test_masks_of_a_difference_lead_from_another_weight(pair: Pair, attached: nn.Module) -> None:
    vpd, generator = attached.vpd, torch.Generator().manual_seed(1)
    masks, deltas = random_masks(vpd)
    try:
        for site in vpd.sites:
            noise = torch.randn(site.shape, generator=generator)
            site.origin = site.weight + 0.1 * noise.to(site.weight)
        with vpd.masked(masks, delta=deltas):
            got = attached(tokens())
        left = masked_weights(vpd, masks, deltas)
        weights = {site.name: site.origin + left[site.name] for site in vpd.sites}
    finally:
        for site in vpd.sites:
            site.origin = None
    with dense_weights(pair.reference, weights):
        expected = pair.reference(tokens())
    assert error(got, expected) < 1e-4


@torch.no_grad()
def test_random_masks_equal_dense_weights(pair: Pair, attached: nn.Module) -> None:
    masks, deltas = random_masks(attached.vpd)
    with attached.vpd.masked(masks, delta=deltas):
        got = attached(tokens())
    with dense_weights(pair.reference, masked_weights(attached.vpd, masks, deltas)):
        assert error(got, pair.reference(tokens())) < 1e-4


@torch.no_grad()
def test_masks_per_position_reach_only_that_position(pair: Pair, attached: nn.Module) -> None:
    x = tokens()
    total = attached.vpd.layout.total
    masks = torch.ones(*x.shape, total)
    masks[:, -1] = 0
    with attached.vpd.masked(masks, delta=1.0):
        got = attached(x)
    expected = pair.reference(x)
    assert error(got[:, :-1], expected[:, :-1]) < 1e-5
    assert error(got[:, -1], expected[:, -1]) > 1e-2


@torch.no_grad()
def test_remove_restores_everything(pair: Pair) -> None:
    from vpd_lens.decomposition.attach import attach, remove

    model = pair.reference
    expected = model(tokens())
    before = traces(model)
    attach(model, sites="attn", n_subcomponents=COMPONENTS)
    assert any(".vpd.hook_mask" in name for name in model.hook_dict)
    assert list(model.state_dict()) == before["state"]
    with model.vpd.masked("zero"):
        model(tokens())
    remove(model)
    assert traces(model) == before
    assert torch.equal(model(tokens()), expected)


def traces(model: nn.Module) -> dict[str, object]:
    """Everything of a model that attaching might leave behind."""
    return {
        "hooks": sorted(model.hook_dict),
        "state": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "attributes": set(model.__dict__),
        "registered": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "training": model.training,
    }


def test_mixture_of_experts_is_refused_by_name(build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach
    from vpd_lens.errors import AttachError

    model = build("bridge-mixtral")
    with pytest.raises(AttachError, match=r"blocks\.0\.mlp, blocks\.1\.mlp.*experts"):
        attach(model, n_subcomponents=COMPONENTS)
    assert "vpd" not in model.__dict__
