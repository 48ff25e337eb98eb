"""Interventions, on every class: against dense weights, and in generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from .builders import tokens
from .dense import dense_weights

CASES = ["bridge-gpt2-default", "bridge-llama-processed", "native-rms_gated", "hooked-grouped"]
SITE = "blocks.1.mlp.in"

pytestmark = pytest.mark.filterwarnings("ignore:this decomposition is untrained")


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest,
    decomposed: Callable[[str], nn.Module],
    undecomposed: Callable[[str], nn.Module],
) -> list[nn.Module]:
    """A decomposed model, and the same model as it was."""
    return [decomposed(request.param), undecomposed(request.param)]


@pytest.fixture
def model(pair: list[nn.Module]) -> nn.Module:
    return pair[0]


def intervene(model: nn.Module, *edits: Any, **settings: Any) -> Any:
    import vpd_lens

    return vpd_lens.intervene(model, tokens(1)[0], list(edits), **settings)


def test_no_edit_is_the_target_model_bit_for_bit(model: nn.Module) -> None:
    result = intervene(model)
    assert torch.equal(result.edited[None], model(tokens(1)))
    assert float(result.kl.abs().max()) < 1e-6


@torch.no_grad()
def test_an_ablation_takes_the_rank_one_matrix_out_of_the_weight(pair: list[nn.Module]) -> None:
    from vpd_lens import Ablate, Scale

    model, reference = pair
    v, u = model.vpd.v(SITE)[:, [1, 3]], model.vpd.u(SITE)[[1, 3]]
    weight = model.vpd.site(SITE).weight
    ablated = intervene(model, Ablate([f"{SITE}:1", f"{SITE}:3"]))
    with dense_weights(reference, {SITE: weight - v @ u}):
        expected = reference(tokens(1))[0]
    torch.testing.assert_close(ablated.edited, expected, atol=1e-4, rtol=1e-4)
    doubled = intervene(model, Scale([f"{SITE}:1", f"{SITE}:3"], 2.0))
    with dense_weights(reference, {SITE: weight + v @ u}):
        expected = reference(tokens(1))[0]
    torch.testing.assert_close(doubled.edited, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(intervene(model, Scale(f"{SITE}:1", 1.0)).edited, ablated.target)


def test_an_edit_at_a_position_leaves_earlier_ones_alone(model: nn.Module) -> None:
    from vpd_lens import Ablate

    result = intervene(model, Ablate(f"{SITE}:2@3"))
    same = (result.edited == result.target).all(-1)
    assert bool(same[:3].all())
    assert not bool(same[3])
    assert torch.equal(result.edited, intervene(model, Ablate(f"{SITE}:2", 3)).edited)


def test_a_patch_moves_the_output_by_the_difference_of_activations(model: nn.Module) -> None:
    from vpd_lens import Patch

    other = tokens(1, seed=7)[0]
    names = [f"{SITE}:{c}" for c in range(5)]
    patched = intervene(model, Patch(names, other, positions=[5]))
    _, inputs = model.vpd.target(other[None])
    _, own = model.vpd.target(tokens(1))
    index = model.vpd.layout.names.index(SITE)
    v, u = model.vpd.v(SITE), model.vpd.u(SITE)
    change = ((inputs[index] - own[index])[0, 5] @ v @ u).detach()
    point = "mlp.hook_pre_linear" if _is_gated(model) else "mlp.hook_pre"

    def move(y: torch.Tensor, hook: Any) -> torch.Tensor:
        y = y.clone()
        y[:, 5] += change
        return y

    with torch.no_grad():
        expected = model.run_with_hooks(tokens(1), fwd_hooks=[(f"blocks.1.{point}", move)])
    torch.testing.assert_close(patched.edited, expected[0], atol=1e-4, rtol=1e-4)


def _is_gated(model: nn.Module) -> bool:
    return any(name.endswith("gate") for name in model.vpd.layout.names)


@pytest.mark.parametrize("regime", ["ci", "stochastic", "adversarial"])
def test_regimes_are_the_masks_they_say(model: nn.Module, regime: str) -> None:
    g = torch.rand(6, model.vpd.layout.total, generator=torch.Generator().manual_seed(0))
    base = intervene(model, regime=regime, importance=g)
    assert torch.equal(base.base, base.edited)
    if regime == "ci":
        with model.vpd.masked(g[None], delta=0.0), torch.no_grad():
            torch.testing.assert_close(base.base[None], model(tokens(1)))
    if regime == "adversarial":
        weak, strong = (
            float(intervene(model, regime=regime, importance=g, steps=n).kl[-1]) for n in (1, 6)
        )
        random = float(intervene(model, regime="stochastic", importance=g).kl[-1])
        assert max(weak, strong) > random
    # With everything important there is nothing to choose but the deltas' masks.
    ones = torch.ones_like(g)
    one, two = (intervene(model, regime=regime, importance=ones, seed=s).base for s in (0, 1))
    assert torch.equal(one, two) is (regime == "ci")


def test_edits_take_effect_in_their_order(model: nn.Module) -> None:
    from vpd_lens import Ablate, Patch, Scale

    name, other = f"{SITE}:1", tokens(1, seed=7)[0]
    patch, ablate = Patch(name, other), Ablate(name)
    patched, ablated = intervene(model, patch).edited, intervene(model, ablate).edited
    assert torch.equal(intervene(model, ablate, patch).edited, patched)
    assert torch.equal(intervene(model, patch, ablate).edited, ablated)
    doubled = intervene(model, patch, Scale(name, 2.0)).edited
    assert not torch.equal(doubled, patched)
    # Off in the regime, on once patched.
    without = torch.ones(6, model.vpd.layout.total)
    without[:, model.vpd.layout.columns(SITE).start + 1] = 0
    regime = {"regime": "ci", "importance": without}
    base = intervene(model, **regime).base
    assert not torch.equal(intervene(model, patch, **regime).edited, base)


def test_a_cut_graph_is_judged_where_it_ends(model: nn.Module) -> None:
    import vpd_lens
    from vpd_lens.analysis.circuits.targets import Token
    from vpd_lens.errors import InputError

    g = torch.rand(6, model.vpd.layout.total, generator=torch.Generator().manual_seed(0))
    target = Token(5, position=2)
    graph = vpd_lens.attribute(model, tokens(1)[0], target, importance=g, idle=0.0, progress=False)
    result = vpd_lens.intervene(model, graph, regime="ci")
    assert result.position == 2
    full = vpd_lens.intervene(model, tokens(1)[0], regime="ci", importance=g, position=2)
    torch.testing.assert_close(result.base[:3], full.base[:3], atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="the graph ends"):
        vpd_lens.intervene(model, graph, regime="ci", position=4)


@torch.no_grad()
def test_positions_count_from_the_cache(model: nn.Module) -> None:
    """A call that is handed keys and values goes on at the next position."""
    import vpd_lens
    from vpd_lens import Ablate

    if type(getattr(model, "original_model", None)).__name__ == "NativeModel":
        pytest.skip("native bridges have no key-value cache")
    edits = [Ablate([f"{SITE}:{c}" for c in range(5)], 5)]
    with vpd_lens.edited(model, edits):
        expected = model(tokens(1))[:, -1]
        if hasattr(model, "original_model"):
            from transformers import DynamicCache

            cache = {"past_key_values": DynamicCache(), "use_cache": True}
        else:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            cache = {"past_kv_cache": TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)}
        model(tokens(1)[:, :5], attention_mask=torch.ones(1, 5, dtype=torch.long), **cache)
        mask = torch.ones(1, 6 if hasattr(model, "original_model") else 1, dtype=torch.long)
        got = model(tokens(1)[:, 5:], attention_mask=mask, **cache)[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_edits_hold_at_their_positions_while_generating(model: nn.Module, cached: bool) -> None:
    """Every generated token is the likeliest of one edited forward on what precedes it."""
    import vpd_lens
    from vpd_lens import Ablate, Scale

    if cached and type(getattr(model, "original_model", None)).__name__ == "NativeModel":
        pytest.skip("native bridges have no key-value cache")
    edits = [Ablate([f"{SITE}:0", f"{SITE}:1"], slice(4, None)), Scale(f"{SITE}:2@7", -3.0)]
    with vpd_lens.edited(model, edits):
        out = model.generate(
            tokens(1),
            max_new_tokens=4,
            do_sample=False,
            verbose=False,
            stop_at_eos=False,
            return_type="tokens",
            use_past_kv_cache=cached,
        )
    for position in range(5, 9):
        with vpd_lens.edited(model, edits), torch.no_grad():
            expected = model(out[:, : position + 1])[0, -1].argmax()
        assert out[0, position + 1] == expected
    assert torch.equal(model(tokens(1)), intervene(model).edited[None])


def test_bad_edits_are_refused(model: nn.Module) -> None:
    from vpd_lens import Ablate, Patch
    from vpd_lens.errors import InputError

    for edit, message in [
        (Ablate("nonsense"), "names are like"),
        (Ablate("blocks.9.mlp.in:0"), "no site"),
        (Ablate(f"{SITE}:99"), "has 5 subcomponents"),
        (Ablate(f"{SITE}:0@1", 2), "names a position"),
        (Ablate(f"{SITE}:0", -1), "count from the beginning"),
        (Patch(f"{SITE}:0"), "needs source"),
        (Patch(f"{SITE}:0", [3, 4]), "not in the source prompt"),
        (Ablate(f"{SITE}:0@50"), "position 50 is not in the prompt"),
        (Ablate(f"{SITE}:0", [1, 6]), "position 6 is not in the prompt"),
        (Ablate(f"{SITE}:0", slice(None, None, -1)), "going forwards"),
    ]:
        with pytest.raises(InputError, match=message):
            intervene(model, edit)
    with pytest.raises(InputError, match="position=9"):
        intervene(model, position=9)
