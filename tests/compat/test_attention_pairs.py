"""Attention scores taken apart into pairs of q and k subcomponents, on every class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from .builders import tokens

CASES = [
    *("bridge-gpt2-default", "bridge-llama-processed", "bridge-gpt_neox-default"),
    *("hooked-ln", "hooked-grouped"),
]

pytestmark = pytest.mark.filterwarnings("ignore:this decomposition is untrained")


@pytest.mark.parametrize("case", CASES)
def test_pairs_deltas_and_biases_add_up_to_the_score(
    decomposed: Callable[[str], nn.Module], case: str
) -> None:
    from vpd_lens.analysis.circuits import AttentionScores

    model = decomposed(case)
    prompt = tokens(1)[0]
    scores = AttentionScores(model, prompt)
    _, cache = model.run_with_cache(prompt[None])
    with torch.no_grad():
        for layer, head, query, key in [(0, 1, 4, 2), (1, 0, 5, 5), (1, 1, 3, 0)]:
            form = scores.form(layer, head, query, key)
            parts = []
            for part, position in (("q", query), ("k", key)):
                name = f"blocks.{layer}.attn.{part}"
                site = model.vpd.site(name)
                x = scores.cut.inputs[name][0, position]
                bias = 0 if site.bias is None else site.bias
                parts.append((x @ site.weight + bias, x @ model.vpd.delta(name) + bias))
            whole = parts[0][0] @ form @ parts[1][0]
            expected = cache[f"blocks.{layer}.attn.hook_attn_scores"][0, head, query, key]
            torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
            rest = parts[0][1] @ form @ parts[1][0] + parts[0][0] @ form @ parts[1][1]
            rest = rest - parts[0][1] @ form @ parts[1][1]
            pairs = scores.pairs(layer, head, query, key)
            assert pairs.shape == (5, 5)
            torch.testing.assert_close(pairs.sum() + rest, expected, atol=1e-4, rtol=1e-4)


def test_one_backward_pass_gives_the_whole_form(
    decomposed: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpd_lens.analysis.circuits import AttentionScores

    scores = AttentionScores(decomposed("bridge-gpt2-default"), tokens(1)[0])
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    scores.form(0, 1, 4, 2)
    assert len(passes) == 2  # by q, and that by k


def test_a_graphs_pairs_are_nodes_of_it(decomposed: Callable[[str], nn.Module]) -> None:
    import vpd_lens
    from vpd_lens.analysis.circuits import attention_pairs

    model = decomposed("bridge-gpt2-default")
    g = torch.rand(6, model.vpd.layout.total, generator=torch.Generator().manual_seed(1)).round()
    graph = vpd_lens.attribute(model, tokens(1)[0], 3, importance=g, progress=False)
    pairs = attention_pairs(model, graph, n_scores=4, n_pairs=3)
    names = set(graph.nodes.names())
    assert 4 <= len(pairs) <= 12
    for pair in pairs:
        assert {pair.query, pair.key} <= names
        assert pair.key_position <= pair.query_position
        assert pair.weight != 0


def test_a_model_that_hides_its_scores_is_refused(decomposed: Callable[[str], nn.Module]) -> None:
    from vpd_lens.analysis.circuits import AttentionScores
    from vpd_lens.errors import VPDError

    scores = AttentionScores(decomposed("native-ln"), tokens(1)[0])
    with pytest.raises(VPDError, match="does not show the scores"):
        scores.form(0, 0, 3, 1)
