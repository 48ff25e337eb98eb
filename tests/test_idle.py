"""What contributes nothing: found among subcomponents of known size, and left out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vpd_lens
from tests.conftest import tiny_bridge
from vpd_lens.analysis import alive_subcomponents
from vpd_lens.decomposition.idle import contributing, idle

SITES, C = r"0.attn\.[vo]|mlp", 12
NOTHING = {"blocks.0.attn.v": [0, 5], "blocks.0.mlp.in": [3], "blocks.1.mlp.out": [1, 2, 11]}
PROMPT = torch.tensor([3, 11, 7, 19, 2, 23])

pytestmark = pytest.mark.filterwarnings("ignore:this decomposition is untrained")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Some subcomponents write nothing, almost; all have importances of every size."""
    model = vpd_lens.decompose(tiny_bridge(), sites=SITES, n_subcomponents=C)
    *_, last = model.vpd.importance.parameters()
    with torch.no_grad():
        last += torch.randn(last.shape, generator=torch.Generator().manual_seed(3)) + 0.5
        for name, columns in NOTHING.items():
            model.vpd.u(name)[columns] *= 1e-5
    return model


@pytest.fixture(scope="module")
def known(model: nn.Module) -> Tensor:
    known = torch.zeros(model.vpd.layout.total, dtype=torch.bool)
    for name, columns in NOTHING.items():
        known[model.vpd.layout.columns(name)][columns] = True
    return known


@torch.no_grad()
def test_exactly_those_scaled_to_nothing_are_idle(model: nn.Module, known: Tensor) -> None:
    vpd = model.vpd
    assert torch.equal(idle(vpd), known)
    # How a size is shared between V and U means nothing.
    vpd.v("blocks.0.attn.v").mul_(1e-4)
    vpd.u("blocks.0.attn.v").mul_(1e4)
    assert torch.equal(idle(vpd), known)
    vpd.v("blocks.0.attn.v").mul_(1e4)
    vpd.u("blocks.0.attn.v").mul_(1e-4)
    assert idle(vpd, share=1e3).all()


@torch.no_grad()
def test_a_position_counts_by_what_is_written_there(model: nn.Module, known: Tensor) -> None:
    vpd, (_, inputs) = model.vpd, model.vpd.target(PROMPT[None])
    for share in (1e-3, 0.3):
        found = contributing(vpd, inputs, share)[0]
        small = idle(vpd, share)
        for site, x in zip(vpd.sites, inputs, strict=True):
            here = vpd.layout.columns(site.name)
            for t in range(len(PROMPT)):
                parts = (x[0, t] @ vpd.v(site.name))[:, None] * vpd.u(site.name)
                expected = parts.norm(dim=-1) > share * (x[0, t] @ site.weight).norm()
                assert torch.equal(found[t, here], expected & ~small[here])
    assert found.any()
    assert not found.all(dim=1).any()
    assert not contributing(vpd, inputs)[..., known].any()
    nothing = [torch.zeros_like(x) for x in inputs]
    assert not contributing(vpd, nothing, 0.0).any()


def test_they_count_in_l0_and_not_in_what_contributes(
    model: nn.Module, known: Tensor, tmp_path: Any, undrawn: None
) -> None:
    tokens = torch.randint(29, (4, 8), generator=torch.Generator().manual_seed(1))
    report = vpd_lens.evaluate(model, tokens, pgd_steps=(), progress=False)
    vpd, (_, inputs) = model.vpd, model.vpd.target(tokens)
    g = vpd.causal_importance(tokens)
    useful = g * contributing(vpd, inputs)
    for name in vpd.layout.names:
        here = vpd.layout.columns(name)
        for threshold in ("0", "0.1"):
            for counted, l0 in ((g, report.l0), (useful, report.l0_contributing)):
                count = (counted[..., here] > float(threshold)).double().sum(-1).mean()
                assert l0[threshold][name] == pytest.approx(float(count))
        alive = (useful[..., here].mean((0, 1)) > 1e-6).sum()
        assert report.alive_contributing[name] == alive
    l0 = (g > 0).sum()
    assert report.idle() == pytest.approx(float(1 - (useful > 0).sum() / l0))
    assert report.idle("blocks.0.mlp.in") > 0
    assert report.alive_contributing["total"] < report.alive["total"]
    found = alive_subcomponents(vpd, [tokens])
    chosen = (g.mean((0, 1)) > 1e-6) & ~known
    assert sum(map(len, found.values())) == chosen.sum()

    old = json.loads(report.model_dump_json())
    del old["l0_contributing"], old["alive_contributing"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    before = vpd_lens.EvalReport.from_json(tmp_path / "old.json")
    assert before.idle() != before.idle()
    assert before.l0 == report.l0
    for page in (
        before.to_html(tmp_path / "a.html", beside=report),
        report.to_html(tmp_path / "b"),
    ):
        assert "contributing" in page.read_text()
    assert "L0, contributing" in str(report)
    assert "L0, contributing" not in str(before)


@pytest.mark.parametrize(("share", "said"), [(0.05, False), (0.3, True)])
def test_the_verdict_says_so_if_they_are_many(model: nn.Module, share: float, said: bool) -> None:
    tokens = torch.randint(29, (2, 8), generator=torch.Generator().manual_seed(1))
    report = vpd_lens.evaluate(model, tokens, pgd_steps=(), progress=False)
    report.l0_contributing["0"]["total"] = (1 - share) * report.l0["0"]["total"]
    assert ("30% of what is in use" in report.verdict()) is said
    assert ("contributes nothing" in report.verdict()) is said


@pytest.mark.parametrize("frozen", [False, True])
def test_a_graph_without_them_is_the_graph_but_for_the_nodes(
    model: nn.Module, known: Tensor, frozen: bool
) -> None:
    """What they wrote is the error's, so that all edges into a node have the same sum."""
    g = torch.rand(
        len(PROMPT), C * len(model.vpd.sites), generator=torch.Generator().manual_seed(5)
    )
    settings = {"importance": g, "frozen": frozen, "progress": False}
    whole = vpd_lens.attribute(model, PROMPT, [3, 7], idle=0.0, **settings)
    graph = vpd_lens.attribute(model, PROMPT, [3, 7], **settings)
    gone = set(whole.nodes.names()) - set(graph.nodes.names())
    assert set(graph.nodes.names()) < set(whole.nodes.names())
    assert len(gone) == graph.settings["n_idle"] > whole.settings["n_idle"]
    for name, columns in NOTHING.items():
        assert gone >= {f"{name}:{c}@{t}" for c in columns for t in range(len(PROMPT))}
    expected: dict[tuple[str, str], float] = {}
    for (source, target), weight in edges(whole).items():
        if target not in gone:
            place, _, position = source.rpartition("@")
            error = f"{place.rpartition(':')[0]}.error@{position}"
            pair = (error if source in gone else source, target)
            expected[pair] = expected.get(pair, 0.0) + weight
    found, scale = edges(graph), max(map(abs, edges(whole).values()))
    for pair in found.keys() | expected.keys():
        assert found.get(pair, 0.0) == pytest.approx(expected.get(pair, 0.0), abs=1e-5 * scale)


def edges(graph: Any) -> dict[tuple[str, str], float]:
    """The weights of a graph's edges by the names of their ends."""
    names = graph.nodes.names()
    columns = graph.edges.source.tolist(), graph.edges.target.tolist(), graph.edges.weight.tolist()
    return {(names[s], names[t]): weight for s, t, weight in zip(*columns, strict=True)}
