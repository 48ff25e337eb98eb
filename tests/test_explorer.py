"""The explorer: what it answers, to whom, and its pages in a browser."""

import json
import re
import socket
import threading
import time

import pytest
import torch
from playwright.sync_api import expect
from starlette.testclient import TestClient
from typer.testing import CliRunner

import vpd_lens
from vpd_lens.analysis.cards import Cards
from vpd_lens.analysis.circuits import Token
from vpd_lens.cli import app as command_line
from vpd_lens.errors import ArtefactError, BusyError, ConfigError, InputError
from vpd_lens.example import example_harvest, load_example
from vpd_lens.explorer import server
from vpd_lens.explorer.app import build_app
from vpd_lens.explorer.orders import HarvestOrder
from vpd_lens.explorer.workbench import Workbench
from vpd_lens.viz.explain_page import payload
from vpd_lens.viz.graph_page import rounded

pytestmark = pytest.mark.slow

TEXT, TARGET, HOST = "for i in", " b", "http://127.0.0.1:8000"
QUESTION = {"text": TEXT, "target": TARGET}
NAME, TOKEN = "blocks.3.mlp.out:60", "a-secret"
SOON = 60.0  # seconds, on a busy machine
expect.set_options(timeout=SOON * 1000)


@pytest.fixture(scope="module")
def explored():
    model = load_example()
    return model, example_harvest(model.vpd)


@pytest.fixture(scope="module")
def bench(explored, tmp_path_factory):
    model, harvest = explored
    folder = tmp_path_factory.mktemp("explorer") / "saved"
    bench = Workbench(model, harvest, folder, title="<b>&", texts=[TEXT], patience=0.1)
    yield bench
    bench.close()


@pytest.fixture
def client(bench):
    app = build_app(bench, TOKEN, ["127.0.0.1", "localhost"])
    cookie = {"cookie": f"vpd-explorer-8000={TOKEN}"}
    return TestClient(app, HOST, headers=cookie, raise_server_exceptions=False)


