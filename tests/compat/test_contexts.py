"""`masked(...)` blocks nest, are restored on errors, and never run unmasked in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .builders import tokens
from .dense import random_masks

CASES = ["bridge-gpt2-default", "bridge-llama-processed", "native-ln", "hooked-ln"]
C = 5


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, decomposed: Callable[[str], nn.Module]) -> nn.Module:
    return decomposed(request.param)


@torch.no_grad()
def test_blocks_nest(model: nn.Module) -> None:
    vpd, x = model.vpd, tokens()
    target = model(x)
    with vpd.masked("zero"):
        zero = model(x)
        with vpd.masked("unmasked"):
            unmasked = model(x)
            with vpd.masked("target"):
                assert torch.equal(model(x), target)
            assert torch.equal(model(x), unmasked)
        assert torch.equal(model(x), zero)
    assert torch.equal(model(x), target)
    assert not torch.equal(zero, unmasked)


@torch.no_grad()
def test_an_exception_restores_the_outer_block(model: nn.Module) -> None:
    vpd, x = model.vpd, tokens()
    target = model(x)
    with vpd.masked("zero"):
        zero = model(x)
        with pytest.raises(KeyError), vpd.masked("unmasked"):
            raise KeyError
        assert torch.equal(model(x), zero)
    assert torch.equal(model(x), target)


@torch.no_grad()
def test_an_exception_inside_a_forward_restores_the_model(model: nn.Module) -> None:
    x = tokens()
    target = model(x)

    def fail(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with model.vpd.masked("ci"):
        inside = model(x)
        with pytest.raises(ZeroDivisionError):
            model.run_with_hooks(x, fwd_hooks=[("blocks.1.attn.hook_z", fail)])
        model.reset_hooks()
        assert torch.equal(model(x), inside)
    assert torch.equal(model(x), target)


@torch.no_grad()
def test_a_hook_may_ask_for_importances_during_a_masked_forward(model: nn.Module) -> None:
    x = tokens()
    seen = []

    def ask(value: Tensor, hook: Any) -> None:
        seen.append(model.vpd.causal_importance(x))

    with model.vpd.masked("zero"):
        plain = model(x)
        hooked = model.run_with_hooks(x, fwd_hooks=[("blocks.0.attn.hook_z", ask)])
    assert torch.equal(hooked, plain)
    assert torch.equal(seen[0], model.vpd.causal_importance(x))


@pytest.mark.parametrize(
    ("masks", "delta", "message"),
    [
        ({"blocks.0.attn.q": torch.ones(C + 1)}, 1.0, "last dimension must be"),
        ({"blocks.7.attn.q": torch.ones(C)}, 1.0, "no site named"),
        ({}, {"blocks.7.attn.q": 0.0}, "no site named"),
        (torch.ones(3), 1.0, "C_total"),
        ("everything", 1.0, "is not one of"),
    ],
)
def test_masks_that_fit_no_site_are_refused(
    model: nn.Module, masks: Any, delta: Any, message: str
) -> None:
    from vpd_lens.errors import InputError

    with pytest.raises(InputError, match=message), model.vpd.masked(masks, delta=delta):
        pass
    assert model.vpd.forwards.state.context is None


@pytest.mark.parametrize("leading", [(3, 1), (2, 4), (1, 5), (1, 2, 6)])
def test_masks_that_do_not_fit_the_batch_are_refused(
    model: nn.Module, leading: tuple[int, ...]
) -> None:
    from vpd_lens.errors import InputError

    masks = torch.ones(*leading, model.vpd.layout.total)
    with (
        model.vpd.masked(masks),
        pytest.raises(InputError, match=r"leading shape .* model runs on \(2, 6\)"),
    ):
        model(tokens())
    assert torch.isfinite(model(tokens())).all()


def test_masks_of_the_wrong_width_are_refused(model: nn.Module) -> None:
    from vpd_lens.decomposition import Masks
    from vpd_lens.errors import InputError

    masks = Masks(torch.ones(1, 1, 7), torch.ones(1, 1, 2))
    with pytest.raises(InputError, match="widths"), model.vpd.masked(masks):
        pass


def test_seeded_modes_repeat_and_unseeded_follow_the_global_generator(model: nn.Module) -> None:
    runs = []
    for seed in (1, 1, 2):
        with torch.no_grad(), model.vpd.masked("stochastic", seed=seed):
            runs.append(model(tokens()))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        with torch.no_grad(), model.vpd.masked("stochastic"):
            runs.append(model(tokens()))
    assert torch.equal(*runs)


def test_hf_generate_under_masks_is_an_error(build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach
    from vpd_lens.errors import VPDError

    model = attach(build("bridge-gpt2-default"), n_subcomponents=C)
    arguments: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "return_type": "tokens"}
    plain = model.hf_generate(tokens(), **arguments)
    with model.vpd.masked("unmasked"), pytest.raises(VPDError, match="hf_generate"):
        model.hf_generate(tokens(), **arguments)
    with model.vpd.masked("target"):
        assert torch.equal(model.hf_generate(tokens(), **arguments), plain)


@pytest.mark.parametrize("case", ["bridge-gpt2-default", "hooked-ln"])
@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_result"])
def test_flags_switched_on_later_never_run_unmasked_in_silence(
    case: str, flag: str, build: Callable[..., nn.Module]
) -> None:
    """The masked forward either still equals dense weights, or says which sites it missed."""
    from vpd_lens.decomposition.attach import attach
    from vpd_lens.errors import VPDError

    from .dense import dense_weights, error, masked_weights

    model, reference = attach(build(case), n_subcomponents=C), build(case)
    masks, deltas = random_masks(model.vpd)
    with torch.no_grad(), dense_weights(reference, masked_weights(model.vpd, masks, deltas)):
        expected = reference(tokens())
    getattr(model, f"set_{flag}")(True)
    with torch.no_grad(), model.vpd.masked(masks, delta=deltas):
        if (case, flag) == ("hooked-ln", "use_attn_result"):
            assert error(model(tokens()), expected) < 1e-4
        else:
            with pytest.raises(VPDError, match=r"blocks\.0\.attn\."):
                model(tokens())
        getattr(model, f"set_{flag}")(False)
        assert error(model(tokens()), expected) < 1e-4
