"""What a text needs, and what is known about one subcomponent."""

from __future__ import annotations

import json

import pytest
import torch

import vpd_lens
from tests.conftest import tiny_bridge
from vpd_lens.analysis.reads_writes import Directions
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.example import example_harvest, load_example

PROMPT = "class Queue:\n    def __init__("


@pytest.fixture(scope="module")
def example():
    model = load_example()
    return model, example_harvest(model.vpd)


@pytest.fixture(scope="module")
def explained(example):
    model, harvest = example
    return vpd_lens.explain(model, PROMPT, "self", harvest=harvest)


def test_needs_are_the_importances_of_the_model(example, explained):
    model, _ = example
    tokens = model.to_tokens(PROMPT)
    torch.testing.assert_close(explained.importance, model.vpd.causal_importance(tokens)[0])
    _, cache = model.run_with_cache(tokens)
    name = "blocks.1.mlp.in"
    sizes = cache[f"{name}.vpd.hook_acts"][0] * model.vpd.u(name).norm(dim=1)
    torch.testing.assert_close(explained.activation[:, model.vpd.layout.columns(name)], sizes)
    counts = (cache[f"{name}.vpd.hook_ci"][0] > 0.1).sum(-1)
    assert explained.counts()[name].equal(counts)
    assert len(explained.needs(2, k=None, site=name)) == counts[2]


def test_an_effect_is_the_fall_of_the_log_odds_in_the_limit(example, explained):
    model, _ = example
    tokens, vpd = model.to_tokens(PROMPT), model.vpd
    token = model.to_single_token("self")

    def log_odds(masks):
        with torch.no_grad(), vpd.masked(masks):
            p = model(tokens)[0, -1].double().softmax(-1)[token]
        return float((p / (1 - p)).log())

    for position, need in explained.strongest(4):
        site, _, index = need.name.rpartition(":")
        column = vpd.layout.columns(site).start + int(index)
        sides = []
        for step in (0.05, -0.05):
            masks = torch.ones(1, tokens.shape[1], vpd.layout.total)
            masks[0, position, column] += step
            sides.append(log_odds(masks))
        assert need.effect == pytest.approx((sides[0] - sides[1]) / 0.1, rel=0.05, abs=0.01)


def test_needs_come_in_the_order_that_is_asked_for(explained):
    sizes = {
        "effect": lambda need: abs(need.effect),
        "importance": lambda need: need.importance,
        "size": lambda need: abs(need.importance * need.activation),
    }
    for by, size in sizes.items():
        found = [size(need) for need in explained.needs(-1, k=20, by=by)]
        assert found == sorted(found, reverse=True)
    every = explained.needs(3, k=None)
    assert all(need.importance > 0.1 for need in every)
    assert {need.name for need in every} == {need.name for need in explained.needs(3, None, "size")}


def test_without_a_target_the_likeliest_token_is_explained(example):
    model, _ = example
    found = vpd_lens.explain(model, PROMPT, position=4)
    probabilities = model(model.to_tokens(PROMPT))[0, 4].softmax(-1)
    assert found.target == (model.to_string(probabilities.argmax()[None]), 4)
    assert found.probability == pytest.approx(float(probabilities.max()), rel=1e-4)
    assert not found.effect[5:].any()  # nothing after it acts on it


