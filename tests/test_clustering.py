"""Clusters against descriptions counted out, and against groups that were put in."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, permutations
from math import exp, log2

import numpy as np
import pytest
import torch
from conftest import tiny_bridge

import vpd_lens
from vpd_lens.analysis.clustering import (
    Activity,
    Best,
    Boltzmann,
    Clusters,
    Range,
    Rank,
    activity,
    distance,
    merge,
    sweep,
)
from vpd_lens.analysis.clustering.bits import coactive, counts_within, packed, unpacked
from vpd_lens.analysis.clustering.merging import Groups
from vpd_lens.analysis.clustering.sweep import labels_distance
from vpd_lens.errors import ArtefactError, DataError, InputError
from vpd_lens.viz.graph_page import payload

pytestmark = pytest.mark.filterwarnings("ignore:this decomposition is untrained")


def made(active: np.ndarray, per_sequence: int = 10) -> Activity:
    """An activity as if `activity` had found it."""
    n_positions, n = active.shape
    place = np.arange(n_positions)
    names = tuple(f"blocks.0.mlp.in:{c}" for c in range(n))
    places = place // per_sequence, place % per_sequence
    return Activity(names, packed(active), *places, 0.01, 0, "of nothing")


def bits_of(active: np.ndarray, groups: list[list[int]], alpha: float) -> float:
    """The description's length from its definition."""
    names = log2(len(groups))
    return sum(active[:, g].any(1).sum() * (names + alpha * len(g)) for g in groups)


@pytest.fixture
def active():
    rng = np.random.default_rng(0)
    active = rng.random((300, 12)) < 0.5 * rng.random(12)
    active[:, 3] = active[:, 5]
    active[:, 7] |= active[:, 2]
    return active


SAMPLERS = [Best(), Rank(), Rank(3.0), Range(0.3), Boltzmann(0.05)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 5.0])
def test_every_cost_of_every_step_is_the_change_of_the_description(active, alpha, sampler):
    found = merge(made(active), alpha, sampler, until_one=True, seed=1)
    groups, n = [[c] for c in range(12)], len(active)
    for step, (first, second) in enumerate(found.merges.tolist()):
        before = bits_of(active, groups, alpha)
        costs = {}
        for a, b in combinations(range(len(groups)), 2):
            others = [g for i, g in enumerate(groups) if i not in (a, b)]
            merged = bits_of(active, [*others, groups[a] + groups[b]], alpha)
            costs[groups[a][0], groups[b][0]] = (merged - before) / n
        assert found.lengths[step] == pytest.approx(before / n, abs=1e-9)
        assert found.costs[step] == pytest.approx(costs[first, second], abs=1e-9)
        assert found.best[step] == pytest.approx(min(costs.values()), abs=1e-9)
        if sampler == Best():
            assert found.costs[step] == found.best[step]
        own = next(g for g in groups if g[0] == first)
        other = next(g for g in groups if g[0] == second)
        groups = sorted([g for g in groups if g not in (own, other)] + [sorted(own + other)])
        at = found.at(len(groups))
        assert sorted(sorted(int(m.split(":")[1]) for m in c.members) for c in at) == groups
        assert at.length == pytest.approx(bits_of(active, groups, alpha) / n, abs=1e-9)
    assert len(groups) == 1
    # It is cut where the cheapest merge costs for the first time.
    (costly,) = (found.best >= 0).nonzero()[:1, 0].tolist() or [len(found.best)]
    assert found.n_groups == 12 - costly
    stopped = merge(made(active), alpha, sampler, seed=1)
    assert stopped.n_groups == found.n_groups == 12 - len(stopped.merges)
    torch.testing.assert_close(stopped.labels, found.labels)


def test_the_pairs_of_any_rank_are_those_of_the_whole_table(active):
    """Also after merges, and with ties: those of the smallest numbers first."""
    groups, rng = Groups(packed(active), 0.7, len(active)), np.random.default_rng(2)
    while groups.n > 2:
        gains, pair = groups.all()
        every = [pair(i) for i in range(len(gains)) if gains[i] > -np.inf]
        assert len(every) == groups.n_pairs
        every.sort(key=lambda p: (-p.gain, p.first, p.second))
        for m in (1, 2, 5, groups.n_pairs):
            assert groups.best(m) == every[:m]
        _, *chosen = every[rng.integers(len(every))]
        groups.merge(*chosen)


