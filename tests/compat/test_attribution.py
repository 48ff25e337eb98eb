"""Attribution graphs on every model class, architecture and mode: the edges add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from .builders import ARCHITECTURES, HOOKED, NATIVE, tokens

CASES = [f"bridge-{name}-{m}" for name in ARCHITECTURES for m in ("default", "processed")]
CASES += [f"native-{name}" for name in NATIVE] + [f"hooked-{name}" for name in HOOKED]


@pytest.fixture(scope="module", params=CASES)
def attached(request: pytest.FixtureRequest, build: Callable[..., nn.Module]) -> nn.Module:
    from vpd_lens.decomposition.attach import attach

    case = request.param
    return attach(build(case), sites="attn" if "mixtral" in case else "all", n_subcomponents=5)


def traced(model: nn.Module, **settings: object) -> object:
    from vpd_lens.analysis.circuits import attribute

    generator = torch.Generator().manual_seed(0)
    prompt = tokens(1)[0]
    g = torch.rand(len(prompt), model.vpd.layout.total, generator=generator)
    with pytest.warns(UserWarning, match="untrained"):
        return attribute(model, prompt, [3, 7], importance=g, progress=False, **settings)


def has_experts(model: nn.Module) -> bool:
    return "mlp" in model.blocks[0]._modules and "mlp" not in model.vpd.layout.names[-1]


def test_with_everything_frozen_the_edges_into_a_node_are_its_activation(
    attached: nn.Module,
) -> None:
    if has_experts(attached):
        from vpd_lens.errors import InputError

        with pytest.raises(InputError, match="mixture of experts"):
            traced(attached, frozen=True)
        return
    graph = traced(attached, frozen=True)
    assert int(graph.nodes.of_kind("subcomponent").sum()) == 6 * attached.vpd.layout.total
    assert abs(1 - graph.completeness()) < 1e-4


def test_the_model_runs_as_before_after_tracing(attached: nn.Module) -> None:
    before = attached(tokens(1))
    traced(attached, frozen=not has_experts(attached))
    assert torch.equal(attached(tokens(1)), before)
