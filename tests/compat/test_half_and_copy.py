"""bf16 models, and copies of a decomposed model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from .builders import tokens
from .dense import error, random_masks

CASES = [
    *("bridge-gpt2-default", "bridge-gemma2-unprocessed"),
    *("native-ln", "hooked-ln", "hooked-grouped"),
]
MODES = ["unmasked", "stochastic", "adversarial", "ci", "rounded", "random", "zero"]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_bf16(case: str, build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach

    model = build(case, dtype=torch.bfloat16)
    before = model(tokens())
    attach(model, n_subcomponents=5)
    vpd = model.vpd
    assert torch.equal(model(tokens()), before)
    assert {p.dtype for p in vpd.parameters()} == {torch.float32}
    with vpd.masked(torch.ones(vpd.layout.total), delta=1.0):
        assert torch.equal(model(tokens()), before)
    for mode in MODES:
        with vpd.masked(mode, seed=0, n_steps=1):
            got = model(tokens())
        assert got.dtype == before.dtype
        assert torch.isfinite(got).all(), mode
        assert not torch.equal(got, before), mode
    _, cache = model.run_with_cache(tokens())
    assert cache["blocks.0.attn.q.vpd.hook_acts"].shape == (2, 6, 5)


@pytest.mark.parametrize("case", ["bridge-gpt2-default", "hooked-ln"])
@torch.no_grad()
def test_bf16_masks_agree_with_fp32(
    case: str, build: Callable[..., nn.Module], decomposed: Callable[[str], nn.Module]
) -> None:
    from vpd_lens.decomposition.attach import attach

    half = attach(build(case, dtype=torch.bfloat16), n_subcomponents=5)
    full = decomposed(case)
    masks, deltas = random_masks(full.vpd)
    with half.vpd.masked(masks, delta=deltas), full.vpd.masked(masks, delta=deltas):
        assert error(half(tokens()).float(), full(tokens())) < 0.1


COPIED = [
    *("bridge-gpt2-default", "bridge-llama-processed", "bridge-opt-default"),
    *("native-ln", "hooked-ln", "hooked-grouped"),
]


@pytest.mark.parametrize("case", COPIED)
@torch.no_grad()
def test_a_deep_copy_is_a_decomposed_model_of_its_own(
    case: str, build: Callable[..., nn.Module]
) -> None:
    from vpd_lens.decomposition.attach import attach, remove

    model = attach(build(case), n_subcomponents=5)
    twin = copy.deepcopy(model)
    assert twin.vpd is not model.vpd
    assert twin.vpd.model is twin
    x = tokens()
    plain = model(x)
    assert torch.equal(twin(x), plain)
    masks, deltas = random_masks(model.vpd)
    with model.vpd.masked(masks, delta=deltas):
        masked = model(x)
        assert torch.equal(twin(x), plain)
    with twin.vpd.masked(masks, delta=deltas):
        assert torch.equal(twin(x), masked)
        assert torch.equal(model(x), plain)

    name = "blocks.0.attn.q"
    twin.vpd.v(name).mul_(0.5)
    twin.vpd.site(name).weight.mul_(2)
    assert torch.equal(model(x), plain)
    with model.vpd.masked(masks, delta=deltas):
        assert torch.equal(model(x), masked)

    _, cache = twin.run_with_cache(x)
    assert f"{name}.vpd.hook_acts" in cache
    point = f"{name}.vpd.hook_mask"
    ablated = twin.run_with_hooks(x, fwd_hooks=[(point, lambda mask, hook: 0 * mask)])
    assert not torch.equal(ablated, twin(x))

    remove(twin)
    assert "vpd" not in twin.__dict__
    assert not any(".vpd" in hook for hook in twin.hook_dict)
    with model.vpd.masked(masks, delta=deltas):
        assert torch.equal(model(x), masked)