def test_ranks_are_drawn_by_their_formula():
    gamma, n_pairs, n = 0.2, 40, 20_000
    drawn = [Rank(gamma).rank((i + 0.5) / n, n_pairs) for i in range(n)]
    weights = np.array([exp(-gamma * rank) for rank in range(n_pairs)])
    shares = np.bincount(drawn, minlength=n_pairs) / n
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=1.01 / n)
    assert Rank(1e-9).rank(1 - 1e-16, 3) == 2


@pytest.mark.parametrize("sampler", [Range(0.2), Boltzmann(0.02)], ids=repr)
def test_pairs_are_drawn_by_their_costs(active, sampler):
    n = 500
    drawn: dict[tuple[int, int], int] = {}
    groups = Groups(packed(active), 1.0, len(active))
    groups.merge(3, 5)  # so that some numbers are gone
    for i in range(n):
        choice = sampler.choose(groups, (i + 0.5) / n)
        drawn[choice[:2]] = drawn.get(choice[:2], 0) + 1
    gains, pair = groups.all()
    pairs = [pair(i) for i in range(len(gains)) if gains[i] > -np.inf]
    costs = np.array([groups.cost(p.gain) / len(active) for p in pairs])
    if isinstance(sampler, Range):
        weights = costs <= costs.min() + sampler.share * (costs.max() - costs.min()) + 1e-12
    else:
        weights = np.exp(-(costs - costs.min()) / sampler.temperature)
    expected = weights / weights.sum()
    shares = np.array([drawn.get((p.first, p.second), 0) / n for p in pairs])
    np.testing.assert_allclose(shares, expected, atol=1.01 / n)


def test_planted_groups_are_found():
    """Thirty groups of four, whose members are active together but for one position in fifty."""
    rng = np.random.default_rng(0)
    density = 0.1 + 0.2 * rng.random(30)
    groups = rng.random((4000, 30)) < density
    active = np.repeat(groups, 4, axis=1) & (rng.random((4000, 120)) > 0.02)
    order = rng.permutation(120)
    truth = np.repeat(np.arange(30), 4)[order]
    found = merge(made(active[:, order]), 1.0, Best())
    assert labels_distance(truth, found.labels.numpy()) == 0
    first = found.top(1)[0]
    assert len(first) == 4
    assert first.together > 0.9
    assert found.of(first.members[2]) == first
    # Pairs drawn by rank are now and then the wrong ones, but far from any.
    swept = sweep(made(active[:, order]), [1.0], [0, 1], progress=False)
    own, chance = swept.distance(1.0)
    assert own < 0.3 < 0.6 < chance
    assert f"{own:.3f}" in str(swept)


def test_bits_are_counted_as_they_are():
    rng = np.random.default_rng(0)
    active = rng.random((1234, 33)) < 0.2
    bits = packed(active)
    assert (unpacked(bits, 1234) == active).all()
    both = active.astype(int)
    assert (coactive(bits) == both.T @ both).all()
    some = active[:, 3] & active[:, 8]
    assert (counts_within(bits, bits[:, 3] & bits[:, 8]) == active[some].sum(0)).all()


def test_distances_are_those_of_the_best_matching():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(4, size=9), rng.integers(4, size=9)
        a, b = (np.unique(x, return_inverse=True)[1] for x in (a, b))
        best = max(
            sum(p[x] == y for x, y in zip(a, b, strict=True)) for p in permutations(range(4))
        )
        assert labels_distance(a, b) == pytest.approx(1 - best / 9)
    assert labels_distance(np.array([0, 0, 1]), np.array([1, 1, 0])) == 0


def test_activity_goes_together_over_distances():
    rng = np.random.default_rng(0)
    active = rng.random((400, 6)) < 0.3
    active[:, 4] = True
    active[1:, 1] = active[:-1, 0]
    found = made(active, per_sequence=20)
    now = found.correlation()
    np.testing.assert_allclose(now[:4, :4], np.corrcoef(active.T[:4]), atol=1e-6)
    assert (now[4] == 0).all()  # always active: it goes together with nothing
    then = found.correlation(offset=1)
    rows = np.array([t for t in range(400) if t % 20])
    assert then[1, 0] == pytest.approx(1)
    expected = np.corrcoef(active[rows, 2], active[rows - 1, 3])[0, 1]
    assert then[2, 3] == pytest.approx(expected, abs=1e-6)
    best = found.top(1, offset=1)[0]
    assert best[:2] == ("blocks.0.mlp.in:1", "blocks.0.mlp.in:0")
    assert best.both == active[rows, 1].sum()
    assert len(found.top(100)) == 15  # each pair once
    with pytest.raises(InputError, match="no two of the positions are so far apart"):
        found.correlation(offset=20)
    with pytest.raises(InputError, match="is active; sites of what is"):
        found.correlation("blocks.0.attn.q")


