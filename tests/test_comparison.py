"""Comparison of decompositions, against rank-1 matrices written out."""

import math

import pytest
import torch
from conftest import tiny_bridge

import vpd_lens
from vpd_lens.analysis import (
    alive_subcomponents,
    compare,
    directions,
    multiple_match_share,
    random_baseline,
)
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.evaluation.metrics import ALIVE

SHAPES = {"a": (5, 7), "b": (6, 4)}


def drawn(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        site: (
            torch.randn(d_in, count, generator=generator),
            torch.randn(count, d_out, generator=generator),
        )
        for site, (d_in, d_out) in SHAPES.items()
    }


def numbers(similarity):
    return similarity.v, similarity.u, similarity.rank_one


def brute_force(reference, other):
    """Largest absolute cosines of one site, from flattened vectors and written-out matrices."""

    def vectors(v, u):
        columns = range(v.shape[1])
        return [
            [v[:, c] for c in columns],
            [u[c] for c in columns],
            [torch.outer(v[:, c], u[c]).flatten() for c in columns],
        ]

    def cosine(x, y):
        return abs(float(x @ y / (x.norm() * y.norm())))

    return [
        [max(cosine(x, y) for y in theirs) for x in mine]
        for mine, theirs in zip(vectors(*reference), vectors(*other), strict=True)
    ]


def mean(values):
    return sum(values) / len(values)


def test_against_written_out_matrices():
    reference, other = drawn(3, 0), drawn(8, 1)
    found = compare(reference, other)
    expected = {site: brute_force(reference[site], other[site]) for site in SHAPES}
    for site in SHAPES:
        assert numbers(found.sites[site]) == pytest.approx([mean(best) for best in expected[site]])
        assert found.sites[site].n_reference == 3
        assert found.sites[site].n_other == 8
    pooled = [a + b for a, b in zip(expected["a"], expected["b"], strict=True)]
    assert numbers(found.overall) == pytest.approx([mean(best) for best in pooled])
    assert (found.overall.n_reference, found.overall.n_other) == (6, 16)


def test_the_overall_mean_is_over_subcomponents_not_sites():
    reference, other = drawn(4, 0), drawn(4, 1)
    alive = {"a": torch.tensor([0, 1, 2, 3]), "b": torch.tensor([2])}
    found = compare(reference, other, (alive, {site: torch.arange(4) for site in SHAPES}))
    expected = (4 * found.sites["a"].v + found.sites["b"].v) / 5
    assert found.overall.v == pytest.approx(expected)


def test_the_same_decomposition_in_another_guise():
    reference = drawn(5, 0)
    order = torch.tensor([3, 0, 4, 1, 2])
    scale = torch.tensor([2.0, -0.1, 30.0, -1.0, 0.5])
    disguised = {
        site: (v[:, order] * scale, u[order] / scale[:, None]) for site, (v, u) in reference.items()
    }
    assert numbers(compare(reference, reference).overall) == pytest.approx((1, 1, 1))
    assert numbers(compare(reference, disguised).overall) == pytest.approx((1, 1, 1))
    third = drawn(6, 1)
    for one, two in (
        (compare(reference, third), compare(disguised, third)),
        (compare(third, reference), compare(third, disguised)),
    ):
        assert numbers(one.overall) == pytest.approx(numbers(two.overall))
    assert multiple_match_share(reference, third) == multiple_match_share(disguised, third)


def test_signs_are_conventions():
    reference, other = drawn(3, 0), drawn(4, 1)
    flipped = {site: (-v, u) for site, (v, u) in other.items()}
    assert compare(reference, flipped) == compare(reference, other)


def test_it_is_not_symmetric():
    v, u = torch.eye(4), torch.eye(4)
    all_of_it, part = {"w": (v, u)}, {"w": (v[:, :1], u[:1])}
    assert numbers(compare(part, all_of_it).overall) == (1, 1, 1)
    assert numbers(compare(all_of_it, part).overall) == (0.25, 0.25, 0.25)


def test_only_alive_subcomponents_count():
    reference, other = drawn(4, 0), drawn(6, 1)
    alive = (
        {"a": torch.tensor([1, 3]), "b": torch.tensor([0])},
        {"a": torch.tensor([5]), "b": torch.tensor([2, 4])},
    )
    kept = [
        {site: (v[:, keep[site]], u[keep[site]]) for site, (v, u) in whole.items()}
        for whole, keep in zip((reference, other), alive, strict=True)
    ]
    assert compare(reference, other, alive) == compare(*kept)
    assert multiple_match_share(reference, other, alive, 0.1) == multiple_match_share(
        *kept, threshold=0.1
    )


