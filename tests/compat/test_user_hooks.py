"""A user's hooks on the model are seen by the decomposition, whenever they were registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .builders import tokens
from .dense import dense_weights, error, masked_weights, random_masks

CASES = [
    *(f"bridge-{name}-default" for name in ("gpt2", "gpt_neox", "opt", "olmo2")),
    *(f"bridge-{name}-processed" for name in ("llama", "gemma2")),
    *(f"hooked-{name}" for name in ("ln", "grouped", "post_norm")),
]

# Where the input of some matrix can be changed; those that a model lacks are left out.
INPUTS = [
    *("hook_resid_pre", "hook_resid_mid", "hook_in"),
    *("ln1.hook_normalized", "ln1.hook_out", "ln2.hook_normalized", "ln2.hook_out"),
    *("attn.hook_in", "attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in"),
    *("attn.hook_z", "attn.o.hook_in"),
    *("mlp.hook_in", "mlp.in.hook_in", "mlp.gate.hook_in"),
    *("mlp.hook_post", "mlp.out.hook_in", "mlp.hook_pre"),
]
OUTPUTS = [
    *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "hook_attn_out"),
    *("mlp.hook_pre_linear", "hook_mlp_out", "attn.o.hook_out", "mlp.out.hook_out"),
]


class Switch:
    """One hook per name, of which only the chosen one does anything."""

    def __init__(self) -> None:
        self.chosen: str | None = None

    def hook(self, name: str) -> Callable[..., Tensor | None]:
        def change(x: Any, hook: Any) -> Tensor | None:
            return 0.5 * x + 0.2 if self.chosen == name else None

        return change

    def register(self, model: nn.Module, names: list[str]) -> None:
        for name in names:
            model.add_hook(name, self.hook(name))

    @torch.no_grad()
    def run(self, model: nn.Module, name: str | None) -> Tensor:
        self.chosen = name
        try:
            return model(tokens())
        finally:
            self.chosen = None


@pytest.mark.parametrize("case", CASES)
def test_hooks_before_and_after_attaching_equal_dense_weights(
    case: str, build: Callable[..., nn.Module]
) -> None:
    from vpd_lens.decomposition.attach import attach

    reference, early, late = build(case), build(case), build(case)
    names = [f"blocks.0.{n}" for n in INPUTS + OUTPUTS if f"blocks.0.{n}" in reference.hook_dict]
    on_reference, on_early, on_late = Switch(), Switch(), Switch()
    on_early.register(early, names)
    attach(early, n_subcomponents=5)
    attach(late, n_subcomponents=5)
    on_late.register(late, names)
    on_reference.register(reference, names)
    masks, deltas = random_masks(early.vpd)
    effective = []
    with (
        early.vpd.masked(masks, delta=deltas),
        late.vpd.masked(masks, delta=deltas),
        dense_weights(reference, masked_weights(early.vpd, masks, deltas)),
    ):
        plain = on_reference.run(reference, None)
        for name in names:
            expected = on_reference.run(reference, name)
            if torch.equal(expected, plain):
                continue
            effective.append(name.removeprefix("blocks.0."))
            assert error(on_early.run(early, name), expected) < 1e-4, f"{name}, registered before"
            assert error(on_late.run(late, name), expected) < 1e-4, f"{name}, registered after"
    assert {"attn.hook_z", "mlp.hook_post"} <= set(effective)
    assert len(effective) >= 8


@pytest.mark.parametrize("case", ["bridge-gpt2-default", "bridge-llama-processed", "hooked-ln"])
@torch.no_grad()
def test_reset_hooks_does_not_detach(case: str, build: Callable[..., nn.Module]) -> None:
    from vpd_lens.decomposition.attach import attach

    model = attach(build(case), n_subcomponents=5)
    masks, deltas = random_masks(model.vpd)
    with model.vpd.masked(masks, delta=deltas):
        before = model(tokens())
        model.add_hook("blocks.0.attn.q.vpd.hook_mask", lambda mask, hook: 0 * mask)
        assert not torch.equal(model(tokens()), before)
        model.reset_hooks()
        assert torch.equal(model(tokens()), before)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(tokens()), before)
    assert error(before, model(tokens())) > 1e-2


@pytest.mark.parametrize("case", ["bridge-gpt2-default", "hooked-ln"])
@torch.no_grad()
def test_importances_ignore_the_hooks_of_a_call_but_not_permanent_ones(
    case: str, build: Callable[..., nn.Module]
) -> None:
    from vpd_lens.decomposition.attach import attach

    model = attach(build(case), n_subcomponents=5)
    point = "blocks.0.attn.hook_z"
    before = model.vpd.causal_importance(tokens())
    with model.hooks(fwd_hooks=[(point, lambda z, hook: 0 * z)]):
        assert torch.equal(model.vpd.causal_importance(tokens()), before)
    if hasattr(model, "add_perma_hook"):
        model.add_perma_hook(point, lambda z, hook: 0 * z)
    else:
        model.add_hook(point, lambda z, hook: 0 * z, is_permanent=True)
    assert not torch.equal(model.vpd.causal_importance(tokens()), before)
