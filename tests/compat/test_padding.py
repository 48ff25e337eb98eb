"""Padding, positions and caches: what belongs to a forward reaches the importances, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .builders import LENGTH, has_hooked_transformer, hooked, tokens

CASES = ["bridge-llama-default", "bridge-gpt2-default", "hooked-rotary"]
MODES = ["ci", "rounded", "stochastic", "random", "adversarial"]
PADS = 3


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, decomposed: Callable[[str], nn.Module]) -> nn.Module:
    return decomposed(request.param)


def padded(x: Tensor, side: str) -> tuple[Tensor, Tensor, slice]:
    """`x` with pads, its attention mask, and where the real tokens are."""
    pads = torch.zeros(len(x), PADS, dtype=torch.long)
    ones = torch.ones_like(x)
    if side == "right":
        return torch.cat([x, pads], 1), torch.cat([ones, pads], 1), slice(0, x.shape[1])
    return torch.cat([pads, x], 1), torch.cat([pads, ones], 1), slice(PADS, None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_importances_do_not_depend_on_pads(model: nn.Module, side: str) -> None:
    x = tokens(1)
    longer, mask, real = padded(x, side)
    alone = model.vpd.causal_importance(x)
    together = model.vpd.causal_importance(longer, attention_mask=mask)[:, real]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    seen = []
    with torch.no_grad():
        model.run_with_hooks(
            longer,
            attention_mask=mask,
            fwd_hooks=[("blocks.1.mlp.out.vpd.hook_ci", lambda g, hook: seen.append(g[:, real]))],
        )
    torch.testing.assert_close(seen[0], alone[..., model.vpd.layout.columns("blocks.1.mlp.out")])
    assert not torch.allclose(model.vpd.causal_importance(longer)[:, real], alone, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_masked_outputs_do_not_depend_on_pads(model: nn.Module, side: str, mode: str) -> None:
    x = tokens(1)
    longer, mask, real = padded(x, side)
    with torch.no_grad():
        with model.vpd.masked(mode, seed=3, n_steps=2):
            alone = model(x)
        with model.vpd.masked(mode, seed=3, n_steps=2):
            together = model(longer, attention_mask=mask)[:, real]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["ci", "rounded"])
def test_texts_of_unequal_length(mode: str, build: Callable[..., nn.Module]) -> None:
    """A list of strings is padded by the model; the importance function is told where."""
    from vpd_lens.decomposition.attach import attach

    model = attach(build("bridge-llama-default"), n_subcomponents=5)
    texts = ["w9 w10 w11", "w20 w21 w22 w23 w24 w25"]
    for side, real in (("right", slice(0, 4)), ("left", slice(3, None))):
        model.tokenizer.padding_side = side
        with torch.no_grad():
            with model.vpd.masked(mode, seed=3):
                alone = model(texts[0])
            with model.vpd.masked(mode, seed=3):
                together = model(texts)
        assert together.shape[1] == 7
        torch.testing.assert_close(together[:1, real], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["target", "ci", "rounded"])
def test_generation_in_a_batch_is_that_of_each_prompt(
    mode: str, decomposed: Callable[[str], nn.Module]
) -> None:
    model = decomposed("bridge-llama-default")
    prompts = ["w5 w6 w7", "w8 w9 w10 w11 w12"]
    arguments: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "verbose": False,
        "stop_at_eos": False,
        "return_type": "tokens",
    }
    for cached in (False, True):
        with model.vpd.masked(mode, seed=7):
            batch = model.generate(prompts, use_past_kv_cache=cached, **arguments)
        with model.vpd.masked(mode, seed=7):
            alone = model.generate(prompts[0], use_past_kv_cache=cached, **arguments)
        assert torch.equal(batch[0, -4:], alone[0, -4:])


def test_importances_are_of_the_positions_that_were_given(
    decomposed: Callable[[str], nn.Module],
) -> None:
    model = decomposed("bridge-llama-default")
    x, positions = tokens(), 3 * torch.arange(LENGTH)[None]
    right = model.vpd.causal_importance(x, position_ids=positions)
    with torch.no_grad():
        with model.vpd.masked("ci"):
            got = model(x, position_ids=positions)
        with model.vpd.masked(right, delta=0.0):
            assert torch.equal(got, model(x, position_ids=positions))
        with model.vpd.masked(model.vpd.causal_importance(x), delta=0.0):
            assert not torch.equal(got, model(x, position_ids=positions))


def test_caches_handed_in_are_used_or_refused() -> None:
    """Masks of a whole sequence cannot be had from its last token; constant masks can be used."""
    if not has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    from vpd_lens.decomposition.attach import attach
    from vpd_lens.errors import VPDError

    model = attach(hooked("rotary"), n_subcomponents=5)
    x, mask = tokens(), torch.ones(2, 1, dtype=torch.long)

    def last(mode: str) -> Tensor:
        with torch.no_grad(), model.vpd.masked(mode):
            cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
            model(x[:, :-1], past_kv_cache=cache, attention_mask=mask.expand(-1, LENGTH - 1))
            return model(x[:, -1:], past_kv_cache=cache, attention_mask=mask)[:, -1]

    for mode in ("target", "zero", "unmasked"):
        with torch.no_grad(), model.vpd.masked(mode):
            expected = model(x)[:, -1]
        torch.testing.assert_close(last(mode), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(VPDError, match="lie in a key-value cache"):
        last("ci")
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    with torch.no_grad():
        model(x[:, :-1], past_kv_cache=cache, attention_mask=mask.expand(-1, LENGTH - 1))
        _, seen = model.run_with_cache(x[:, -1:], past_kv_cache=cache, attention_mask=mask)
    assert not any(name.endswith("hook_ci") for name in seen), "importances of a token alone"
