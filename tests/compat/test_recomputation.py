"""Recomputing blocks in the backward pass: the same numbers from fewer kept tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from vpd_lens.decomposition import CausalImportanceConfig
from vpd_lens.errors import ConfigError
from vpd_lens.training import VPDConfig
from vpd_lens.training.step import Stepper

from .builders import tokens

IMPORTANCE = CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2, d_ffn=32)
CASES = [
    "hooked-rms",
    "hooked-ln",
    "native-rms_gated",
    "bridge-gpt2-unprocessed",
    "bridge-gpt_neox-processed",
]


def _stepper(model: nn.Module, **changes: object) -> Stepper:
    from vpd_lens.decomposition.attach import attach

    attach(model, n_subcomponents=5, importance=IMPORTANCE)
    config = VPDConfig.small(steps=8, importance=IMPORTANCE, faithfulness={"coefficient": 1.0})
    return Stepper(model.__dict__["vpd"], config.replaced(changes))


@pytest.mark.parametrize("case", CASES)
def test_a_recomputed_step_is_the_step(case: str, build: Callable[..., nn.Module]) -> None:
    plain, lean = _stepper(build(case)), _stepper(build(case), recompute=True)
    for step in range(2):
        expected, importance = plain.step(tokens(), step)
        got, again = lean.step(tokens(), step)
        assert {k: float(v) for k, v in got.items()} == {k: float(v) for k, v in expected.items()}
        assert torch.equal(importance.whole(), again.whole())
    for name, group in plain.parameters.items():
        assert all(map(torch.equal, group, lean.parameters[name]))
    blocks = lean.vpd.model.blocks
    assert not any("forward" in block.__dict__ for block in blocks)
    assert lean.vpd.forwards.state.current is None


@pytest.mark.parametrize("case", ["hooked-rms", "native-rms_gated"])
def test_it_keeps_less(case: str, build: Callable[..., nn.Module]) -> None:
    kept = {}
    for recompute in (False, True):
        stepper = _stepper(build(case), recompute=recompute)
        stepper.step(tokens(), 0)
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        _, inputs = stepper.vpd.target(tokens())
        g = stepper.vpd.pre_importance(inputs).detach().clamp(0, 1)
        assert stepper.adversary is not None
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            stepper.run(stepper.adversary.masks(g), tokens())
        kept[recompute] = sum(sizes.values())
    assert kept[True] < 0.6 * kept[False]


def test_a_model_without_blocks_is_refused() -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    from vpd_lens.decomposition.attach import attach

    model = attach(Toy(), n_subcomponents=4, example=torch.randn(2, 4))
    with pytest.raises(ConfigError, match="recompute=True needs a model with `blocks`"):
        Stepper(model.__dict__["vpd"], VPDConfig.small(recompute=True))
    with pytest.raises(ConfigError, match="cannot both be on"):
        VPDConfig.small(recompute=True, compile=True)