def data_of(page, name):
    """What a page was given as JSON."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def finished(client, job):
    deadline = time.monotonic() + SOON
    while job["state"] in ("waiting", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        job = client.get(f"/api/jobs/{job['key']}").json()
    return job


# ------------------------------------------------------------------- who may ask


@pytest.fixture
def stranger(client):
    return TestClient(client.app, HOST)


def test_nothing_is_answered_without_the_token(stranger):
    for path in ("/", f"/?text={TEXT}", "/graph/1", "/harvest/index.html", "/?token=", "/?token=x"):
        answer = stranger.get(path)
        assert answer.status_code == 401
        assert "vpd-lens explore" in answer.text
        assert "set-cookie" not in answer.headers
    for how, path in (("GET", "/api/jobs"), ("POST", "/api/edits"), ("DELETE", "/api/jobs/1")):
        answer = stranger.request(how, path, headers={"cookie": f"vpd-explorer-8001={TOKEN}"})
        assert answer.status_code == 401
        assert "token" in answer.json()["error"]
    strange = {"cookie": b"vpd-explorer-8000=\xe9"}
    assert stranger.get("/api/jobs", headers=strange).status_code == 401


def test_the_token_becomes_a_cookie_that_no_script_and_no_other_site_gets(stranger):
    answer = stranger.get("/", params={"token": TOKEN})
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"vpd-explorer-8000={TOKEN};")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert stranger.get("/api/jobs").json() == []


def test_other_names_and_other_sites_are_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    order = {"json": {**QUESTION, "edits": []}}
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8001"},  # whatever else runs here
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    ):
        assert client.post("/api/edits", headers=headers, **order).status_code == 403
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=followed).status_code == 200
    assert client.get("/", headers={"sec-fetch-site": "same-site"}).status_code == 403
    assert client.post("/api/edits", headers={"origin": HOST}, **order).status_code == 200


def test_browsers_are_told_to_run_and_to_load_nothing_else(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert page.text.count(f'nonce="{nonce}"') == len(
        re.findall("<(?:script|style)>? n", page.text)
    )
    assert nonce not in client.get("/").text
    for answer in (page, client.get("/api/jobs"), client.get("/api/cards/x")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_what_changes_something_takes_json_and_no_get(client):
    changing = ("/api/graphs", "/api/edits", "/api/graphs/1/save")
    assert {client.get(path).status_code for path in changing} == {405}
    assert client.get(f"/api/labels/{NAME}").status_code == 405
    form = client.post("/api/edits", data={"text": TEXT})
    assert (form.status_code, form.json()) == (
        415,
        {"error": "the request must be of type application/json."},
    )
    long = {**QUESTION, "edits": [], "text": "x" * (5 << 20)}
    assert client.post("/api/edits", json=long).status_code == 413


# ------------------------------------------------------------------------- texts


def test_a_text_is_what_explain_finds(client, explored):
    model, harvest = explored
    page = client.get("/", params={**QUESTION, "position": ""})
    assert page.status_code == 200
    found = data_of(page.text, "explain-data")
    direct = payload(vpd_lens.explain(model, TEXT, TARGET, harvest=harvest), 30)
    assert found == json.loads(json.dumps(direct))
    assert len(found["cards"]) == 30
    assert "&lt;b&gt;&amp;" in page.text
    assert "<b>&" not in page.text


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"text": ""}, "prompt is empty"),
        ({"text": "x = 1\n" * 100}, "more than the model&#39;s context of 128"),
        ({"text": TEXT, "target": "no one token"}, "a target is one token"),
        ({"text": TEXT, "position": "99"}, "position=99 is not in the prompt"),
        ({"text": TEXT, "position": "two"}, "position: Input should be a valid integer"),
    ],
)
def test_a_question_without_an_answer_leads_to_a_page_that_says_why(client, question, words):
    page = client.get("/", params=question)
    assert page.status_code == 400
    assert words in page.text
    assert f">\n{question['text']}</textarea>" in page.text


def test_a_form_sends_newlines_as_two_characters(client, explored):
    page = client.get("/", params={"text": "a\r\n  b"})
    assert "".join(data_of(page.text, "explain-data")["tokens"]) == "a\n  b"
    assert data_of(page.text, "explorer-data")["question"]["text"] == "a\n  b"


def test_cards_follow_on_demand(client, explored):
    known = rounded(Cards(*explored).for_page(NAME), 3)
    assert client.get(f"/api/cards/{NAME}").json() == json.loads(json.dumps(known))
    for name in ("blocks.3.mlp.out:99999", "nothing", "blocks.9.mlp.out:1"):
        answer = client.get(f"/api/cards/{name}")
        assert answer.status_code == 400
        assert name in answer.json()["error"]


def test_the_harvest_is_there(client, bench):
    index = client.get("/harvest/index.html").text
    assert all(site in index for site in bench.vpd.layout.names)
    site = client.get("/harvest/blocks.3.mlp.out.html")
    assert data_of(site.text, "data")["site"] == "blocks.3.mlp.out"
    assert client.get("/harvest/..%2Fsecret").status_code in (400, 404)


# ------------------------------------------------------------------------- edits


def test_edits_do_what_intervene_and_edited_do(client, explored):
    model, _ = explored
    edits = [
        {"name": NAME, "position": 1, "factor": 0},
        {"name": "blocks.0.mlp.gate:101", "position": None, "factor": -2.5},
    ]
    order = {**QUESTION, "edits": edits, "n_written": 5}
    found = client.post("/api/edits", json=order).json()
    direct = [
        vpd_lens.Ablate(f"{NAME}@1"),
        vpd_lens.Scale("blocks.0.mlp.gate:101", -2.5),
    ]
    result = vpd_lens.intervene(model, TEXT, direct, target=TARGET)
    p = result.probabilities(TARGET)
    assert found["rows"][0] == [
        TARGET,
        *(pytest.approx(p[n], rel=1e-3) for n in ("base", "edited")),
    ]
    assert found["kl"] == pytest.approx(float(result.kl[-1]), rel=1e-3)
    likeliest = result.top(3)
    assert {text for text, *_ in likeliest} <= {text for text, *_ in found["rows"]}
    tokens = model.to_tokens(TEXT)
    how = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "return_type": "tokens"}
    with vpd_lens.edited(model, direct):
        after = model.generate(tokens, **how)[0, tokens.shape[1] :]
    before = model.generate(tokens, **how)[0, tokens.shape[1] :]
    written = {"before": model.to_string(before), "after": model.to_string(after)}
    assert found["written"] == written


def test_writing_stops_at_the_context(client, explored):
    model, _ = explored
    full = model.to_string(model.to_tokens("x = 1\n" * 60)[0, : model.cfg.n_ctx])
    n = model.to_tokens(full).shape[1]
    order = {"text": full, "edits": [], "n_written": 200}
    written = client.post("/api/edits", json=order).json()["written"]
    assert model.to_tokens(written["before"], prepend_bos=False).numel() <= model.cfg.n_ctx - n


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"name": "blocks.0.mlp.gate"}, "is no subcomponent"),
        ({"name": "blocks.9.mlp.in:1"}, "no site 'blocks.9.mlp.in'"),
        ({"name": NAME, "position": 50}, "position 50 is not in the prompt"),
        ({"name": NAME, "factor": 1e9}, "edits.0.factor: Input should be less than"),
        ({"name": NAME, "hook": "hook_q"}, "edits.0.hook: Extra inputs are not permitted"),
    ],
)
def test_edits_that_cannot_be_made_are_refused(client, edit, words):
    answer = client.post("/api/edits", json={**QUESTION, "edits": [edit]})
    assert answer.status_code == 400
    assert words in answer.json()["error"]


# ------------------------------------------------------------------ jobs and lock


@pytest.fixture(scope="module")
def traced(bench):
    """A graph, and the key under which the explorer has it."""
    client = TestClient(build_app(bench, TOKEN, ["*"]), HOST, headers={"origin": HOST})
    client.get("/", params={"token": TOKEN})
    started = client.post("/api/graphs", json={**QUESTION, "keep": 0.5, "frozen": True})
    assert started.status_code == 202
    job = finished(client, started.json())
    assert job["state"] == "done", job
    assert (job["phase"], job["done"]) == ("Attributing", job["total"])
    return job["result"]


def test_a_graph_is_that_of_attribute(client, explored, traced):
    graph = vpd_lens.attribute(
        explored[0], TEXT, Token(TARGET), frozen=True, progress=False
    ).pruned(0.5)
    assert (traced["nodes"], traced["edges"]) == (graph.n_nodes, graph.n_edges)
    page = client.get(f"/graph/{traced['graph']}")
    data = data_of(page.text, "graph-data")
    assert data["nodes"]["name"] == graph.nodes.names()
    assert data["heads"]  # of edges from v to o
    assert data_of(page.text, "explorer-data")["question"] == {**QUESTION, "position": -1}
    assert client.get("/graph/none").status_code == 400
    assert client.get("/api/jobs/none").status_code == 400


def test_a_graph_that_cannot_be_made_is_refused_at_once(client):
    for order, words in (
        ({"text": ""}, "prompt is empty"),
        ({**QUESTION, "target": "no one token"}, "a target is one token"),
        ({**QUESTION, "position": 9}, "position=9"),
        ({**QUESTION, "prune": "wild"}, "prune: Input should be"),
        ({**QUESTION, "keep": 0}, "keep: Input should be greater than 0"),
        ({}, "text: Field required"),
    ):
        answer = client.post("/api/graphs", json=order)
        assert answer.status_code == 400
        assert words in answer.json()["error"]
    assert client.post("/api/graphs", content="{", headers=JSON).status_code == 400


JSON = {"content-type": "application/json"}


def test_pruning_can_be_ended_and_leaves_the_model_as_it_was(client, explored):
    model, _ = explored
    tokens = model.to_tokens(TEXT)
    before = model(tokens)
    job = client.post("/api/graphs", json={"text": TEXT, "prune": "adversarial"}).json()
    deadline = time.monotonic() + SOON
    while not (state := client.get(f"/api/jobs/{job['key']}").json())["done"]:
        assert time.monotonic() < deadline
        assert state["state"] in ("waiting", "running")
        time.sleep(0.01)
    assert state["phase"] == "Pruning"
    assert client.delete(f"/api/jobs/{job['key']}").status_code == 200
    ended = finished(client, job)
    assert ended["state"] == "cancelled"
    assert ended["done"] < ended["total"]
    assert torch.equal(model(tokens), before)
    assert all(part.requires_grad for part in model.vpd.subcomponents.parameters())


def test_while_the_model_is_busy_requests_say_so_and_cards_are_given(client, bench):
    holds, let_go = threading.Event(), threading.Event()

    def hold():
        with bench.the_model():
            holds.set()
            let_go.wait(SOON)

    client.get("/", params=QUESTION)
    thread = threading.Thread(target=hold)
    thread.start()
    assert holds.wait(SOON)
    page = client.get("/", params={"text": "nobody asked this"})
    assert (page.status_code, page.headers["retry-after"]) == (503, "2")
    assert "the model is busy with another request" in page.text
    edits = client.post("/api/edits", json={**QUESTION, "edits": []})
    assert edits.status_code == 503
    assert "busy" in edits.json()["error"]
    assert client.get(f"/api/cards/{NAME}").status_code == 200
    assert client.get("/", params=QUESTION).status_code == 200  # known already
    let_go.set()
    thread.join()
    with pytest.raises(BusyError), bench.the_model(), bench.the_model(0):
        pass


def test_a_harvest_is_gathered_gone_on_with_and_there_the_next_time(explored, tmp_path):
    model, _ = explored
    tokens = model.to_tokens("for i in range(9):\n    print(i)\n" * 9, prepend_bos=False)
    data = tokens[0, :96].view(12, 8)
    bench = Workbench(model, None, tmp_path / "new", data=data)
    client = TestClient(build_app(bench, TOKEN, ["*"]), HOST)
    client.get("/", params={"token": TOKEN, **QUESTION})
    for n_batches, n_tokens in ((1, 96), (9, 96)):
        job = client.post("/api/harvest", json={"n_batches": n_batches}).json()
        assert finished(client, job)["result"] == {"harvest": n_tokens}
    site, index = "blocks.3.mlp.out", bench.harvest.table("blocks.3.mlp.out")[0].index
    known = client.get(f"/api/cards/{site}:{index}").json()
    assert known["density"] > 0
    bench.close()
    again = Workbench(model, None, tmp_path / "new")
    assert again.card(f"{site}:{index}") == known
    with pytest.raises(InputError, match="no data to gather from"):
        again.gather(HarvestOrder())
    again.close()


# ------------------------------------------------------------------------ saving


def test_labels_graphs_and_groups_are_there_the_next_time(client, bench, explored, traced):
    model, _ = explored
    key = traced["graph"]
    answer = client.put(f"/api/labels/{NAME}", json={"text": " starts  a name "})
    assert answer.json()["text"] == "starts a name"
    assert data_of(client.get("/", params=QUESTION).text, "explain-data")["labels"] == {
        NAME: "starts a name"
    }
    assert client.put("/api/labels/nothing:1", json={"text": "x"}).status_code == 400
    names = bench.graphs[key].graph.nodes.names()
    groups = [{"name": "<first>", "members": names[:2]}]
    for saved in ({"name": "../up"}, {"name": "7"}, {"name": ""}):
        assert client.post(f"/api/graphs/{key}/save", json=saved).status_code == 400
    assert client.post(f"/api/graphs/{key}/save", json={"name": "range"}).status_code == 200
    assert client.put(f"/api/graphs/{key}/groups", json={"groups": groups}).status_code == 200
    other = Workbench(model, None, bench.graphs.folder)
    again = TestClient(build_app(other, TOKEN, ["*"]), HOST)
    assert "/graph/range" in again.get("/", params={"token": TOKEN}).text
    data = data_of(again.get("/graph/range").text, "graph-data")
    assert data["nodes"]["name"] == names
    assert data["groups"] == groups
    assert data["labels"] == {NAME: "starts a name"}
    card = again.get(f"/api/cards/{NAME}").json()  # without a harvest
    assert card["weights"]
    assert "density" not in card
    assert again.get("/harvest/index.html").status_code == 400
    assert client.put(f"/api/labels/{NAME}", json={"text": ""}).json()["text"] == ""
    other.close()


def test_labels_of_another_decomposition_are_refused(bench, explored, tmp_path):
    record = {"kind": "labels", "format_version": 1, "fingerprint": "other"}
    (tmp_path / "labels.json").write_text(json.dumps(record))
    with pytest.raises(ArtefactError, match="another decomposition"):
        Workbench(explored[0], None, tmp_path)


# ---------------------------------------------------------------------- listening


def test_the_command_prints_an_address_with_a_token_of_its_own(explored, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vpd_lens.example.load_example", lambda device: explored[0])
    served, addresses = [], []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: served.append(self.config.app))
    for _ in range(2):
        result = CliRunner().invoke(command_line, ["explore", "--device", "cpu"])
        assert result.exit_code == 0, (result.output, result.exception)
        found = re.search(r"(http://127\.0\.0\.1:\d+)/\?token=([\w-]{32})\n", result.output)
        addresses.append(found.groups())
    (base, token), (_, other) = addresses
    client = TestClient(served[0], base)
    assert client.get("/", params={"token": other}).status_code == 401
    assert client.get("/", params={"token": token}).status_code == 200
    assert not list(tmp_path.iterdir())  # nothing was saved


def test_a_port_in_use_and_a_missing_folder_are_said(explored):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*--port"):
            server.explore(explored[0], port=port)
    result = CliRunner().invoke(command_line, ["explore", "nowhere"])
    assert result.exit_code == 2
    assert "nowhere: there is no such directory" in result.stderr


# -------------------------------------------------------------------- in a browser


@pytest.fixture
def address(bench):
    """Of a server in another thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        running = server.server_of(build_app(bench, TOKEN, ["127.0.0.1"]))
        running.config.lifespan = "off"  # or the end of one server would be that of the bench
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        running.should_exit = True
        thread.join(SOON)


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1300, "height": 900}, reduced_motion="reduce")
    page, problems, requests = context.new_page(), [], []
    page.set_default_timeout(SOON * 1000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"{address}?token={TOKEN}")
    yield page
    context.close()
    assert not problems
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)


