"""Contributions of pairs add up to the scores of attention, whatever the model does to q and k."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import vpd_lens
from vpd_lens.errors import InputError
from vpd_lens.native import native_transformer

from .builders import _TINY, boot, has_hooked_transformer, randomise, save_architecture, tokens

CASES = [
    *("bridge-gpt2-processed", "bridge-llama-processed", "bridge-gpt_neox-default"),
    *("bridge-qwen3-default", "bridge-olmo2-default", "bridge-gemma3-processed"),  # norms on q, k
    *("bridge-gemma2-default", "bridge-gptj-default", "bridge-gpt_neo-default"),
    *("bridge-phi3-default", "bridge-opt-default", "bridge-mixtral-default"),
    *("bridge-llama_multi_query-default", "native-ln", "native-grouped"),
    *("hooked-ln", "hooked-grouped", "hooked-shortformer", "hooked-wide_heads"),
]

# What only some models do, with arguments of a HookedTransformer.
SPECIAL = {
    "soft cap": {"attn_scores_soft_cap": 2.0},
    "ALiBi": {"positional_embedding_type": "alibi"},
    "norm on q and k": {"use_qk_norm": True},
    "local": {"use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"]},
}

pytestmark = pytest.mark.filterwarnings("ignore:this decomposition is untrained")


def check_sums(model: nn.Module, shows_scores: bool = True) -> None:
    """Parts, contributions and scores agree with each other, and with what the model shows.

    Some show the pattern in the place of the scores.
    """
    heads = vpd_lens.attention(model)
    prompt = heads.on(tokens(1)[0])
    _, cache = model.run_with_cache(prompt.tokens[None])  # type: ignore[operator]
    for layer in heads.layers:
        form, scores = prompt.forms[layer], prompt.scores(layer)
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0].detach()
        torch.testing.assert_close(form.pattern(scores), pattern, atol=2e-6, rtol=0)
        torch.testing.assert_close(prompt.parts(layer).sum((0, 1)), scores, atol=1e-4, rtol=1e-5)
        for head, query, key in [(0, 4, 2), (scores.shape[0] - 1, 5, 5), (0, 3, 2)]:
            found = prompt.contributions(layer, head, query, key)
            assert found.score == pytest.approx(float(scores[head, query, key]), abs=1e-4)
        shown = cache[f"blocks.{layer}.attn.hook_attn_scores"][0].detach()
        if shows_scores and not torch.equal(shown, pattern):
            whole = scores if form.cap is None else form.cap * (scores / form.cap).tanh()
            visible = pattern > 0
            expected = (whole + form.prior)[visible]
            torch.testing.assert_close(expected, shown[visible], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_contributions_add_up_to_the_scores(
    decomposed: Callable[[str], nn.Module], case: str
) -> None:
    check_sums(decomposed(case))


@pytest.mark.parametrize("what", SPECIAL)
def test_what_a_hooked_transformer_may_do(what: str) -> None:
    if not has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    shape = {**_TINY, "normalization_type": "LN", **SPECIAL[what]}
    del shape["seed"]
    check_sums(vpd_lens.decompose(randomise(native_transformer(**shape)), n_subcomponents=5))


def test_a_bridge_that_adds_a_bias_for_the_distance(tmp_path, monkeypatch) -> None:
    from . import builders

    shape = {"vocab_size": builders.VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    monkeypatch.setitem(builders.ARCHITECTURES, "bloom", ("BloomConfig", "BloomForCausalLM", shape))
    model = vpd_lens.decompose(boot(save_architecture("bloom", tmp_path)), n_subcomponents=5)
    check_sums(model, shows_scores=False)  # up to a constant for every query


@pytest.mark.parametrize("case", ["bridge-llama-processed", "hooked-grouped"])
def test_offsets_are_those_of_rotary_positions(
    decomposed: Callable[[str], nn.Module], case: str
) -> None:
    """Against the rotation written out, with halves of a head as pairs and base 10 000."""
    model = decomposed(case)
    found = vpd_lens.attention(model).static(1, offsets=5)
    assert found.sees_offsets
    assert not found.signed
    vpd, d = model.vpd, 4
    q, k = (
        (vpd.v(f"blocks.1.attn.{part}").norm(dim=0)[:, None] * vpd.u(f"blocks.1.attn.{part}"))
        .detach()
        .unflatten(-1, (-1, d))
        for part in "qk"
    )
    for offset in range(5):
        angles = offset * torch.tensor([1.0, 0.01])
        cos, sin = angles.cos().diag(), angles.sin().diag()
        rotation = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
        for head in range(4):
            expected = q[:, head] @ rotation @ k[:, head // 2].T / d**0.5
            torch.testing.assert_close(found.values[head, offset], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["bridge-gpt2-processed", "native-ln"])
def test_learned_positions_are_no_part_of_the_form(
    decomposed: Callable[[str], nn.Module], case: str
) -> None:
    found = vpd_lens.attention(decomposed(case)).static(0, offsets=4)
    assert not found.sees_offsets
    assert "The same at every distance" in str(found)
    torch.testing.assert_close(found.values[:, 3], found.values[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["bridge-llama-processed", "bridge-qwen3-default", "hooked-ln"])
def test_ablation_is_that_of_a_hook(decomposed: Callable[[str], nn.Module], case: str) -> None:
    model = decomposed(case)
    prompt = vpd_lens.attention(model).on(tokens(1)[0])
    found = prompt.without("blocks.0.attn.q:1")

    def ablate(mask: torch.Tensor, hook: object) -> torch.Tensor:
        mask[..., 1] = 0
        return mask

    with model.hooks(fwd_hooks=[("blocks.0.attn.q.vpd.hook_mask", ablate)]):  # type: ignore
        _, cache = model.run_with_cache(prompt.tokens[None])  # type: ignore[operator]
    for layer in (0, 1):
        expected = cache[f"blocks.{layer}.attn.hook_pattern"][0]
        torch.testing.assert_close(found[layer], expected)
        assert not torch.allclose(found[layer], prompt.patterns[layer])


def test_means_over_data_are_those_of_prompts(decomposed: Callable[[str], nn.Module]) -> None:
    """With norms on q and k, whose divisors differ between positions and heads."""
    heads, rows = vpd_lens.attention(decomposed("bridge-qwen3-default")), tokens(4)
    found = heads.over(rows, batch_size=3, offsets=4)
    assert found.n_positions == rows.numel()
    prompts = [heads.on(row) for row in rows]
    pair = "blocks.1.attn.q:2", "blocks.1.attn.k:3"
    for offset in range(4):
        each = [p.pair(*pair).diagonal(-offset, 1, 2) for p in prompts]
        expected = torch.stack(each).mean((0, 2))
        got = found.contributions[1].of(*pair)[:, offset]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        looked = torch.stack([p.patterns[1].diagonal(-offset, 1, 2) for p in prompts])
        got = found.profiles[1].attention[:, offset]
        torch.testing.assert_close(got, looked.mean((0, 2)), atol=1e-5, rtol=1e-4)
    columns = heads.vpd.layout.columns
    g = torch.stack([p.importance for p in prompts]) > 0.1
    k, v = (g[..., columns(f"blocks.1.attn.{part}")].double() for part in "kv")
    both = torch.einsum("btk,btv->kv", k, v)
    torch.testing.assert_close(found.together[1].both, both)
    torch.testing.assert_close(found.together[1].k_given_v, both / v.sum((0, 1)), equal_nan=True)


def test_pads_count_nowhere(decomposed: Callable[[str], nn.Module]) -> None:
    heads, rows = vpd_lens.attention(decomposed("bridge-llama-processed")), tokens(2)
    real = torch.ones_like(rows)
    real[1, 4:] = 0
    found = heads.over({"input_ids": rows, "attention_mask": real}, offsets=2)
    whole, short = heads.on(rows[0]), heads.on(rows[1, :4])
    assert found.n_positions == 10
    looked = [p.patterns[0].diagonal(-1, 1, 2) for p in (whole, short)]
    expected = torch.cat(looked, 1).mean(1)
    torch.testing.assert_close(found.profiles[0].attention[:, 1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_half_precision_adds_up_to_its_rounding(
    build: Callable[..., nn.Module], architecture: str
) -> None:
    model = build(f"bridge-{architecture}-default", torch.bfloat16)
    with torch.inference_mode():
        prompt = vpd_lens.attention(vpd_lens.decompose(model, n_subcomponents=5)).on(tokens(1)[0])
    form, scores = prompt.forms[0], prompt.scores(0)
    pattern = prompt.patterns[0].float()
    assert (form.pattern(scores) - pattern).abs().mean() < 0.01


def test_an_encoder_is_refused() -> None:
    if not has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    shape = {**_TINY, "normalization_type": "LN", "attention_dir": "bidirectional"}
    del shape["seed"]
    model = vpd_lens.decompose(randomise(native_transformer(**shape)), n_subcomponents=3)
    with pytest.raises(InputError, match="see none after them"):
        vpd_lens.attention(model)
