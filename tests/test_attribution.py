"""Attribution graphs: edges against gradients and finite differences taken one by one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vpd_lens
from tests.conftest import tiny_bridge

PROMPT = torch.tensor([3, 11, 7, 19, 2, 23])


def attached(sites: Any = "all", n_subcomponents: int = 4, **shape: Any) -> nn.Module:
    import vpd_lens

    model = tiny_bridge(**shape)
    return vpd_lens.decompose(model, sites=sites, n_subcomponents=n_subcomponents)


def importance(model: nn.Module, share: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    g = torch.rand(len(PROMPT), model.vpd.layout.total, generator=generator)
    return torch.where(g > 1 - share, g, 0)


def traced(model: nn.Module, target: Any = (3, 7), **settings: Any) -> Any:
    import vpd_lens

    settings = {"importance": importance(model), "progress": False, **settings}
    target = list(target) if isinstance(target, tuple) else target
    with pytest.warns(UserWarning, match="untrained"):
        return vpd_lens.attribute(model, PROMPT, target, **settings)


def literal_edges(model: nn.Module, graph: Any, delta: str) -> dict[tuple[str, str], float]:
    """One backward pass per node, on activations that are detached and attached again."""
    vpd, g = model.vpd, importance(model)
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    handles = []

    def read(name: str, x: Tensor) -> None:
        seen[name] = x

    def edit(name: str, y: Tensor) -> Tensor:
        a = seen[name] @ vpd.v(name).detach()
        leaf = a.detach().requires_grad_()
        before[name], after[name] = a, leaf
        u = vpd.u(name).detach()
        if delta == "through":
            return y + (leaf - a) @ u
        return (y - a @ u).detach() + leaf @ u

    for site in vpd.sites:
        handles += site.attach(
            lambda x, name=site.name: read(name, x), lambda y, name=site.name: edit(name, y)
        )
    embedding = {}

    def begin(resid: Tensor, hook: Any) -> Tensor:
        embedding["leaf"] = resid.detach().requires_grad_()
        return embedding["leaf"]

    try:
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", begin)]):
            logits = model(PROMPT[None])
    finally:
        for handle in handles:
            handle.remove()
    columns = {name: vpd.layout.columns(name) for name in vpd.layout.names}
    edges: dict[tuple[str, str], float] = {}
    targets = {graph.nodes.name(n): n for n in range(graph.n_nodes)}
    for name, node in targets.items():
        position, index = int(graph.nodes.position[node]), int(graph.nodes.index[node])
        if graph.nodes.of_kind("output")[node]:
            scalar = logits[0, position, index]
        elif graph.nodes.of_kind("subcomponent")[node]:
            place = graph.nodes.places[int(graph.nodes.place[node])]
            scalar = before[place][0, position, index]
        else:
            continue
        leaves = [embedding["leaf"], *after.values()]
        gradients = torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True)
        if gradients[0] is not None:
            weight = (gradients[0] * embedding["leaf"])[0].sum(-1)
            edges |= {(f"embed@{t}", name): float(w) for t, w in enumerate(weight.detach())}
        for place, gradient in zip(after, gradients[1:], strict=True):
            if gradient is None:
                continue
            weight = (gradient * after[place]).detach()[0] * g[:, columns[place]]
            for t, c in weight.nonzero().tolist():
                edges[(f"{place}:{c}@{t}", name)] = float(weight[t, c])
    return edges


def inner_edges(graph: Any) -> dict[tuple[str, str], float]:
    """Edges from subcomponents and embeddings; those of positions are added to embeddings."""
    names = [name.replace("embed.position", "embed") for name in graph.nodes.names()]
    is_source = graph.nodes.of_kind("subcomponent", "embedding", "position")
    columns = graph.edges.source.tolist(), graph.edges.target.tolist(), graph.edges.weight.tolist()
    found: dict[tuple[str, str], float] = {}
    for source, target, weight in zip(*columns, strict=True):
        if bool(is_source[source]):
            pair = names[source], names[target]
            found[pair] = found.get(pair, 0.0) + weight
    return found


@pytest.mark.parametrize("delta", ["node", "through"])
@pytest.mark.parametrize("sites", ["all", r"mlp", [f"blocks.{i}.attn.o" for i in (0, 1)]])
def test_edges_are_gradients_times_activation_times_importance(delta: str, sites: Any) -> None:
    model = attached(sites, n_subcomponents=3)
    graph = traced(model, delta=delta, batch_size=5)
    expected = literal_edges(model, graph, delta)
    got = inner_edges(graph)
    assert got.keys() <= expected.keys()
    scale = max(abs(weight) for weight in expected.values())
    for edge, weight in expected.items():
        assert got.get(edge, 0.0) == pytest.approx(weight, abs=1e-5 * scale), edge


def test_edges_agree_with_finite_differences_that_freeze_everything_else() -> None:
    model = attached()
    vpd = model.vpd
    graph = traced(model, delta="through")
    with torch.no_grad():
        _, cache = model.run_with_cache(PROMPT[None])
        clean = {n: cache[f"{n}.vpd.hook_acts"] for n in vpd.layout.names}
        names = graph.nodes.names()
        generator = torch.Generator().manual_seed(0)
        picks = graph.nodes.of_kind("subcomponent")[graph.edges.source.long()].nonzero()[:, 0]
        for edge in picks[torch.randperm(len(picks), generator=generator)[:15]].tolist():
            source, target = names[graph.edges.source[edge]], names[graph.edges.target[edge]]
            change = _change(model, clean, source, target, eps=1e-2)
            site, c, t = _parts(source)
            g = importance(model)[t, vpd.layout.columns(site)][c]
            assert float(graph.edges.weight[edge]) == pytest.approx(
                float(change * clean[site][0, t, c] * g), abs=2e-4
            ), (source, target)


def _parts(name: str) -> tuple[str, int, int]:
    site, rest = name.rsplit(":", 1)
    index, position = rest.split("@")
    return site, int(index), int(position)


def _change(
    model: nn.Module, clean: dict[str, Tensor], source: str, target: str, eps: float
) -> Tensor:
    """Change of the target's activation per change of the source's, all others held."""
    site, c, t = _parts(source)
    place, index, at = _parts(target)
    values = []
    for step in (eps, -eps):
        found = {}

        def hold(acts: Tensor, name: str, step: float = step, found: dict = found) -> Tensor:
            found[name] = acts
            held = clean[name].clone()
            if name == site:
                held[0, t, c] += step
            return held

        hooks = [(f"{n}.vpd.hook_acts", lambda acts, hook, n=n: hold(acts, n)) for n in clean]
        logits = model.run_with_hooks(PROMPT[None], fwd_hooks=hooks)
        reads_logit = place == "output"
        values.append(logits[0, at, index] if reads_logit else found[place][0, at, index])
    return (values[0] - values[1]) / (2 * eps)


@pytest.mark.parametrize("sites", ["all", r"mlp|unembed", r"blocks\.1"])
@pytest.mark.parametrize("delta", ["node", "through"])
def test_frozen_edges_add_up_whatever_is_decomposed(sites: str, delta: str) -> None:
    graph = traced(attached(sites), frozen=True, delta=delta)
    assert graph.completeness() == pytest.approx(1, abs=1e-5)
    assert float(graph.gaps().nan_to_num().abs().max()) < 1e-4


def test_leaving_out_any_kind_of_source_breaks_completeness() -> None:
    graph = traced(attached(), frozen=True)
    for kind in ("embedding", "position", "subcomponent", "error", "delta", "bias"):
        without = graph.filtered(~graph.nodes.of_kind(kind))
        assert without.completeness() < 0.999, kind


def test_targets_are_linear_in_each_other() -> None:
    from vpd_lens.analysis.circuits import Direction, LogitDifference, Token
    from vpd_lens.sites import find_sites

    model = attached()
    unembed = find_sites(model, ["unembed"])[0]
    vector = unembed.weight[:, 3] - unembed.weight[:, 7]
    targets = [Token(3, 4), Token(7, 4), LogitDifference(3, 7, 4), Direction(vector, "d", 4)]
    graph = traced(model, targets)
    first = graph.n_nodes - 4
    rows = graph.adjacency().to_dense()[first:]
    bias = graph.nodes.of_kind("bias")
    torch.testing.assert_close(rows[2], rows[0] - rows[1])
    torch.testing.assert_close(rows[3][~bias], rows[2][~bias])
    logits = model(PROMPT[None])[0, 4]
    values = graph.nodes.activation[first:]
    torch.testing.assert_close(
        values[:3], torch.stack([logits[3], logits[7], logits[3] - logits[7]])
    )
    assert int(graph.nodes.position.max()) == 4


def test_targets_that_look_alike_stay_apart() -> None:
    from vpd_lens.analysis.circuits import Direction

    model = attached()
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    targets = [Direction(vectors[0]), Direction(vectors[1]), Direction(vectors[0], layer=0), 3, 3]
    graph = traced(model, targets)
    assert len(graph.outputs) == 4
    assert len(set(graph.nodes.names()[-4:])) == 4
    assert len(set(graph.nodes.activation[-4:].tolist())) == 4
    with pytest.raises(vpd_lens.errors.InputError, match="several outputs"):
        graph.total_effects()
    numpy_id = torch.tensor(3)
    assert traced(model, numpy_id).outputs[0].token_id == 3


def test_named_targets_count_alike_and_likely_ones_by_probability() -> None:
    from vpd_lens.analysis.circuits import TopTokens

    model = attached()
    graph = traced(model, (3, 7))
    assert [output.weight for output in graph.outputs] == [1.0, 1.0]
    torch.testing.assert_close(graph.influence().nodes[-2:], torch.tensor([0.5, 0.5]))
    likely = traced(model, TopTokens())
    p = torch.tensor([output.probability for output in likely.outputs])
    torch.testing.assert_close(likely.influence().nodes[-len(p) :], p / p.sum())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_recorded_whatever_is_switched_off(mode: Any) -> None:
    model = attached()
    expected = traced(model, 3)
    with mode():
        graph = traced(model, 3, importance=importance(model))
    assert torch.equal(graph.edges.weight, expected.edges.weight)


def test_a_users_hook_sees_the_models_inputs_only() -> None:
    model = attached()
    seen: list[float] = []
    model.add_perma_hook(
        "blocks.0.ln1.hook_in", lambda x, hook: seen.append(float(x.detach().abs().max()))
    )
    traced(model, frozen=True)
    assert seen
    assert max(seen) < 100


def test_the_limit_is_an_upper_bound() -> None:
    import re

    for sites in ("all", r"attn\.o|mlp", r"mlp"):
        for delta in ("node", "through"):
            model = attached(sites)
            edges = traced(model, delta=delta).n_edges
            with pytest.raises(vpd_lens.errors.InputError) as refused:
                traced(model, delta=delta, max_edges=1)
            estimate = re.search(r"may have ([\d,]+) edges", str(refused.value))
            assert estimate is not None
            assert int(estimate[1].replace(",", "")) >= edges, (sites, delta)


def test_a_direction_in_the_middle_sees_only_what_lies_before() -> None:
    from vpd_lens.analysis.circuits import Direction

    model = attached()
    vector = torch.randn(16, generator=torch.Generator().manual_seed(2))
    graph = traced(model, Direction(vector, "mid", layer=0), frozen=True)
    _, cache = model.run_with_cache(PROMPT[None])
    expected = cache["blocks.0.hook_resid_post"][0, -1] @ vector
    torch.testing.assert_close(graph.nodes.activation[-1], expected)
    sources = {name.split("@")[0] for name, _ in graph.incoming(graph.n_nodes - 1)}
    assert any(s.startswith("blocks.0.mlp.out") for s in sources)
    assert not any(s.startswith("blocks.1") for s in sources)


def test_total_effects_are_the_models_own_gradients() -> None:
    """With every subcomponent a node of importance 1, all paths are in the graph."""
    model = attached()
    ones = torch.ones(len(PROMPT), model.vpd.layout.total)
    graph = traced(model, 3, importance=ones, delta="through")
    effects = graph.total_effects()
    gradients: dict[str, Tensor] = {}
    names = [f"{name}.vpd.hook_acts" for name in model.vpd.layout.names]

    def note(gradient: Tensor, hook: Any) -> None:
        gradients[hook.name.removesuffix(".vpd.hook_acts")] = gradient[0]

    with model.hooks(bwd_hooks=[(name, note) for name in names]), torch.enable_grad():
        start = model.embed(PROMPT[None]).detach().requires_grad_()
        hooks = [("hook_embed", lambda value, hook: start)]
        model.run_with_hooks(PROMPT[None], fwd_hooks=hooks)[0, -1, 3].backward()
    _, cache = model.run_with_cache(PROMPT[None])
    for name in model.vpd.layout.names:
        here = (graph.nodes.place == graph.nodes.places.index(name)) & graph.nodes.of_kind(
            "subcomponent"
        )
        expected = gradients[name] * cache[f"{name}.vpd.hook_acts"][0]
        at = graph.nodes.position[here].long(), graph.nodes.index[here].long()
        torch.testing.assert_close(effects[here], expected[at], atol=1e-4, rtol=1e-3)


def test_transfers_do_not_grow_with_the_number_of_backward_passes() -> None:
    """Each of these would make a GPU wait; weights of edges are fetched together."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")

        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count = getattr(self, "count", 0) + any(n in str(op) for n in self.names)
            return op(*args, **(kwargs or {}))

    model, counts = attached("mlp"), []
    for batch_size in (1, 64):
        with Waits() as waits:
            traced(model, batch_size=batch_size)
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_a_prompt_is_copied_as_often_as_there_are_targets() -> None:
    """And logits of the copies, most of the memory of a large vocabulary, are not computed."""
    model = attached("mlp")
    one = torch.zeros(len(PROMPT), model.vpd.layout.total)
    one[:, 0] = 1
    shapes: list[tuple[int, ...]] = []
    model.blocks[0].register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape[:2]))
    model.unembed.register_forward_hook(lambda m, args, y: shapes.append(y.shape[:2]))
    traced(model, 3, importance=one)
    n = len(PROMPT)
    assert shapes == [(1, n), (1, n), (6, n), (1, 1)]


