"""Automatic labels, by a stand-in for a language model on this machine."""

import json
import re
import socket
import time

import pytest
import torch
from typer.testing import CliRunner

import vpd_lens
from tests.conftest import tiny_bridge
from tests.llm_server import LanguageModel
from vpd_lens.analysis.cards import Cards
from vpd_lens.analysis.interpretation.endpoint import Endpoint
from vpd_lens.analysis.interpretation.evidence import prompt
from vpd_lens.cli import app
from vpd_lens.errors import ArtefactError, EndpointError, InputError

pytest.importorskip("openai", reason="labels need the extra vpd-lens[label]")
KEY = "sk-very-secret"
NAMES = [f"blocks.1.mlp.out:{i}" for i in range(1, 6)]  # the first never fires


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A decomposition and its harvest on disk, of words instead of numbers."""
    folder = tmp_path_factory.mktemp("saved")
    model = vpd_lens.decompose(tiny_bridge(), n_subcomponents=6)
    tokens = torch.randint(29, (8, 12), generator=torch.Generator().manual_seed(0))
    harvest = vpd_lens.harvest(
        model,
        tokens,
        n_batches=2,
        batch_size=4,
        threshold=0.0,
        sites=[NAMES[0][:-2]],
        progress=False,
    )
    harvest.strings = [f" word{i}" for i in range(29)]
    model.vpd.save(folder / "decomposition")
    harvest.save(folder / "harvest")
    return folder


@pytest.fixture
def harvest(saved):
    return vpd_lens.Harvest.load(saved / "harvest")


@pytest.fixture
def serve(monkeypatch):
    """Start a server that answers as told; gives it, and an endpoint that asks it."""
    monkeypatch.setenv("SOME_KEY", KEY)
    servers = []

    def start(answer, **limits):
        servers.append(LanguageModel(answer))
        how = {"requests_per_minute": 1e6, "retries": 0, "timeout": 10.0} | limits
        where = {"base_url": servers[-1].address, "key_variable": "SOME_KEY"}
        return servers[-1], Endpoint(model="stand-in", **where, **how)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def named(body, number):
    """A label that says which subcomponent the prompt was about."""
    index = re.search(r"Subcomponent (\d+)", body["messages"][1]["content"])[1]
    return 200, json.dumps({"reasoning": "because", "label": f"number {index}"})


def test_every_label_is_of_the_subcomponent_that_was_asked_about(harvest, serve, tmp_path):
    server, endpoint = serve(named, concurrency=3)
    run = vpd_lens.label(harvest, endpoint, save=tmp_path / "labels.json", progress=False)
    assert sorted(run.done) == NAMES
    assert not run.failed
    for i, name in enumerate(NAMES, 1):
        found = harvest.labels[name]
        assert (found.text, found.note, found.source) == (f"number {i}", "because", "stand-in")
    assert server.keys == {f"Bearer {KEY}"}
    assert 1 <= server.most <= 3
    assert (run.spent.requests, run.spent.input_tokens, run.spent.output_tokens) == (5, 500, 50)
    assert dict(vpd_lens.Labels.load(tmp_path / "labels.json")) == dict(harvest.labels)
    assert KEY not in (tmp_path / "labels.json").read_text() + repr(endpoint) + str(run)
    schema = server.asked[0]["response_format"]["json_schema"]
    assert schema["strict"]
    assert set(schema["schema"]["required"]) == {"label", "reasoning"}


def test_the_prompt_has_the_evidence(harvest):
    text = prompt(harvest, NAMES[2], n_examples=12).user
    card = harvest.card("blocks.1.mlp.out", 3)
    assert "Subcomponent 3 of the output matrix of the MLP in block 2 of 2" in text
    assert f"{card['density']:.2%} of the tokens" in text
    assert text.count("<example>") == 12
    top = card["examples"][0]
    at, g, a = top["focus"], top["importance"], top["activation"]
    assert f"[[{top['tokens'][at]} (ci {g[at]:.2f}, act {a[at]:+.1f})]]" in text
    assert repr(card["output_tokens"][0]["token"]) in text
    assert "at most 8 words" in prompt(harvest, NAMES[2]).system


def test_with_cards_it_has_the_weights_too(saved):
    model = vpd_lens.load(saved / "decomposition", tiny_bridge())
    harvest = vpd_lens.Harvest.load(saved / "harvest", model.vpd)
    cards = Cards(model, harvest)
    text = prompt(harvest, NAMES[2], cards).user
    token, value = cards[NAMES[2]].promotes[0]
    assert f"By its weights, promotes: {token!r} {value:+.2f}" in text
    other = Cards(vpd_lens.decompose(tiny_bridge(), n_subcomponents=6, seed=1))
    with pytest.raises(ArtefactError, match="cards are of the decomposition"):
        vpd_lens.label(harvest, "m", cards=other, dry_run=True)


def test_it_goes_on_where_it_was_and_leaves_labels_by_hand(harvest, saved, serve, tmp_path):
    file = tmp_path / "labels.json"
    server, endpoint = serve(named)
    harvest.labels[NAMES[3]] = "by hand"
    vpd_lens.label(harvest, endpoint, n=2, save=file, progress=False)
    assert len(server.asked) == 2
    later = vpd_lens.Harvest.load(saved / "harvest")  # another process
    run = vpd_lens.label(later, endpoint, save=file, progress=False)
    assert len(run.done) == 2
    assert len(server.asked) == 4
    assert later.labels[NAMES[3]].source == "hand"
    assert len(vpd_lens.label(later, endpoint, again=True, progress=False).done) == 4
    assert later.labels.text(NAMES[3]) == "by hand"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no idea", "not as asked"),
        ('{"reasoning": "r", "label": "1 2 3 4 5 6 7 8 9"}', "of 9 words"),
        ('{"reasoning": "r", "label": " "}', "of 0 words"),
        ('{"label": "x"}', "field required"),
        (b"<html>busy</html>", "none of the OpenAI interface"),
        (b'{"choices": []}', "none of the OpenAI interface"),
    ],
)  # fmt: skip
def test_nonsense_is_left_out_with_a_reason(harvest, serve, text, reason):
    _, endpoint = serve(lambda body, n: named(body, n) if n else (200, text), concurrency=1)
    run = vpd_lens.label(harvest, endpoint, progress=False)
    assert len(run.done) == 4
    (found,) = run.failed.values()
    assert reason in found
    assert next(iter(run.failed)) not in harvest.labels


def test_words_around_the_answer_do_no_harm(harvest, serve):
    _, endpoint = serve(lambda *call: (200, f"Sure!\n```json\n{named(*call)[1]}\n```"))
    assert len(vpd_lens.label(harvest, endpoint, progress=False).done) == 5


def test_what_fails_for_a_moment_is_asked_again(harvest, serve):
    server, endpoint = serve(
        lambda body, n: named(body, n) if n else (429, "slow down"), retries=2, concurrency=1
    )
    assert len(vpd_lens.label(harvest, endpoint, progress=False).done) == 5
    assert len(server.asked) == 6


def test_many_failures_in_a_row_end_it_and_keep_what_there_is(harvest, serve, tmp_path):
    file = tmp_path / "labels.json"
    server, endpoint = serve(
        lambda body, n: named(body, n) if n < 2 else (500, "out of order"),
        give_up_after=3,
        concurrency=1,
    )
    with pytest.raises(EndpointError, match=r"3 requests in a row failed.*out of order"):
        vpd_lens.label(harvest, endpoint, save=file, progress=False)
    assert len(server.asked) == 5
    assert len(vpd_lens.Labels.load(file)) == 2


def test_a_refusal_ends_it_at_once_and_does_not_show_the_key(harvest, serve):
    server, endpoint = serve(lambda *_: (401, f"bad key {KEY}"), concurrency=1)
    with pytest.raises(EndpointError, match=r"the endpoint refuses.*bad key \*\*\*") as error:
        vpd_lens.label(harvest, endpoint, progress=False)
    assert len(server.asked) == 1
    assert KEY not in str(error.value)


def test_a_silent_or_absent_endpoint_is_an_error(harvest, serve):
    def silent(*_):
        time.sleep(1)
        return 200, "{}"

    _, endpoint = serve(silent, timeout=0.1, give_up_after=1)
    with pytest.raises(EndpointError, match="timed out"):
        vpd_lens.label(harvest, endpoint, progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    absent = endpoint.model_copy(update={"base_url": nobody, "timeout": 5.0})
    with pytest.raises(EndpointError, match=f"Connection error.*{nobody}"):
        vpd_lens.label(harvest, absent, progress=False)


def test_no_request_could_go_over_the_budget(harvest, serve):
    """However long the answers: of tokens and cost, what may still come is set aside."""
    server, endpoint = serve(named, prices=(1.0, 2.0))
    plan = vpd_lens.label(harvest, endpoint, dry_run=True)
    assert (plan.estimate.requests, len(server.asked)) == (5, 0)
    assert plan.estimate.output_tokens == 5 * endpoint.max_answer_tokens
    each = plan.estimate.cost / 5
    for limit, value in (("max_requests", 2), ("max_cost", 1.5 * each), ("max_tokens", 1)):
        harvest.labels.clear()
        run = vpd_lens.label(harvest, endpoint.model_copy(update={limit: value}), progress=False)
        assert len(run.done) == (2 if limit == "max_requests" else 0 if value == 1 else 5)
        assert not run.failed
    # Answers were short, so what one had set aside was enough for the next.
    assert run.spent.cost == 0


def test_requests_do_not_start_faster_than_allowed(harvest, serve):
    starts = []
    server, endpoint = serve(lambda *call: (starts.append(time.monotonic()), named(*call))[1])
    slow = endpoint.model_copy(update={"requests_per_minute": 600.0})
    vpd_lens.label(harvest, slow, progress=False)
    assert starts[-1] - starts[0] >= 0.35  # four pauses of 0.1 s, less what a request may lag
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "model is ''"),
        ({"timeout": 0}, "timeout is 0"),
        ({"max_cost": 1.0}, "max_cost needs prices"),
    ],
)
def test_impossible_limits_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Endpoint(**{"model": "m"} | change)


def test_bad_input_is_refused(harvest, serve, monkeypatch):
    _, endpoint = serve(named)
    with pytest.raises(InputError, match=r"'blocks.0.attn.q:1' has no examples"):
        vpd_lens.label(harvest, endpoint, ["blocks.0.attn.q:1"])
    with pytest.raises(InputError, match="n_examples=0"):
        vpd_lens.label(harvest, endpoint, n_examples=0)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(InputError, match="SOME_KEY is not set"):
        vpd_lens.label(harvest, endpoint, progress=False)
    harvest.strings = [f"<{i}>" for i in range(29)]
    with pytest.raises(InputError, match="no text"):
        vpd_lens.label(harvest, endpoint)
    harvest.usage.firings.zero_()
    with pytest.raises(InputError, match="nothing fired"):
        vpd_lens.label(harvest, endpoint)


def test_the_command_writes_beside_the_decomposition(saved, serve):
    server, endpoint = serve(named)
    folder, key = saved / "decomposition", ["--key-variable", "SOME_KEY", "-n", "2"]
    where = ["--llm", "m", "--base-url", endpoint.base_url, "--harvest", str(saved / "harvest")]
    call = ["label", str(folder), *where, *key]
    dry = CliRunner().invoke(app, [*call, "--dry-run"])
    assert "2 requests" in dry.output
    assert not server.asked
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert len(vpd_lens.load(folder, tiny_bridge()).vpd.labels) == 2
    (folder / "labels.json").unlink()