def test_nothing_alive():
    reference, other = drawn(2, 0), drawn(2, 1)
    none = {site: torch.tensor([], dtype=torch.long) for site in SHAPES}
    both = {site: torch.arange(2) for site in SHAPES}
    assert numbers(compare(reference, other, (both, none)).overall) == (0, 0, 0)
    found = compare(reference, other, (none, both)).overall
    assert all(math.isnan(value) for value in numbers(found))
    assert multiple_match_share(reference, other, (both, none)) == 0
    assert math.isnan(multiple_match_share(reference, other, (none, both)))


def test_a_zero_direction_matches_nothing():
    v, u = torch.eye(3), torch.eye(3)
    empty = {"w": (torch.zeros(3, 3), u)}
    assert numbers(compare({"w": (v, u)}, empty).overall) == (0, 1, 0)


def test_random_baseline():
    """Chance has the shapes' level, and shrinks as one over the width for rank-1 matrices."""
    reference, other = drawn(10, 0), drawn(20, 1)
    chance = random_baseline(reference, other)
    assert chance == random_baseline(reference, other)
    assert chance != random_baseline(reference, other, seed=1)
    assert (chance.overall.n_reference, chance.overall.n_other) == (20, 40)
    wide = {"w": (torch.ones(400, 50), torch.ones(50, 400))}
    similarity = random_baseline(wide, wide).overall
    one_entry = 1 / math.sqrt(400)  # standard deviation of a cosine
    assert 2 * one_entry < similarity.v < 3 * one_entry
    assert 2 * one_entry < similarity.u < 3 * one_entry
    assert similarity.rank_one < 5 * one_entry**2
    alive = {"w": torch.arange(7)}
    assert random_baseline(wide, wide, (alive, alive)).overall.n_reference == 7


def test_multiple_matches_by_hand():
    def rows(*angles):
        u = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])
        return torch.ones(3, len(angles)), u

    # Matches are within 60 degrees, up to sign.
    reference = {"w": rows(0, 90)}
    assert multiple_match_share(reference, {"w": rows(0, 90)}) == 0
    assert multiple_match_share(reference, {"w": rows(0, 10, 90)}) == 0.5
    assert multiple_match_share(reference, {"w": rows(0, 190, 90)}) == 0.5
    assert multiple_match_share(reference, {"w": rows(45, 135)}) == 1
    assert multiple_match_share(reference, {"w": rows(0, 61, 119)}) == 0.5
    assert multiple_match_share(reference, {"w": rows(0, 10, 90)}, threshold=0.99) == 0
    two_sites = {"w": rows(0, 90), "x": rows(0, 90)}
    assert multiple_match_share(two_sites, {"w": rows(0, 10, 90), "x": rows(0, 90)}) == 0.25


@pytest.mark.parametrize("function", [compare, random_baseline, multiple_match_share])
def test_decompositions_of_different_models_are_refused(function):
    reference = drawn(3, 0)
    with pytest.raises(InputError, match=r"only in one of them: \['b'\]"):
        function(reference, {"a": reference["a"]})
    with pytest.raises(InputError, match="b: matrices of different shapes"):
        function(reference, {**reference, "b": reference["a"]})


def test_directions_of_a_handle_and_of_a_directory(tmp_path):
    model = vpd_lens.decompose(tiny_bridge(), n_subcomponents=5)
    model.vpd.save(tmp_path / "saved")
    handle, saved = directions(model.vpd), directions(tmp_path / "saved")
    assert list(handle) == list(model.vpd.layout.names)
    assert set(handle) == set(saved)
    assert all(torch.equal(a, b) for s in saved for a, b in zip(handle[s], saved[s], strict=True))
    assert numbers(compare(handle, saved).overall) == pytest.approx((1, 1, 1))
    with pytest.raises(ArtefactError, match="no such directory"):
        directions(tmp_path / "nowhere")


def test_alive_is_a_mean_importance_above_the_threshold(tokens):
    model = vpd_lens.decompose(tiny_bridge(), n_subcomponents=5)
    *_, last = model.vpd.importance.parameters()
    with torch.no_grad():
        last.copy_(torch.linspace(-3, 1, last.numel()))
    batches = tokens[:8].split(4)
    alive = alive_subcomponents(model.vpd, batches)
    mean_importance = torch.cat([model.vpd.causal_importance(b) for b in batches]).mean((0, 1))
    parts = model.vpd.layout.split(mean_importance)
    expected = {n: (p > ALIVE).nonzero().flatten() for n, p in zip(alive, parts, strict=True)}
    assert 0 < sum(len(found) for found in alive.values()) < model.vpd.layout.total
    assert all(torch.equal(alive[site], expected[site]) for site in alive)
    report = vpd_lens.evaluate(
        model, tokens[:8], batch_size=8, n_batches=1, pgd_steps=(), progress=False
    )
    assert {s: len(found) for s, found in alive.items()} == {s: report.alive[s] for s in alive}
