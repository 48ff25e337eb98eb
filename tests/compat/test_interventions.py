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
def pair(request: pytest.FixtureRequest, build: Callable[..., nn.Module]) -> list[nn.Module]:
    """A decomposed model, and the same model as it was."""
    from vpd_lens.decomposition.attach import attach

    return [attach(build(request.param), n_subcomponents=5), build(request.param)]


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


def test_patching_everything_from_another_prompt_is_running_that_prompt(model: nn.Module) -> None:
    """With every site's subcomponents patched and faithful, logits are the other prompt's."""
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
    whole = intervene(model, regime=regime, importance=torch.ones_like(g))
    assert float(whole.kl.max()) >= 0


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
        expected = vpd_lens.intervene(model, out[0, : position + 1], edits).edited[-1].argmax()
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
    ]:
        with pytest.raises(InputError, match=message):
            intervene(model, edit)
    with pytest.raises(InputError, match="position=9"):
        intervene(model, position=9)
