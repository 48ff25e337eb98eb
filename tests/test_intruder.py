"""Intruder detection: judges of passages, whatever fires in them."""

import itertools
import json

import numpy as np
import pytest
from scipy.stats import binom

import vpd_lens
from tests.llm_server import LanguageModel
from vpd_lens.analysis.interpretation import (
    EmbeddingJudge,
    Endpoint,
    EndpointJudge,
    Passage,
    Responses,
    Score,
    TokenJudge,
    of_groups,
    of_harvest,
    static_embeddings,
)
from vpd_lens.errors import InputError
from vpd_lens.example import example_harvest

WORDS = [f" {a}{b}" for a in ("ba", "de", "ki", "lo", "mu", "ra", "su", "te") for b in "lmnrst"]


def passages(rng, n, word=None):
    """Random text; the focus is at `word`, or anywhere."""
    found = []
    for _ in range(n):
        tokens = [WORDS[i] for i in rng.integers(len(WORDS), size=11)]
        if word is not None:
            tokens[5] = word
        found.append(Passage(tuple(tokens), (5,), 5))
    return tuple(found)


def detectors(rng, n=40):
    """Things that fire at one word each."""
    return {f"blocks.0.mlp.in:{i}": Responses(0.01, passages(rng, 20, WORDS[i])) for i in range(n)}


def nothing(rng, n=40):
    """Things that fire anywhere."""
    return {f"blocks.0.mlp.out:{i}": Responses(0.01, passages(rng, 20)) for i in range(n)}


def hashed(texts):
    """An embedding of characters, without any meaning."""
    vectors = np.zeros((len(texts), 512))
    for row, text in enumerate(texts):
        for pair in itertools.pairwise(text):
            vectors[row, (ord(pair[0]) * 31 + ord(pair[1])) % 512] += 1
    return vectors


@pytest.mark.parametrize("judge", [TokenJudge(), EmbeddingJudge(hashed)], ids=lambda j: j.name)
def test_detectors_of_tokens_are_found_out_and_random_assignments_by_chance(judge):
    rng = np.random.default_rng(0)
    planted = vpd_lens.intruder(detectors(rng), judge).overall
    assert planted.asked == 200
    assert planted.accuracy > 0.95
    assert planted.p_value < 1e-50
    # 40 things that fire anywhere, 10 questions of each: chance is in these limits in 99.9 %.
    by_chance = vpd_lens.intruder(nothing(rng), judge, n_questions=10).overall
    low, high = binom.interval(0.999, by_chance.asked, 0.2)
    assert low <= by_chance.right <= high


@pytest.mark.parametrize("judge", [TokenJudge(), EmbeddingJudge(hashed)], ids=lambda j: j.name)
def test_a_judge_who_sees_no_difference_chooses_by_chance(judge):
    """Not always the first, which would be right whenever the intruder is."""
    same = tuple(Passage((" a", " b"), (0,), 0) for _ in range(5))
    chosen = judge.choose([same] * 500)
    assert min(np.bincount(chosen, minlength=5)) > 60


def test_shuffled_assignments_of_the_example_give_chance():
    """Passages of the example's harvest, dealt out anew, belong to nothing."""
    rng = np.random.default_rng(0)
    pool = [p for found in of_harvest(example_harvest()).values() for p in found.passages]
    order = rng.permutation(len(pool))
    dealt = {
        f"x:{i}": Responses(0.1, tuple(pool[j] for j in order[8 * i : 8 * i + 8]))
        for i in range(100)
    }
    found = vpd_lens.intruder(dealt, TokenJudge(), n_questions=5).overall
    low, high = binom.interval(0.999, found.asked, 0.2)
    assert low <= found.right <= high


def test_a_question_is_four_of_its_own_and_one_of_similar_density():
    rng = np.random.default_rng(0)
    responses = {
        f"s:{i}": Responses(density, passages(rng, 8, WORDS[i]))
        for i, density in enumerate([0.01] * 8 + [0.5] * 8)
    }
    seen = []

    class Spy:
        name = "spy"

        def choose(self, questions):
            seen.extend(questions)
            return [0] * len(questions)

    report = vpd_lens.intruder(responses, Spy(), n_questions=30)
    places = []
    for name, question in zip([n for n in responses for _ in range(30)], seen, strict=True):
        own = responses[name].passages
        strange = [i for i, passage in enumerate(question) if passage not in own]
        assert len({id(p) for p in question}) == 5
        (place,) = strange
        places.append(place)
        word = question[place].tokens[5]
        other = responses[f"s:{WORDS.index(word)}"]
        assert other.density == responses[name].density
    assert report.overall.right == places.count(0)
    assert min(np.bincount(places, minlength=5)) > 60