@pytest.fixture(scope="module")
def decomposed():
    return vpd_lens.decompose(tiny_bridge(), n_subcomponents=5)


@pytest.fixture
def clusters(decomposed, tokens):
    return vpd_lens.cluster(decomposed, tokens[:8], threshold=0.4, batch_size=4, progress=False)


def test_activity_is_where_importances_exceed_the_threshold(decomposed, tokens):
    found = activity(decomposed, tokens[:8], threshold=0.45, batch_size=3, progress=False)
    importance = decomposed.vpd.causal_importance(tokens[:8]).flatten(0, 1)
    above = importance > 0.45
    used = above.any(0)
    assert 0 < used.sum() < len(used)  # some are dead, and dropped
    assert (found.active() == above[:, used]).all()
    assert found.n_dead == int((~used).sum())
    np.testing.assert_array_equal(found.counts, above[:, used].sum(0))
    some = activity(decomposed, tokens[:8], threshold=0.45, per_sequence=3, progress=False)
    places = torch.from_numpy(some.sequence), torch.from_numpy(some.position)
    assert np.bincount(some.sequence).tolist() == [3] * 8
    here = (decomposed.vpd.causal_importance(tokens[:8]) > 0.45)[places]
    assert (some.active() == here[:, here.any(0)]).all()


def test_pads_count_nowhere(decomposed):
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    found = activity(decomposed, rows, threshold=0.4, progress=False)
    assert found.n_positions == 9
    assert found.position.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert (
        activity(decomposed, rows, threshold=0.4, per_sequence=4, progress=False).n_positions == 7
    )


def test_they_are_saved_and_belong_to_their_decomposition(decomposed, clusters, tmp_path):
    clusters.save(tmp_path / "clusters")
    again = Clusters.load(tmp_path / "clusters", decomposed.vpd)
    assert str(again) == str(clusters)
    torch.testing.assert_close(again.labels, clusters.labels)
    torch.testing.assert_close(again.lengths, clusters.lengths, rtol=0, atol=0)
    assert "<pre" in again._repr_html_()
    other = vpd_lens.decompose(tiny_bridge(), n_subcomponents=6)
    with pytest.raises(ArtefactError, match="these clusters are of another decomposition"):
        Clusters.load(tmp_path / "clusters", other.vpd)
    with pytest.raises(InputError, match="of different subcomponents"):
        distance(clusters, replace(clusters, names=clusters.names[::-1]))


def test_a_cluster_is_ablated_by_masks_and_by_edits(decomposed, clusters, tokens):
    cluster = next(c for c in clusters if len(c) > 1)
    with decomposed.vpd.masked(cluster.masks(decomposed.vpd)):
        by_masks = decomposed(tokens[:2])
    with vpd_lens.edited(decomposed, vpd_lens.Ablate(cluster.members)):
        by_edits = decomposed(tokens[:2])
    torch.testing.assert_close(by_masks, by_edits)
    assert not torch.equal(by_masks, decomposed(tokens[:2]))
    only = cluster.masks(decomposed.vpd, value=1.0, others=0.0)
    assert sum(int(m.sum()) for m in only.values()) == len(cluster)
    assert list(only) == list(decomposed.vpd.layout.names)


