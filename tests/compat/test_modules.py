"""Models of the user's own: any `nn.Module` or `HookedRootModule` with linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .dense import error

EXAMPLE = torch.linspace(-1, 1, 12).reshape(3, 4)


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5, bias=False), nn.Linear(5, 3))


def hooked_root_module() -> nn.Module:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.HookedRootModule import HookedRootModule

    class Two(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.hook_mid = HookPoint()
            self.second = nn.Linear(6, 3)
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.hook_mid(self.first(x)).relu())

    torch.manual_seed(0)
    return Two()


@pytest.fixture(params=[plain_model, hooked_root_module])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


def attach_to(model: nn.Module, **kwargs: Any) -> nn.Module:
    from vpd_lens.decomposition import CausalImportanceConfig
    from vpd_lens.decomposition.attach import attach

    importance = CausalImportanceConfig(kind="mlp")
    return attach(model, n_subcomponents=5, example=EXAMPLE, importance=importance, **kwargs)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def test_masks_equal_dense_weights(model: nn.Module) -> None:
    from vpd_lens.decomposition.attach import remove

    before = model(EXAMPLE)
    names = list(linears(model))
    attach_to(model)
    vpd = model.vpd
    assert list(vpd.layout.names) == names
    assert torch.equal(model(EXAMPLE), before)
    torch.manual_seed(1)
    masks = {name: torch.rand(5) for name in names}
    with vpd.masked(masks, delta=0.3):
        got = model(EXAMPLE)
    weights = {n: (vpd.v(n) * masks[n]) @ vpd.u(n) + 0.3 * vpd.delta(n) for n in names}
    with vpd.masked(torch.ones(3, vpd.layout.total), delta=1.0):
        assert torch.equal(model(EXAMPLE), before)
    remove(model)
    for name, layer in linears(model).items():
        layer.weight.copy_(weights[name].T)
    assert error(got, model(EXAMPLE)) < 1e-5


@pytest.mark.parametrize("mode", ["ci", "rounded", "stochastic", "adversarial"])
@torch.no_grad()
def test_every_mode_runs_on_features_without_positions(model: nn.Module, mode: str) -> None:
    attach_to(model)
    plain = model(EXAMPLE)
    with model.vpd.masked(mode, n_steps=2, seed=0):
        got = model(EXAMPLE)
    assert got.shape == plain.shape
    assert torch.isfinite(got).all()
    assert error(got, plain) > 1e-4


def test_sites_are_named_by_module(model: nn.Module) -> None:
    from vpd_lens.decomposition.attach import remove

    name = list(linears(model))[-1]
    parameters = list(model.state_dict())
    attach_to(model, sites=[name])
    assert list(model.vpd.layout.names) == [name]
    assert list(model.state_dict()) == parameters
    remove(model)
    assert "vpd" not in model.__dict__
    assert "forward" not in model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_hook_points_of_a_hooked_root_module() -> None:
    model = attach_to(hooked_root_module())
    _, cache = model.run_with_cache(EXAMPLE)
    assert cache["first.vpd.hook_acts"].shape == (3, 5)
    assert cache["first.vpd.hook_delta_mask"].shape == (3, 1)
    vpd = model.vpd
    assert error(cache["first.vpd.hook_acts"], EXAMPLE @ vpd.v("first")) < 1e-6
    point = "second.vpd.hook_mask"
    got = model.run_with_hooks(EXAMPLE, fwd_hooks=[(point, lambda mask, hook: 0 * mask)])
    hidden = cache["hook_mid"].relu()
    expected = hidden @ vpd.delta("second") + model.second.bias
    assert error(got, expected) < 1e-5


def test_an_example_is_needed(model: nn.Module) -> None:
    from vpd_lens.decomposition.attach import attach
    from vpd_lens.errors import AttachError

    with pytest.raises(AttachError, match="example="):
        attach(model, n_subcomponents=5)


def test_a_module_that_is_never_called_is_refused(model: nn.Module) -> None:
    from vpd_lens.errors import AttachError

    model.add_module("unused", nn.Linear(3, 3))
    if isinstance(model, nn.Sequential):
        model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    with pytest.raises(AttachError, match=r"unused: its hooks did not fire"):
        attach_to(model)
    assert "vpd" not in model.__dict__


def test_nothing_linear_is_refused() -> None:
    from vpd_lens.errors import AttachError

    with pytest.raises(AttachError, match="matches no site"):
        attach_to(nn.Sequential(nn.ReLU()))
