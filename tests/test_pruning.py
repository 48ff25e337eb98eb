"""Pruning to a behaviour: objectives, the adversary, and what must not depend on the prompt."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import tiny_bridge
from vpd_lens.decomposition.idle import idle
from vpd_lens.progress import Progress

LONG, SHORT = [3, 11, 7, 19, 2, 23], [5, 2, 8]

pytestmark = pytest.mark.filterwarnings("ignore:this decomposition is untrained")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """V U = W at every site, and importances that differ, so that masks matter and ci works."""
    import vpd_lens

    model = vpd_lens.decompose(tiny_bridge(), n_subcomponents=24, sites=r"0.mlp|attn\.[vo]")
    vpd = model.vpd
    with torch.no_grad():
        for index, site in enumerate(vpd.sites):
            left, scale, right = torch.linalg.svd(site.weight, full_matrices=False)
            rank = len(scale)
            vpd.subcomponents.v[index].zero_()[:, :rank] = left * scale
            vpd.subcomponents.u[index].zero_()[:rank] = right
    return model


def found(model: nn.Module, prompts: Any, target: Any = 4, **settings: Any) -> Any:
    import vpd_lens

    settings = {
        "steps": 6,
        "adversary_steps": 2,
        "attack_steps": (2,),
        "attack_restarts": 1,
        "draws": 2,
        **settings,
    }
    config = vpd_lens.PruneConfig(**settings)
    return vpd_lens.prune(model, prompts, target, config, progress=False)


@pytest.fixture(scope="module")
def circuit(model: nn.Module) -> Any:
    return found(model, LONG)


@pytest.mark.slow
def test_prompts_pruned_together_are_pruned_as_if_alone(model: nn.Module) -> None:
    """Nor does the padding of the shorter one matter, or the price of a node depend on length."""
    both = found(model, [LONG, SHORT], method="ci", steps=12)
    for index, prompt in enumerate((LONG, SHORT)):
        alone = found(model, prompt, method="ci", steps=12)
        torch.testing.assert_close(both.of_prompt(index), alone.of_prompt(), atol=2e-2, rtol=0)
        assert len(alone.of_prompt()) == len(prompt)


@pytest.mark.parametrize("method", ["ci", "stochastic", "adversarial"])
def test_as_many_passes_as_announced(model: nn.Module, method: str, monkeypatch: Any) -> None:
    prune = import_module("vpd_lens.analysis.circuits.prune")
    bars: list[Any] = []

    class Seen(Progress):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(prune, "Progress", Seen)
    found(model, [LONG, SHORT], method=method)
    (bar,) = bars
    assert bar.done == bar.total
    assert bar.cost == f"{bar.total} passes forward or backward of 2 x 6 tokens"


def test_nothing_counts_after_the_position(model: nn.Module) -> None:
    from vpd_lens.analysis.circuits.targets import Token

    circuit = found(model, LONG, Token(4, position=2), method="ci")
    assert bool((circuit.of_prompt()[3:] == 0).all())
    assert bool((circuit.of_prompt()[:3] > 0).any())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ci", "stochastic", "adversarial"])
def test_a_higher_price_leaves_fewer_nodes(model: nn.Module, method: str) -> None:
    cheap, dear = (found(model, LONG, method=method, coefficient=c).report for c in (1e-5, 1e-1))
    assert dear.nodes < cheap.nodes <= cheap.nodes_before
    assert cheap.nodes == pytest.approx(sum(cheap.nodes_by_site.values()))


def test_objectives_against_torch(model: nn.Module) -> None:
    import torch.nn.functional as F

    from vpd_lens.analysis.circuits.behaviour import behaviour_of
    from vpd_lens.analysis.circuits.targets import LogitDifference

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 29, generator=generator)
    behaviour = behaviour_of(model, [LONG, SHORT], 4, "ce")
    here = behaviour.at_position(logits)[:, 0]
    assert torch.equal(here, torch.stack([logits[0, 5], logits[1, 2]]))
    clean = torch.randn(2, 29, generator=generator)
    wanted = F.cross_entropy(here, torch.tensor([4, 4]), reduction="none")
    torch.testing.assert_close(behaviour.loss(here, clean), wanted)
    kl = F.kl_div(here.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none")
    by_kl = replace(behaviour, objective="kl")
    torch.testing.assert_close(by_kl.loss(here, clean), kl.sum(-1))
    torch.testing.assert_close(behaviour.probability(here), here.softmax(-1)[:, 4])
    pair = behaviour_of(model, [LONG, SHORT], LogitDifference(4, 9), "logit_difference")
    drop = (clean[:, 4] - clean[:, 9]) - (here[:, 4] - here[:, 9])
    torch.testing.assert_close(pair.distance(here, clean), drop)
    torch.testing.assert_close(pair.loss(here, clean), drop.clamp(min=0))


def test_the_adversary_moves_what_it_may_and_finds_the_corner() -> None:
    """A linear loss has its maximum at 1 where the gradient is positive, and at 0 elsewhere."""
    from vpd_lens.decomposition.adversary import ascend
    from vpd_lens.decomposition.masks import Sources

    generator = torch.Generator().manual_seed(3)
    slope = torch.randn(1, 4, 6, generator=generator)
    g = torch.zeros(1, 4, 6)
    start = Sources(torch.rand(1, 4, 6, generator=generator), torch.rand(1, 4, 2))
    may = torch.rand(1, 4, 6, generator=generator) > 0.5

    def loss_of(masks: Any) -> Tensor:
        m = masks.computed()
        return (slope * m.components).sum() + m.delta.sum()

    moved, _ = ascend(loss_of, g, start, 2, 1.0, moves=may)
    assert torch.equal(moved.components[may], (slope[may] > 0).float())
    assert torch.equal(moved.components[~may], start.components[~may])
    assert torch.equal(moved.delta, start.delta)
    everything, _ = ascend(loss_of, g, start, 2, 1.0)
    assert torch.equal(everything.components, (slope > 0).float())
    assert bool((everything.delta == 1).all())


def test_the_report_is_what_the_masks_do(model: nn.Module, circuit: Any) -> None:
    g = circuit.importance
    none = torch.zeros(*g.shape[:-1], model.vpd.layout.n_sites)
    from vpd_lens import Masks

    for name, masks in (("ci", Masks(g, none)), ("ablated", Masks(1 - g, none + 1))):
        with torch.no_grad():
            p = model.vpd.run(masks, torch.tensor([LONG]))[0, -1].softmax(-1)[4]
        assert circuit.report.probability[name] == pytest.approx((float(p),))
    p = model(torch.tensor([LONG]))[0, -1].softmax(-1)[4]
    assert circuit.report.mean["target"] == pytest.approx(float(p))
    worst = circuit.report.mean["stochastic, worst"]
    assert worst <= circuit.report.mean["stochastic"]
    assert "before pruning" in str(circuit.report)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_circuit(model: nn.Module, circuit: Any) -> None:
    """And nothing is drawn from the global generator."""
    state = torch.get_rng_state()
    again = found(model, LONG)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.importance, circuit.importance)
    assert again.report == circuit.report
    other = found(model, LONG, seed=1)
    assert not torch.equal(other.importance, circuit.importance)


def test_a_circuit_says_what_it_is_in_a_line(circuit: Any) -> None:
    assert len(repr(circuit)) < 120
    assert f"{circuit.report.nodes:.0f} nodes" in repr(circuit)


def test_tokens_that_look_like_markup_are_shown(circuit: Any) -> None:
    hostile = circuit.report.model_copy(update={"targets": ["[/INST]", "[bold]"]})
    assert "'[/INST]', '[bold]'" in " ".join(str(hostile).split())


def test_the_adversary_of_a_difference_is_not_blind_where_the_behaviour_holds(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it raises changes its sign with the difference's; clamped, one of two would be 0."""
    import sys

    from vpd_lens.analysis.circuits import LogitDifference

    module, raised = sys.modules["vpd_lens.analysis.circuits.prune"], []

    def ascend(loss_of: Any, g: Tensor, start: Any, *_: Any, **__: Any) -> Any:
        raised.append(float(loss_of(start.over(g)).detach()))
        return start, {}

    monkeypatch.setattr(module, "ascend", ascend)
    for tokens in ((4, 9), (9, 4)):
        found(model, LONG, LogitDifference(*tokens), objective="logit_difference", steps=1)
    other = raised[len(raised) // 2]  # each search attacks once, and then its report does
    assert raised[0] == pytest.approx(-other)
    assert raised[0] != 0


def test_logits_are_computed_where_the_behaviour_is(model: nn.Module) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = model.unembed.register_forward_hook(lambda m, args, y: shapes.append(y.shape[:2]))
    try:
        found(model, [LONG, SHORT], [4, 6], method="ci", steps=1, draws=1)
    finally:
        hook.remove()
    # Not at all where only importances are asked for, of each prompt alone.
    assert set(shapes) == {(2, 1)}


def test_a_long_search_says_so_and_prints_lines_into_a_pipe(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import vpd_lens
    from vpd_lens import progress

    attack = {"attack_steps": (1,), "attack_restarts": 1, "draws": 1}
    config = vpd_lens.PruneConfig(method="ci", steps=3, **attack)
    vpd_lens.prune(model, SHORT, 4, config, progress=False)
    assert capsys.readouterr().out == ""
    clock = iter(map(float, range(0, 10**6, 60)))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    vpd_lens.prune(model, SHORT, 4, config)
    said = capsys.readouterr().out
    assert re.search(r"Pruning: \d+ of \d+, .* passed, about \d:\d\d:\d\d left", said)
    assert all(f"step {n} " in said for n in (1, 2, 3))


def test_a_pruned_graph_has_the_nodes_of_its_circuit(
    model: nn.Module, circuit: Any, tmp_path: Any
) -> None:
    import vpd_lens

    graph = vpd_lens.attribute(model, LONG, 4, prune=circuit, idle=0.0, progress=False)
    # Of 24 subcomponents 8 are zeros, which no loss needs gone.
    nodes = circuit.of_prompt().masked_fill(idle(model.vpd, 0.0), 0)
    torch.testing.assert_close(graph.importance(model.vpd), nodes)
    assert graph.settings["n_idle"] == int((circuit.of_prompt() > nodes).sum()) > 0
    assert graph.circuit == circuit.report
    again = vpd_lens.AttributionGraph.load(graph.save(tmp_path / "graph"))
    assert again.circuit == circuit.report
    with pytest.raises(vpd_lens.errors.InputError, match="another prompt"):
        vpd_lens.attribute(model, LONG[:4], 4, prune=circuit, progress=False)
    with pytest.raises(vpd_lens.errors.InputError, match="the circuit is of"):
        vpd_lens.attribute(model, LONG, 5, prune=circuit, progress=False)
    with pytest.raises(vpd_lens.errors.InputError, match="one behaviour"):
        vpd_lens.attribute(model, LONG, [4, 5], prune="ci", progress=False)


def test_the_graph_of_any_prompt_of_a_circuit_explains_its_behaviour(model: nn.Module) -> None:
    import vpd_lens
    from vpd_lens.analysis.circuits.targets import Token

    circuit = found(model, [LONG, SHORT], [Token(4, 3), Token(6)], method="ci")
    for row, (prompt, position, token) in enumerate([(LONG, 3, 4), (SHORT, 2, 6)]):
        graph = vpd_lens.attribute(model, prompt, prune=circuit, idle=0.0, progress=False)
        assert [(o.token_id, o.position) for o in graph.outputs] == [(token, position)]
        nodes = circuit.of_prompt(row).masked_fill(idle(model.vpd, 0.0), 0)
        torch.testing.assert_close(graph.importance(model.vpd), nodes)


@pytest.mark.slow
def test_more_steps_never_look_safer(model: nn.Module) -> None:
    report = found(model, LONG, attack_steps=(4, 1, 2), attack_restarts=2).report
    for suffix in ("", ", all"):
        curve = [report.mean[f"adversarial-{n}{suffix}"] for n in (1, 2, 4)]
        assert curve == sorted(curve, reverse=True)


def test_a_logit_difference_needs_no_settings() -> None:
    from vpd_lens import PruneConfig
    from vpd_lens.analysis.circuits import LogitDifference

    assert PruneConfig.of_target(LogitDifference(4, 9)).objective == "logit_difference"
    assert PruneConfig.of_target(4) == PruneConfig.of_target(None) == PruneConfig()


@pytest.mark.parametrize(
    ("prompts", "target", "settings", "message"),
    [
        ([], 4, {}, "0 prompts|prompt is empty"),
        ([LONG, SHORT], [4], {}, "2 prompts, but 1 targets"),
        (LONG, 4, {"objective": "logit_difference"}, "LogitDifference"),
        (LONG, 77, {}, "not in the vocabulary"),
    ],
)
def test_bad_input_is_refused(
    model: nn.Module, prompts: Any, target: Any, settings: dict[str, Any], message: str
) -> None:
    from vpd_lens.errors import InputError

    with pytest.raises(InputError, match=message):
        found(model, prompts, target, **settings)
