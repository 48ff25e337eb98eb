"""Attention in attribution graphs, on every class: edges by head, and pairs behind a look."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from .builders import tokens

CASES = [
    *(
        "bridge-gpt2-default",
        "bridge-llama-processed",
        "bridge-gpt_neox-default",
        "bridge-qwen3-default",
    ),
    *("hooked-ln", "hooked-grouped", "native-ln"),
]

pytestmark = pytest.mark.filterwarnings("ignore:this decomposition is untrained")


def traced(model: nn.Module, **settings: object) -> object:
    import vpd_lens

    g = torch.rand(6, model.vpd.layout.total, generator=torch.Generator().manual_seed(1)).round()
    settings = {"importance": g, "idle": 0.0, "progress": False, **settings}
    return vpd_lens.attribute(model, tokens(1)[0], 3, **settings)


@pytest.mark.parametrize("case", CASES)
def test_heads_add_up_to_every_edge_from_v_to_o(
    decomposed: Callable[[str], nn.Module], case: str
) -> None:
    """Deltas, errors and biases included; and a head is what it is when all others are silent."""
    from vpd_lens.analysis.attention import head_loadings

    model = decomposed(case)
    for frozen in (False, True):
        graph = traced(model, frozen=frozen)
        found, (nodes, edges) = head_loadings(model, graph), (graph.nodes, graph.edges)
        places = torch.tensor(["attn.v" in place for place in nodes.places])
        targets = torch.tensor(["attn.o" in place for place in nodes.places])
        crossing = places[nodes.place[edges.source]] & targets[nodes.place[edges.target]]
        assert found.edge.sort().values.equal(crossing.nonzero()[:, 0])
        weight = edges.weight[found.edge]
        scale = float(weight.abs().max())
        torch.testing.assert_close(found.weights.sum(1), weight, atol=1e-4 * scale, rtol=1e-4)
        sources = {int(kind) for kind in nodes.kind[edges.source[found.edge]]}
        assert len(sources) >= 3  # subcomponents, errors, deltas
        one = int(weight.abs().argmax())
        torch.testing.assert_close(found.of(int(found.edge[one])), found.weights[one])


def test_one_heads_share_is_what_is_left_without_the_others(
    decomposed: Callable[[str], nn.Module],
) -> None:
    """Of what a v subcomponent adds to an o subcomponent's activation, by silencing heads."""
    from vpd_lens.analysis.attention import head_loadings

    model = decomposed("bridge-gpt2-default")
    graph = traced(model, frozen=True)
    found, nodes = head_loadings(model, graph), graph.nodes
    own = nodes.kind[graph.edges.source[found.edge]] == 2
    n = int((found.weights.abs().amax(1) * own * (found.layer == 0)).argmax())
    source, target = (int(end[found.edge[n]]) for end in (graph.edges.source, graph.edges.target))
    o, v = "blocks.0.attn.o", "blocks.0.attn.v"
    position, (s, t) = (
        int(nodes.position[source]),
        (int(nodes.index[source]), int(nodes.index[target])),
    )
    written = nodes.activation[source] * nodes.importance[source] * model.vpd.u(v)[s].detach()
    added = torch.zeros(1, 6, len(written))
    added[0, position] = written
    for head in range(2):
        activations = []
        for sign in (0.0, 1.0):

            def add(y: torch.Tensor, hook: object, sign: float = sign) -> torch.Tensor:
                return y - sign * added.view(y.shape)

            def silence(z: torch.Tensor, hook: object, head: int = head) -> torch.Tensor:
                by_head = z.reshape(1, 6, 2, -1).clone()
                by_head[:, :, 1 - head] = 0
                return by_head.reshape(z.shape)

            hooks = [(f"{v}.vpd.hook_out", add), ("blocks.0.attn.hook_z", silence)]
            seen = f"{o}.vpd.hook_acts"
            with model.hooks(fwd_hooks=hooks):
                _, cache = model.run_with_cache(tokens(1)[:1], names_filter=[seen])
            activations.append(float(cache[seen][0, nodes.position[target], t]))
        expected = activations[0] - activations[1]
        assert float(found.weights[n, head]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_errors_of_a_pruned_graph_are_left_out(decomposed: Callable[[str], nn.Module]) -> None:
    from vpd_lens.analysis.attention import head_loadings

    model = decomposed("bridge-gpt2-default")
    graph = traced(model).pruned(0.97)
    found = head_loadings(model, graph)
    weight = graph.edges.weight[found.edge]
    torch.testing.assert_close(
        found.weights.sum(1), weight, atol=2e-2 * float(weight.abs().max()), rtol=0
    )


def test_a_graphs_pairs_are_nodes_of_it(decomposed: Callable[[str], nn.Module]) -> None:
    from vpd_lens.analysis.attention import attention, attention_pairs

    model = decomposed("bridge-gpt2-default")
    graph = traced(model)
    pairs = attention_pairs(model, graph, n_scores=4, n_pairs=3)
    names = set(graph.nodes.names())
    assert 4 <= len(pairs) <= 12
    prompt = attention(model).on(tokens(1)[0])
    for pair in pairs:
        assert {pair.query, pair.key} <= names
        assert pair.key_position <= pair.query_position
        q, k = pair.query.split("@")[0], pair.key.split("@")[0]
        there = pair.head, pair.query_position, pair.key_position
        assert pair.weight == pytest.approx(float(prompt.pair(q, k)[there]), rel=1e-4)


def test_without_v_and_o_there_is_no_look(build: Callable[[str], nn.Module]) -> None:
    import vpd_lens
    from vpd_lens.analysis.attention import head_loadings
    from vpd_lens.errors import InputError

    model = vpd_lens.decompose(build("native-ln"), sites=r"attn\.[qk]|mlp", n_subcomponents=4)
    graph = vpd_lens.attribute(model, tokens(1)[0], 3, progress=False)
    with pytest.raises(InputError, match="v and o matrices are decomposed"):
        head_loadings(model, graph)