def test_intervals_are_wilson_and_p_values_binomial():
    score = Score(30, 100)
    z = 1.959963984540054
    centre = (0.3 + z * z / 200) / (1 + z * z / 100)
    half = z / (1 + z * z / 100) * np.sqrt(0.3 * 0.7 / 100 + z * z / 40000)
    assert score.interval == pytest.approx((centre - half, centre + half))
    assert score.p_value == pytest.approx(binom.sf(29, 100, 0.2))
    assert np.isnan(Score(0, 0).accuracy)
    assert Score(0, 0).interval == (0, 1)


def test_scores_add_up_by_kind_of_site_and_are_shown():
    rng = np.random.default_rng(0)
    report = vpd_lens.intruder(detectors(rng, 20) | nothing(rng, 20), TokenJudge())
    by = report.by()
    assert set(by) == {"mlp.in", "mlp.out"}
    assert by["mlp.in"].accuracy > 0.9 > 0.5 > by["mlp.out"].accuracy
    assert sum(score.right for score in by.values()) == report.overall.right
    assert report.by(lambda _: "all")["all"] == report.overall
    assert "Intruders found by tokens; by chance 20%" in str(report)
    assert "mlp.out" in report._repr_html_()


def test_a_group_fires_where_any_member_does():
    rng = np.random.default_rng(0)
    members = detectors(rng, 4)
    names = list(members)
    groups = {"cluster:0": names[:2], "cluster:1": names[2:], "cluster:2": ["dead"]}
    found = of_groups(members, groups)
    assert set(found) == {"cluster:0", "cluster:1"}
    assert found["cluster:0"].density == pytest.approx(1 - 0.99**2)
    assert len(found["cluster:0"].passages) == 20
    words = {passage.tokens[5] for passage in found["cluster:0"].passages}
    assert words == {WORDS[0], WORDS[1]}
    assert (
        of_groups(members, groups, {"cluster:0": 0.3, "cluster:1": 0.1})["cluster:0"].density == 0.3
    )
    with pytest.raises(InputError, match="no member"):
        of_groups(members, {"cluster:2": ["dead"]})


def test_the_static_embeddings_come_with_their_package():
    pytest.importorskip("wordllama", reason="needs the extra vpd-lens[judge]")
    near, far = (
        static_embeddings()(["the king of France", "a queen of Spain", "for i in range(10)"])[
            [1, 2]
        ]
        @ static_embeddings()(["the king of France"])[0]
    )
    assert near > far + 0.2


def test_a_language_model_judges_and_may_fail(monkeypatch):
    """It is shown numbered passages with marks; an answer that is none of them counts nowhere."""
    pytest.importorskip("openai", reason="needs the extra vpd-lens[label]")
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def answer(body, number):
        if number == 0:
            return 200, json.dumps({"reasoning": "?", "intruder": 9})
        shown = body["messages"][1]["content"].split("</passage")[:5]
        marked = [text.split("[[")[1].split("]]")[0] for text in shown]
        odd = [i for i, word in enumerate(marked) if marked.count(word) == 1]
        return 200, json.dumps({"reasoning": "marks", "intruder": odd[0] + 1})

    server = LanguageModel(answer)
    how = {"requests_per_minute": 1e6, "retries": 0, "concurrency": 1}
    judge = EndpointJudge(Endpoint(model="m", base_url=server.address, **how), progress=False)
    report = vpd_lens.intruder(detectors(np.random.default_rng(0), 6), judge, n_questions=3)
    server.shutdown()
    server.server_close()
    assert report.unanswered == 1
    assert report.overall == Score(17, 17)
    assert judge.failed == ["there is no example 9."]
    assert judge.spent.requests == 18
    assert "1 questions have no answer" in str(report)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: vpd_lens.intruder(r, TokenJudge(), ["blocks.0.mlp.in:99"]), "fewer than 4"),
        (lambda r: vpd_lens.intruder(r, TokenJudge(), n_questions=0), "n_questions=0"),
        (lambda r: vpd_lens.intruder({}, TokenJudge()), "0 of 0 things"),
        (lambda r: vpd_lens.intruder(dict([*r.items()][:1]), TokenJudge()), "1 of 1 things"),
        (lambda r: Passage((" a",), (0,), 1), "focus=1"),
        (lambda r: TokenJudge(context=-1), "context=-1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(detectors(np.random.default_rng(0), 3))