def test_a_summary_fits_into_80_columns_and_names_what_matters(explained):
    from vpd_lens.rendering import as_text

    text = as_text(explained.summary(), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(need.name in text for _, need in explained.strongest(8))
    assert explained._repr_html_().startswith("<pre")


def test_results_are_shown_alike_in_print_and_in_a_notebook(example, explained):
    import html
    import re

    from vpd_lens.example import example_report

    model, harvest = example
    heads = vpd_lens.attention(model, harvest)
    card = vpd_lens.card(model, "blocks.3.mlp.out:60", harvest)
    pairs = heads.on("x[b]").contributions(2, 1, 1, 0)
    for result in (model.vpd, example_report(), explained, card, heads, pairs):
        page = html.unescape(re.sub("<[^>]*>", "", result._repr_html_()))
        assert page.split() == str(result).split()


@pytest.mark.parametrize(
    ("text", "how", "message"),
    [
        (PROMPT, {"target": "no such token"}, "a target is one token"),
        (PROMPT, {"position": 40}, "position=40 is not in the prompt"),
        (PROMPT, {"threshold": 1.0}, "threshold=1.0"),
        (PROMPT, {"target": True}, "expected a token"),
        ("", {}, "prompt is empty"),
    ],
)
def test_what_cannot_be_explained_is_refused(example, text, how, message):
    with pytest.raises(InputError, match=message):
        vpd_lens.explain(example[0], text, **how)


def test_effects_of_a_difference_between_two_logits_are_refused(example):
    from vpd_lens.analysis.circuits import LogitDifference

    with pytest.raises(InputError, match="expected one token"):
        vpd_lens.explain(example[0], PROMPT, LogitDifference("self", ","))


def test_orders_positions_and_sites_that_do_not_exist_are_refused(explained):
    with pytest.raises(InputError, match="by='sise' is not one of effect, importance, size"):
        explained.needs(by="sise")
    with pytest.raises(InputError, match="k=-1"):
        explained.needs(k=-1)
    with pytest.raises(InputError, match="position=99"):
        explained.needs(99)
    with pytest.raises(InputError, match="no site named 'mlp'"):
        explained.needs(site="mlp")


# ------------------------------------------------------------------------ cards


def test_signs_make_activations_positive_where_they_fire(example):
    """Both directions are turned together, so what a subcomponent does is unchanged."""
    model, harvest = example
    name = "blocks.2.mlp.out"
    directions = Directions(model.vpd, harvest)
    flipped = directions.signs[model.vpd.layout.columns(name)] < 0
    assert 0 < flipped.sum() < len(flipped)
    for row in harvest.table(name):
        if row.density:
            assert bool(flipped[row.index]) == (row.firing_activation < 0)
    v, u = directions.v(name).T, directions.u(name)
    torch.testing.assert_close(v @ u, (model.vpd.v(name) @ model.vpd.u(name)).detach())


def test_promoted_logits_are_what_the_final_norm_makes_of_a_write_direction(example):
    """At the norm's mean scale, which is that of the model on the harvest's examples."""
    model, harvest = example
    directions = Directions(model.vpd, harvest)
    assert directions.final_scale == pytest.approx(2.05, rel=0.02)
    weight, name = model.ln_final.original_component.weight.detach(), "blocks.3.mlp.out"
    logits = directions.u(name)[60] * weight / directions.final_scale @ model.W_U.detach()
    card = vpd_lens.card(model, f"{name}:60", harvest)
    best = (logits - logits.mean()).topk(8)
    assert [t.token for t in card.promotes] == [model.to_string(i[None]) for i in best.indices]
    torch.testing.assert_close(torch.tensor([t.value for t in card.promotes]), best.values)
    assert card.suppresses[0].value == pytest.approx(float((logits - logits.mean()).min()))


def test_neighbours_are_the_largest_cosines_of_earlier_writing_and_later_reading(example):
    model, harvest = example
    directions, name = Directions(model.vpd, harvest), "blocks.1.mlp.in"
    read = directions.reads(name)[5]
    names = ["blocks.0.attn.o", "blocks.0.mlp.out", "blocks.1.attn.o"]
    cosines = {
        f"{site}:{c}": float(torch.cosine_similarity(write, read, dim=0))
        for site in names
        for c, write in enumerate(directions.writes(site))
    }
    expected = sorted(cosines, key=lambda other: -abs(cosines[other]))[:5]
    found = directions.upstream(name, 5, 5)
    assert [other.name for other in found] == expected
    assert all(other.cosine == pytest.approx(cosines[other.name], abs=1e-6) for other in found)
    # Seen from the other end.
    site, _, index = expected[0].rpartition(":")
    back = directions.downstream(site, int(index), model.vpd.layout.total)
    assert dict(back)[f"{name}:5"] == pytest.approx(cosines[expected[0]], abs=1e-6)
    alike = directions.alike("blocks.1.attn.q", 3, 4)
    assert "blocks.1.attn.q:3" not in dict(alike)
    assert len(alike) == 4
    assert directions.upstream("blocks.0.attn.q", 0, 3) == []  # nothing writes before it
    assert directions.downstream("blocks.1.mlp.in", 0, 3) == []  # it writes to neurons


def test_a_card_is_json_and_has_what_the_harvest_says(example):
    model, harvest = example
    card = vpd_lens.card(model, "blocks.1.attn.q:10", harvest)
    assert json.loads(json.dumps(card.to_dict()))["name"] == "blocks.1.attn.q:10"
    assert card.density == harvest.card("blocks.1.attn.q", 10)["density"]
    assert sum(card.heads) == pytest.approx(1)
    assert (card.neurons, card.promotes) == (None, [])
    assert "excited by" in str(card)
    assert "reads from" in card._repr_html_()
    alone = vpd_lens.card(model, "blocks.1.attn.q:10")
    assert (alone.density, alone.examples) == (None, [])
    assert alone.excited_by


def test_attributions_are_on_a_card():
    model = vpd_lens.decompose(tiny_bridge(), n_subcomponents=4)
    tokens = torch.randint(29, (4, 12), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="untrained"):
        found = vpd_lens.dataset_attributions(
            model, tokens, n_batches=1, batch_size=4, alive_threshold=0.0, progress=False
        )
    name = f"blocks.1.mlp.in:{int(found.alive['blocks.1.mlp.in'][0])}"
    card = vpd_lens.card(model, name, attributions=found)
    assert card.sources == found.sources(name, 8)
    assert card.targets == found.targets(name, 8)


def test_a_card_of_what_does_not_exist_is_refused(example):
    model, _ = example
    for name in ("blocks.1.attn.q", "blocks.9.attn.q:0", "blocks.1.attn.q:x"):
        with pytest.raises(InputError, match="there is no subcomponent"):
            vpd_lens.card(model, name)
    with pytest.raises(InputError, match="k=0"):
        vpd_lens.Cards(model, k=0)
    with pytest.raises(InputError, match="has 128 subcomponents, numbered from 0"):
        vpd_lens.card(model, "blocks.1.attn.q:128")


def test_a_harvest_of_another_decomposition_is_refused(example):
    other = vpd_lens.decompose(tiny_bridge(), n_subcomponents=4)
    with pytest.raises(ArtefactError):
        vpd_lens.Cards(other, example[1])