def test_from_a_prompt_to_a_saved_graph(page, bench, address):
    """By the keyboard where there is one way."""
    bench.patience = SOON
    assert page.url == address  # the token is not left in it
    assert page.evaluate("document.activeElement.name") == "text"
    page.keyboard.type("for i")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Backspace")
    page.keyboard.type(" in")
    page.keyboard.press("Tab")
    page.keyboard.type(TARGET)
    page.keyboard.press("Enter")
    expect(page.locator("#map tbody tr")).to_have_count(bench._tokens(TEXT).numel())

    needs = page.locator("#panel .need")
    expect(needs.first).to_be_visible()
    name = page.locator("#panel .need .who").nth(40).inner_text()  # whose card is not there yet
    needs.nth(40).focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#panel h2")).to_have_text(name)
    expect(page.locator("#panel .weights").first).to_be_visible()

    page.get_by_label(f"Label of {name}").fill("of a loop")
    page.keyboard.press("Enter")
    expect(page.locator(".label-editor small")).to_have_text("saved")
    assert bench.labels.text(name) == "of a loop"

    page.get_by_role("button", name="Ablate everywhere").click()
    rows = page.locator(".predictions li")
    expect(rows.first.locator("b")).to_have_text("·b")
    expect(page.locator("#edit-list li")).to_have_count(1)
    first = rows.first.inner_text()
    page.get_by_label(f"Factor of {name} everywhere").fill("-40")
    page.keyboard.press("Enter")
    expect(rows.first).not_to_have_text(first)

    page.locator("#panel h2").click()
    page.locator("#panel .label-editor input").press("Escape")  # leaves the card
    expect(page.locator("#panel .need .label").first).to_have_text("of a loop")

    page.get_by_role("button", name="Graph…").click()
    page.keyboard.press("Escape")
    expect(page.locator("#trace")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "open-trace"
    page.keyboard.press("Enter")
    page.locator("#trace select[name=keep]").select_option("0.5")
    page.get_by_role("button", name="Trace", exact=True).click()
    page.locator("#jobs a").click()  # jobs of others are not shown
    expect(page.locator("#edit-list li")).to_have_count(1)  # edits come along
    node = page.locator("#nodes .node.subcomponent").last
    node.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#panel .weights").first).to_be_visible()
    page.locator("#nodes .node.subcomponent").nth(-2).click(modifiers=["Shift"])
    page.keyboard.press("g")
    page.locator("textarea").press("End")
    page.keyboard.type("/g")  # which are keys of the graph
    expect(page.locator("textarea")).to_have_value(f"{TEXT}/g")
    page.get_by_label("Name of the graph").fill("loop")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Saved as loop")
    page.goto(f"{address}graph/loop")
    assert [g["name"] for g in page.evaluate("vpdGraph.groups")] == ["group 1"]
    page.locator("#save a").click()
    expect(page.locator("#map tbody tr").first).to_be_visible()


def test_a_phone_scrolls_down_only(page, bench, address):
    page.set_viewport_size({"width": 380, "height": 720})
    page.emulate_media(color_scheme="dark")
    for path in ("", f"?text={TEXT}", "graph/1"):
        page.goto(address + path)
        page.wait_for_function("document.readyState === 'complete'")
        assert page.evaluate("document.documentElement.scrollWidth") == 380
    page.goto(f"{address}?text={TEXT}")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.emulate_media(color_scheme="light")
    assert page.evaluate(background) != dark