def test_only_attention_reaches_across_positions() -> None:
    graph = traced(attached())
    source, target = graph.edges.source.long(), graph.edges.target.long()
    crossing = graph.nodes.position[source] != graph.nodes.position[target]
    assert bool(crossing.any())
    places = graph.nodes.places
    for edge in crossing.nonzero()[:, 0].tolist():
        into = places[int(graph.nodes.place[target[edge]])]
        out_of = places[int(graph.nodes.place[source[edge]])]
        assert into.endswith("attn.o")
        assert out_of.removesuffix("k").removesuffix("v") == into.removesuffix("o")
        assert graph.nodes.position[source[edge]] < graph.nodes.position[target[edge]]


def test_outputs_at_many_positions_are_traced_as_if_alone() -> None:
    from vpd_lens.analysis.circuits import Token

    model = attached(r"mlp|attn|unembed")
    targets = [Token(3, 1), Token(7, 4), Token(9, 4)]
    together = inner_edges(traced(model, targets, frozen=True))
    for target in targets:
        alone = traced(model, target, frozen=True)
        name = alone.nodes.name(alone.n_nodes - 1)
        edges = {e: w for e, w in inner_edges(alone).items() if e[1] == name}
        assert edges
        for edge, weight in edges.items():
            assert together[edge] == pytest.approx(weight, abs=1e-5)