def test_nodes_of_a_position_are_grouped(clusters):
    cluster = next(c for c in clusters if len(c) > 1)
    one, two = cluster.members[:2]
    nodes = [f"{one}@3", f"{two}@3", f"{one}@4", "embed@3", "output:3@5", "blocks.0.mlp.in.error@3"]
    assert clusters.grouped(nodes) == {f"cluster {cluster.number}@3": nodes[:2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0; expected an importance between 0 and 1"),
        ({"threshold": 1.0}, "threshold=1.0; expected an importance between 0 and 1"),
        ({"alpha": -0.1}, "alpha=-0.1; expected a number of bits, at least 0"),
        ({"alpha": float("nan")}, "alpha=nan; expected a number of bits, at least 0"),
        ({"n_batches": 0}, "n_batches is 0; expected at least 1"),
        ({"per_sequence": 0}, "per_sequence is 0; expected at least 1"),
        ({"threshold": 1 - 1e-9}, "no subcomponent has an importance above threshold"),
        ({"sites": ["blocks.0.mlp.up"]}, "sites="),
    ],
)
def test_bad_arguments_are_refused(decomposed, tokens, change, message):
    with pytest.raises(InputError, match=message):
        vpd_lens.cluster(decomposed, tokens[:4], progress=False, **change)


def test_what_cannot_be_asked_is_refused(decomposed, clusters):
    with pytest.raises(DataError):
        vpd_lens.cluster(decomposed, torch.empty(0, 8, dtype=torch.long), progress=False)
    with pytest.raises(InputError, match="this run has between"):
        clusters.at(0)
    with pytest.raises(InputError, match="is in no group"):
        clusters.of("blocks.7.mlp.in:3")
    for wrong in (lambda: Rank(0.0), lambda: Range(1.1), lambda: Boltzmann(0.0)):
        with pytest.raises(InputError, match="expected a number"):
            wrong()
    with pytest.raises(InputError, match="at least one of each"):
        sweep(made(np.ones((3, 2), bool)), alphas=[])


@pytest.fixture(scope="module")
def explained():
    """A model that is called trained, a graph of it, and clusters whose groups are in it."""
    model = vpd_lens.decompose(tiny_bridge(), n_subcomponents=5)
    model.vpd.trained_steps = 1
    rows = torch.randint(0, 29, (8, 8), generator=torch.Generator().manual_seed(1))
    graph = vpd_lens.attribute(model, rows[0][:4], progress=False)
    return model, graph, vpd_lens.cluster(model, rows, threshold=0.4, progress=False)


def test_groups_are_nodes_of_a_graph_whose_edges_are_sums(explained):
    _, graph, clusters = explained
    groups, whole = clusters.groups_in(graph), graph.to_networkx()
    small = graph.to_networkx(clusters=clusters)
    inside = {member for members in groups.values() for member in members}
    assert groups
    assert set(small) == set(whole) - inside | set(groups)
    (name, members), *_ = groups.items()
    assert small.nodes[name]["members"] == members
    for target in small.successors(name):
        ends = groups.get(target, [target])
        total = sum(w for a, b, w in whole.edges(data="weight") if a in members and b in ends)
        assert small.edges[name, target]["weight"] == pytest.approx(total, abs=1e-5)
    assert not any(small.has_edge(name, name) for name in groups)


def test_groups_are_supernodes_and_on_the_page(explained, tmp_path):
    _, graph, clusters = explained
    groups = clusters.groups_in(graph)
    path = graph.to_circuit_tracer(tmp_path, "a", clusters=clusters)
    written = json.loads(path.read_text())
    view, known = written["qParams"], {node["node_id"] for node in written["nodes"]}
    assert [node[0] for node in view["supernodes"]] == list(groups)
    assert all(set(members) <= known for _, *members in view["supernodes"])
    shown = payload(graph, clusters=clusters)["groups"]
    assert {group["name"]: group["members"] for group in shown} == groups
    assert payload(graph)["groups"] == []
    other = replace(clusters, fingerprint="another")
    with pytest.raises(ArtefactError, match="of another decomposition"):
        graph.to_html(tmp_path / "graph.html", clusters=other)


def test_a_card_says_which_group_it_is_in(explained):
    model, _, clusters = explained
    cluster = next(c for c in clusters if len(c) > 1)
    card = vpd_lens.card(model, cluster.members[0], clusters=clusters)
    assert card.cluster == cluster.number
    assert card.friends == list(zip(cluster.members, cluster.shares, strict=True))[1:9]
    assert f"cluster {cluster.number}" in str(card)
    assert vpd_lens.card(model, cluster.members[0]).friends == []
    with pytest.raises(ArtefactError, match="of another decomposition"):
        vpd_lens.Cards(model, clusters=replace(clusters, fingerprint="another"))
