"""Generation under masks: the same with and without a key-value cache, on every class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .builders import tokens
from .dense import dense_weights, masked_weights, random_masks

CASES = [
    *("bridge-gpt2-default", "bridge-llama-processed", "bridge-gemma2-unprocessed"),
    *("native-rms_gated", "hooked-grouped"),
    *("bridge-llama_one_head-default", "hooked-multi_query"),
]
MODES = ["target", "ci", "rounded", "stochastic", "adversarial"]
NEW = 4


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, build: Callable[..., nn.Module]) -> nn.Module:
    from vpd_lens.decomposition.attach import attach

    return attach(build(request.param), n_subcomponents=5)


@contextmanager
def noted(model: nn.Module) -> Iterator[list[Tensor]]:
    """Logits of the last position of every masked forward in the block, in order."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, _args: tuple, out: Tensor) -> None:
        current = model.vpd.forwards.state.current
        if current is not None and current.masks is not None:
            seen.append(out[:, -1].clone())

    handle = model.unembed.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture
def logits(model: nn.Module) -> Iterator[list[Tensor]]:
    with noted(model) as seen:
        yield seen


def generate(model: nn.Module, prompt: Any, cached: bool, **kwargs: Any) -> Any:
    arguments = {"max_new_tokens": NEW, "do_sample": False, "verbose": False, "stop_at_eos": False}
    if isinstance(prompt, Tensor):
        arguments["return_type"] = "tokens"
    return model.generate(prompt, use_past_kv_cache=cached, **{**arguments, **kwargs})


def has_cache(model: nn.Module) -> bool:
    """Native bridges recompute the sequence; they refuse or ignore a cache."""
    return type(model.original_model).__name__ != "NativeModel" if is_bridge(model) else True


def is_bridge(model: nn.Module) -> bool:
    return hasattr(model, "adapter")


@pytest.mark.parametrize("mode", MODES)
def test_cached_and_uncached_generation_agree(
    model: nn.Module, logits: list[Tensor], mode: str
) -> None:
    x = tokens(length=5)
    with model.vpd.masked(mode, seed=7, n_steps=1):
        cached = generate(model, x, cached=has_cache(model))
    with_cache = logits[-NEW:]
    logits.clear()
    with model.vpd.masked(mode, seed=7, n_steps=1):
        uncached = generate(model, x, cached=False)
    assert torch.equal(cached, uncached)
    assert cached.shape == (2, 5 + NEW)
    if mode != "target":
        assert len(with_cache) == NEW
        torch.testing.assert_close(
            torch.stack(with_cache), torch.stack(logits[-NEW:]), rtol=1e-4, atol=1e-4
        )


@pytest.fixture(
    scope="module", params=["bridge-llama-default", "native-rms_gated", "hooked-grouped"]
)
def causal(request: pytest.FixtureRequest, build: Callable[..., nn.Module]) -> nn.Module:
    """A model whose importances never read the future."""
    from vpd_lens import CausalImportanceConfig
    from vpd_lens.decomposition.attach import attach

    importance = CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2, causal=True)
    return attach(build(request.param), n_subcomponents=5, importance=importance)


@pytest.mark.parametrize("mode", ["ci", "rounded"])
def test_with_causal_importances_generation_is_one_forward_on_its_text(
    causal: nn.Module, mode: str
) -> None:
    """What was masked token by token, with a cache, is what the whole text would be."""
    with causal.vpd.masked(mode):
        with noted(causal) as seen:
            text = generate(causal, tokens(length=5), cached=has_cache(causal))
        whole = causal(text)
    for position, logits in enumerate(seen, 4):
        torch.testing.assert_close(logits, whole[:, position], rtol=1e-4, atol=1e-4)
    assert len(seen) == NEW
    assert not torch.allclose(causal(text), whole, atol=1e-3)  # the masks did something


def test_generation_under_fixed_masks_equals_dense_weights(
    model: nn.Module, request: pytest.FixtureRequest, build: Callable[..., nn.Module]
) -> None:
    reference = build(request.node.callspec.params["model"])
    masks, deltas = random_masks(model.vpd)
    x = tokens(length=5)
    with model.vpd.masked(masks, delta=deltas):
        got = generate(model, x, cached=has_cache(model))
    plain = generate(model, x, cached=has_cache(model))
    with dense_weights(reference, masked_weights(model.vpd, masks, deltas)):
        assert torch.equal(got, generate(reference, x, cached=has_cache(model)))
    assert torch.equal(plain, generate(reference, x, cached=has_cache(model)))
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("mode", ["ci", "stochastic"])
def test_stream_agrees_with_generate(model: nn.Module, mode: str, tokenizer: Any) -> None:
    if not hasattr(model, "generate_stream"):
        pytest.skip("this class has no generate_stream")
    x = tokens(length=5)
    # HookedTransformer streams one sequence at a time, and only with a tokenizer.
    if not is_bridge(model):
        x = x[:1]
        model.set_tokenizer(tokenizer)
    with model.vpd.masked(mode, seed=7):
        expected = generate(model, x, cached=has_cache(model))
    with model.vpd.masked(mode, seed=7):
        pieces = list(
            model.generate_stream(
                x,
                max_new_tokens=NEW,
                max_tokens_per_yield=2,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=has_cache(model),
                verbose=False,
                return_type="tokens",
            )
        )
    assert torch.equal(torch.cat(pieces, dim=-1).reshape(expected.shape[0], -1), expected)


@pytest.mark.parametrize("mode", ["ci", "stochastic"])
@pytest.mark.parametrize("case", ["bridge-gpt2-default", "bridge-llama-default"])
def test_left_padded_strings(case: str, mode: str, build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach

    model = attach(build(case), n_subcomponents=5)
    prompts = ["w9 w10 w11 w12 w13", "w20 w21"]
    outputs = []
    for cached in (True, False):
        with model.vpd.masked(mode, seed=7, n_steps=1):
            outputs.append(generate(model, prompts, cached, return_type="tokens"))
    assert torch.equal(*outputs)
    with model.vpd.masked("unmasked"):
        batch = generate(model, prompts, True, return_type="tokens")
        alone = generate(model, prompts[1], True, return_type="tokens")
    assert torch.equal(batch[1, -NEW:], alone[0, -NEW:])


def test_generation_leaves_no_trace(model: nn.Module) -> None:
    x = tokens(length=5)
    before = model(x)
    with model.vpd.masked("ci"):
        inside = model(x)
        generate(model, x, cached=has_cache(model))
        assert torch.equal(model(x), inside)
    assert torch.equal(model(x), before)
