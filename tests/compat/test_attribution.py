"""Attribution graphs on every model class, architecture and mode: the edges add up.

And read and write directions say what the edges through the residual stream are.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from .builders import ARCHITECTURES, HOOKED, NATIVE, tokens

LENGTH = 4
CASES = [f"bridge-{name}-{m}" for name in ARCHITECTURES for m in ("default", "processed")]
CASES += [f"native-{name}" for name in NATIVE] + [f"hooked-{name}" for name in HOOKED]


def traced(model: nn.Module, **settings: object) -> object:
    from vpd_lens.analysis.circuits import attribute

    generator = torch.Generator().manual_seed(0)
    prompt = tokens(1, LENGTH)[0]
    g = torch.rand(len(prompt), model.vpd.layout.total, generator=generator)
    with pytest.warns(UserWarning, match="untrained"):
        return attribute(model, prompt, [3, 7], importance=g, idle=0.0, progress=False, **settings)


def has_experts(model: nn.Module) -> bool:
    return "mlp" in model.blocks[0]._modules and "mlp" not in model.vpd.layout.names[-1]


@pytest.mark.parametrize("case", CASES)
def test_with_everything_frozen_the_edges_into_a_node_are_its_activation(
    decomposed: Callable[[str], nn.Module], case: str
) -> None:
    """And the model runs as before afterwards."""
    model = decomposed(case)
    before = model(tokens(1))
    if has_experts(model):
        from vpd_lens.errors import InputError

        with pytest.raises(InputError, match="mixture of experts"):
            traced(model, frozen=True)
        traced(model)
    else:
        graph = traced(model, frozen=True)
        assert int(graph.nodes.of_kind("subcomponent").sum()) == LENGTH * model.vpd.layout.total
        assert abs(1 - graph.completeness()) < 1e-4
        assert_directions_are_edges(model, graph)
    assert torch.equal(model(tokens(1)), before)


def assert_directions_are_edges(model: nn.Module, graph: object) -> None:
    """A frozen edge is a product of directions, up to the scales of norms at its position."""
    from vpd_lens.analysis.reads_writes import Directions

    directions, nodes, edges = Directions(model.vpd), graph.nodes, graph.edges
    own, last = nodes.of_kind("subcomponent"), len(graph.tokens) - 1
    here = (nodes.position == last) & (own | nodes.of_kind("output"))
    weights = torch.zeros(len(nodes), len(nodes))
    weights[edges.source.long(), edges.target.long()] = edges.weight
    weights = weights / (nodes.activation * nodes.importance)[:, None]
    place = {name: number for number, name in enumerate(nodes.places)}
    found = 0
    for source in model.vpd.layout.names:
        if (writes := directions.writes(source)) is None:
            continue
        rows = here & own & (nodes.place == place[source])
        writes = writes[nodes.index[rows]]
        for target in model.vpd.layout.names:
            reads = directions.reads(target)
            if reads is not None and source in directions._before(target):
                columns = here & own & (nodes.place == place[target])
                product = writes @ reads[nodes.index[columns]].T
                assert_proportional(weights[rows][:, columns], product)
                found += 1
            elif reads is not None:
                columns = here & own & (nodes.place == place[target])
                assert not weights[rows][:, columns].any()
        columns = here & nodes.of_kind("output")
        chosen = nodes.index[rows].tolist()
        logits = torch.stack([directions.logits(source, c)[[3, 7]] for c in chosen])
        assert_proportional(weights[rows][:, columns].diff(dim=1), logits.diff(dim=1))
    assert found


def assert_proportional(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = (got * expected).sum() / expected.square().sum()
    assert scale > 0
    torch.testing.assert_close(got, scale * expected, rtol=1e-3, atol=1e-4 * float(got.abs().max()))


@pytest.mark.filterwarnings("ignore:this decomposition is untrained")
def test_dropout_and_a_users_hooks_change_nothing(decomposed: Callable[[str], nn.Module]) -> None:
    """Nor does what is found depend on the mode that the model happens to be in."""
    import vpd_lens

    model, prompt = decomposed("bridge-gpt2-default"), tokens(1)[0]
    settings = {"steps": 1, "attack_steps": (1,), "attack_restarts": 1, "draws": 1}

    def found() -> tuple[object, ...]:
        graph = traced(model, frozen=True)
        circuit = vpd_lens.prune(model, prompt, 3, vpd_lens.PruneConfig(**settings), progress=False)
        edit = vpd_lens.Ablate("blocks.0.mlp.in:1")
        return (
            graph.edges.weight,
            circuit.importance,
            vpd_lens.intervene(model, prompt, edit).edited,
        )

    expected = found()
    model.train()
    model.original_model.train()
    try:
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: 2 * x)]):
            got = found()
        assert model.training
    finally:
        model.eval()
        model.original_model.eval()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
