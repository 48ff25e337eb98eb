"""TransformerLens' own helpers give on a decomposed model what they give on the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from .builders import tokens
from .dense import random_masks

CASES = ["bridge-gpt2-default", "bridge-llama-processed", "native-ln", "hooked-ln", "hooked-rms"]


class Pair(NamedTuple):
    """A decomposed model and its undecomposed reference."""

    model: nn.Module
    reference: nn.Module


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest,
    decomposed: Callable[[str], nn.Module],
    undecomposed: Callable[[str], nn.Module],
) -> Pair:
    return Pair(decomposed(request.param), undecomposed(request.param))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"remove_batch_dim": True}, {"pos_slice": 2}, {"pos_slice": (1, 4)}],
    ids=str,
)
def test_caches(pair: Pair, arguments: dict[str, Any]) -> None:
    with torch.no_grad():
        try:
            expected, reference = pair.reference.run_with_cache(tokens(1), **arguments)
        except IndexError:
            pytest.skip("TransformerLens cannot slice the cache of this bridge, decomposed or not")
        logits, cache = pair.model.run_with_cache(tokens(1), **arguments)
    assert torch.equal(logits, expected)
    for name, value in reference.items():
        assert torch.equal(cache[name], value), name
    shape = cache["blocks.0.hook_resid_pre"].shape[:-1]
    for point in ("hook_acts", "hook_mask", "hook_delta_mask", "hook_out", "hook_ci"):
        assert cache[f"blocks.0.mlp.out.vpd.{point}"].shape[:-1] == shape


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """What `run_with_cache(incl_bwd=True)` stores of the backward pass."""
    _, cache = model.run_with_cache(tokens(1), return_type="loss", incl_bwd=True)
    model.zero_grad()
    return {k: v for k, v in cache.items() if k.endswith("_grad") and ".vpd." not in k}


def test_gradients_of_the_cache(pair: Pair) -> None:
    expected = gradients(pair.reference)
    got = gradients(pair.model)
    assert expected
    assert got.keys() >= expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_attribution_patching(pair: Pair) -> None:
    """A backward hook at an ordinary hook point fires, although the weights are frozen."""

    def gradient(model: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        hooks = [("blocks.1.hook_resid_pre", lambda g, hook: seen.append(g.clone()))]
        with model.hooks(bwd_hooks=hooks):
            model(tokens(1), return_type="loss").backward()
        model.zero_grad()
        return seen[0]

    torch.testing.assert_close(gradient(pair.model), gradient(pair.reference))


def test_patching(pair: Pair) -> None:
    from transformer_lens import patching

    clean, corrupted = tokens(1, seed=0), tokens(1, seed=1)

    def patched(model: nn.Module) -> Tensor:
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)
            return patching.get_act_patch_resid_pre(
                model, corrupted, cache, lambda logits: logits[0, -1, 7]
            )

    assert torch.equal(patched(pair.model), patched(pair.reference))


def heads_and_output(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The sum of all heads' results, and the sum of the attention outputs."""
    _, cache = model.run_with_cache(tokens(1))
    layers = range(model.cfg.n_layers)
    biases = sum(b for layer in layers if (b := model.blocks[layer].attn.b_O) is not None)
    output = sum(cache[f"blocks.{layer}.hook_attn_out"] for layer in layers)
    return cache.stack_head_results(layer=-1).sum(0), output - biases


def test_heads_add_up_to_the_attention(pair: Pair) -> None:
    with torch.no_grad():
        heads, output = heads_and_output(pair.model)
        torch.testing.assert_close(heads, output, atol=1e-4, rtol=1e-3)
        masks, deltas = random_masks(pair.model.vpd)
        with pair.model.vpd.masked(masks, delta=deltas):
            masked, under = heads_and_output(pair.model)
        torch.testing.assert_close(masked, under, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(masked, heads, atol=1e-2)


def test_results_of_heads_under_masks(build: Callable[..., nn.Module]) -> None:
    """With `use_attn_result` on, hook_result shows what each head writes under masks."""
    from vpd_lens.decomposition.attach import attach

    model = attach(build("hooked-result"), n_subcomponents=5)
    masks, deltas = random_masks(model.vpd)
    ablate = ("blocks.0.attn.hook_result", lambda r, hook: r.index_fill(2, torch.tensor([1]), 0))
    outputs = []
    with torch.no_grad(), model.vpd.masked(masks, delta=deltas):
        for on in (True, False):
            model.set_use_attn_result(on)
            logits, cache = model.run_with_cache(tokens(1))
            outputs.append((logits, cache.stack_head_results(layer=-1)))
        model.set_use_attn_result(True)
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-3)
        seen = []
        see = ("blocks.0.hook_attn_out", lambda a, hook: seen.append(a))
        model.run_with_hooks(tokens(1), fwd_hooks=[ablate, see])
    rest = [head for head in range(model.cfg.n_heads) if head != 1]
    expected = outputs[1][1][: model.cfg.n_heads][rest].sum(0) + model.blocks[0].attn.b_O
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:run_with_cache")
def test_heads_under_masks_need_the_masks(pair: Pair) -> None:
    from vpd_lens.errors import InputError

    with torch.no_grad(), pair.model.vpd.masked("zero"):
        _, cache = pair.model.run_with_cache(tokens(1), names_filter=lambda n: ".vpd." not in n)
    with pytest.raises(InputError, match=r"attn\.o\.vpd\.hook_mask"):
        cache.stack_head_results(layer=-1)


def test_head_detector(build: Callable[..., nn.Module], tokenizer: Any) -> None:
    from transformer_lens import head_detector

    from vpd_lens.decomposition.attach import attach

    model = build("hooked-ln")
    model.set_tokenizer(tokenizer)
    pattern = torch.eye(6).roll(-1, 1).tril()

    def scores() -> Tensor:
        return head_detector.detect_head(model, "w9 w10 w11 w12 w13", pattern, error_measure="abs")

    before = scores()
    attach(model, n_subcomponents=5)
    assert torch.equal(scores(), before)