def test_default_targets_hold_the_mass() -> None:
    from vpd_lens.analysis.circuits import TopTokens

    model = attached()
    p, order = model(PROMPT[None])[0, -1].softmax(-1).sort(descending=True)
    graph = traced(model, TopTokens(mass=0.5, at_most=6, at_least=0.0))
    needed = int((p.cumsum(0) < 0.5).sum()) + 1
    assert [output.token_id for output in graph.outputs] == order[: min(needed, 6)].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": "text"}, "no tokenizer"),
        ({"prompt": torch.ones(2, 3, dtype=torch.long)}, "one prompt"),
        ({"prompt": [1, 99]}, "outside the vocabulary"),
        ({"prompt": [1] * 40}, "context"),
        ({"target": 400}, "not in the vocabulary"),
        ({"target": "a"}, "no tokenizer"),
        ({"target": []}, "target is empty"),
        ({"max_edges": 10}, "more than max_edges"),
        ({"importance": torch.zeros(2, 3)}, "expected \\[pos, C_total\\]"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    import vpd_lens

    model = attached()
    arguments = {"prompt": PROMPT, "target": 3, "progress": False, **arguments}
    with (
        pytest.warns(UserWarning, match="untrained"),
        pytest.raises(vpd_lens.errors.InputError, match=message),
    ):
        vpd_lens.attribute(model, **arguments)


def test_edges_are_announced(capsys: Any) -> None:
    import vpd_lens

    with pytest.warns(UserWarning, match="untrained"):
        graph = vpd_lens.attribute(attached(), PROMPT, target=3)
    (most,) = re.findall(r"Attributing: at most ([\d,]+) edges", capsys.readouterr().out)
    assert graph.n_edges <= int(most.replace(",", ""))


def test_an_undecomposed_model_is_refused() -> None:
    import vpd_lens

    with pytest.raises(vpd_lens.errors.AttachError, match="no decomposition"):
        vpd_lens.attribute(tiny_bridge(), PROMPT)


def test_pruning_by_influence_keeps_paths() -> None:
    graph = traced(attached(), frozen=True)
    small = graph.pruned(0.6, 0.9)
    assert 2 < small.n_nodes < graph.n_nodes
    assert graph.pruned(1.0, 1.0).n_nodes <= graph.n_nodes
    leads = set(small.edges.source.tolist()) | set(
        small.nodes.of_kind("output", "embedding").nonzero()[:, 0].tolist()
    )
    assert leads == set(range(small.n_nodes))
    kept, all_edges = inner_edges(small), inner_edges(graph)
    assert all(all_edges[e] == w for e, w in kept.items() if not e[0].startswith("embed"))


def test_influence_of_a_chain_by_hand() -> None:
    from vpd_lens.analysis.circuits.influence import influence
    from vpd_lens.analysis.circuits.tables import KINDS, Edges, Nodes

    # embed -> a -> output, error -> a, embed -> output; shares 3/4, 1/4 into a; 1/5, 4/5 out.
    kinds = ["embedding", "error", "subcomponent", "output"]
    column = torch.arange(4)
    nodes = Nodes(
        ("embed", "m", "output"),
        torch.tensor([KINDS.index(k) for k in kinds]),
        torch.tensor([0, 1, 1, 2]),
        column * 0,
        column,
        torch.ones(4),
        torch.tensor([1.0, 0.0, 1.0, 0.7]),
    )
    edges = Edges(
        torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 3, 3]), torch.tensor([3.0, -1, 4, 1])
    )
    weights = torch.tensor([0.7])
    found = influence(nodes, edges, weights)
    torch.testing.assert_close(found.nodes, torch.tensor([0.6 + 0.2, 0.2, 0.8, 1.0]))
    torch.testing.assert_close(found.edges, torch.tensor([0.6, 0.2, 0.8, 0.2]))
    assert found.replacement == pytest.approx(0.8)
    assert found.completeness == pytest.approx((0.8 + 0.2 + 0.8 * 0.75 + 1.0) / 2.8)
