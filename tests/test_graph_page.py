"""The page of an attribution graph, driven in a browser."""

import json
import random
import time
from dataclasses import replace

import pytest
import torch
from playwright.sync_api import Error, expect

import tests.browser
from vpd_lens.analysis.circuits.graph import AttributionGraph
from vpd_lens.analysis.circuits.tables import KINDS, Edges, Nodes
from vpd_lens.analysis.circuits.targets import Output
from vpd_lens.decomposition.labels import Labels
from vpd_lens.errors import ArtefactError
from vpd_lens.viz import graph_page

pytestmark = pytest.mark.slow

HOSTILE = ("</script><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>")
TOKENS = ("def", " read", "\n", "\t", *HOSTILE, "<!--", " self", "é", "'\"&amp;")
PARTS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.in", "mlp.out")
LEFT_OVER = ("position", "error", "delta", "bias")


def random_graph(n_subcomponents=30, n_edges=150, n_layers=2, n_tokens=10, frozen=True, seed=0):
    """A graph whose edges run from earlier to later places and never back in the prompt."""
    chance = random.Random(seed)
    places = ("embed", *[f"blocks.{n}.{p}" for n in range(n_layers) for p in PARTS], "output")
    last = n_tokens - 1
    rows = [("embedding", 0, t, 100 + t, 5.0, 1.0) for t in range(n_tokens)]
    rows += [("position", 0, 1, -1, 1.0, 0.0)]
    inner = [(p, t) for p in range(1, len(places) - 1) for t in range(n_tokens)]
    found = sorted(chance.choice(inner) for _ in range(n_subcomponents))
    for index, (place, t) in enumerate(found):
        rows.append(("subcomponent", place, t, index, chance.gauss(0, 2), chance.random()))
    rows += [(kind, len(places) - 3, last, -1, 1.0, 0.0) for kind in LEFT_OVER[1:]]
    names, probabilities = (" self", "</script>", "a - b"), (0.5, 0.25, 0.125)
    ids = (7, 8, -1)
    rows += [
        ("output", len(places) - 1, last, ids[n], 3.0, probabilities[n]) for n in range(len(names))
    ]
    kinds, place, position, index, activation, importance = zip(*rows, strict=True)
    whole = [torch.tensor(c) for c in ([KINDS.index(k) for k in kinds], place, position, index)]
    nodes = Nodes(places, *whole, torch.tensor(activation), torch.tensor(importance))
    return AttributionGraph(
        tokens=tuple(range(n_tokens)),
        strings=tuple(TOKENS[t % len(TOKENS)] for t in range(n_tokens)),
        nodes=nodes,
        edges=random_edges(nodes, n_edges, chance),
        outputs=tuple(
            Output(name, last, torch.zeros(2), 0.0, {i: 1.0} if i >= 0 else {}, None, p)
            for name, i, p in zip(names, ids, probabilities, strict=True)
        ),
        settings={"frozen": frozen, "delta": "node", "threshold": 0.0},
    )


def random_edges(nodes, n_edges, chance):
    place, position = nodes.place.tolist(), nodes.position.tolist()
    targets = nodes.of_kind("subcomponent", "output").nonzero()[:, 0].tolist()
    weights = {}
    while len(weights) < n_edges:
        source, target = chance.randrange(len(nodes)), chance.choice(targets)
        if place[source] < place[target] and position[source] <= position[target]:
            weights[source, target] = chance.gauss(0, 1) * 10 ** chance.uniform(-2, 0)
    source, target = zip(*weights, strict=True)
    ends = torch.tensor(source).int(), torch.tensor(target).int()
    return Edges(*ends, torch.tensor(list(weights.values())))


class Harvest:
    """Cards of every other subcomponent."""

    labels = Labels()

    def check(self, fingerprint):
        if fingerprint == "another":
            raise ArtefactError("a harvest of another decomposition")

    def card(self, site, index):
        if index % 2:
            return None
        words = [f"word{index}", *HOSTILE, " zebra\n"]
        example = {"tokens": words, "importance": [0.0, 1.0, 0.5, 0.2]}
        row = {"token": HOSTILE[0], "recall": 0.5, "pmi": 3.0}
        return {
            "density": 0.0123,
            "mean_importance": 0.004,
            "examples": [{**example, "activation": [0.0, -1.5, 2.0, 0.1], "focus": 1}],
            "input_tokens": [row],
            "output_tokens": [row],
        }


@pytest.fixture
def graph():
    return random_graph()


@pytest.fixture
def opened(graph, tmp_path, open_file):
    return open_file(graph_page.to_html(graph, tmp_path / "graph.html"))


def node(opened, name):
    return opened.page.locator(f'#nodes [data-name="{name}"]')


def busiest(opened):
    """The subcomponent with most edges among those drawn."""
    ends = [name for edge in opened.state("visibleEdges") for name in edge[:2]]
    return max((n for n in ends if n.startswith("blocks")), key=ends.count)


def drawn_pixels(opened, canvas):
    return opened.page.evaluate(
        """id => { const c = document.getElementById(id);
        const copy = new OffscreenCanvas(c.width, c.height).getContext("2d");
        copy.drawImage(c, 0, 0);
        const { data } = copy.getImageData(0, 0, c.width, c.height);
        return data.filter((value, i) => i % 4 === 3 && value > 0).length; }""",
        canvas,
    )


# ------------------------------------------------------------------ the payload


def test_payload_is_columns_of_what_the_graph_holds(graph):
    data = json.loads(json.dumps(graph_page.payload(graph)))
    order = graph.edges.weight.abs().argsort(descending=True, stable=True)
    assert data["nodes"]["name"] == graph.nodes.names()
    assert data["edges"]["source"] == graph.edges.source[order].tolist()
    assert data["edges"]["weight"] == pytest.approx(graph.edges.weight[order].tolist(), rel=1e-3)
    assert data["nodes"]["influence"] == pytest.approx(graph.influence().nodes.tolist(), rel=1e-3)
    assert data["scores"]["replacement"] == pytest.approx(graph.replacement_score(), rel=1e-3)
    places = [data["rows"][row]["place"] for row in data["nodes"]["row"]]
    assert places == [graph.nodes.places[place] for place in graph.nodes.place.tolist()]
    assert {"place": "blocks.0.mlp.in", "block": "0", "label": "mlp in"} in data["rows"]
    assert [output["probability"] for output in data["outputs"]] == [0.5, 0.25, None]


def test_a_harvest_of_another_decomposition_is_refused(graph, tmp_path):
    foreign = replace(graph, settings={**graph.settings, "decomposition": "another"})
    with pytest.raises(ArtefactError, match="another decomposition"):
        graph_page.to_html(foreign, tmp_path / "graph.html", Harvest())
    assert not list(tmp_path.iterdir())


def test_each_card_is_asked_for_once(graph):
    asked = []

    class Counting(Harvest):
        def card(self, site, index):
            asked.append((site, index))
            return super().card(site, index)

    cards = graph_page.payload(graph, Counting())["cards"]
    assert len(asked) == len(set(asked))
    assert all(int(name.rpartition(":")[2]) % 2 == 0 for name in cards)


def test_only_the_strongest_of_very_many_edges_are_kept(
    graph,
    tmp_path,
    open_file,
    monkeypatch,
):
    monkeypatch.setattr(graph_page, "MAX_EDGES", 40)
    strongest = graph.edges.weight.abs().sort(descending=True).values[:40]
    weights = graph_page.payload(graph)["edges"]["weight"]
    assert [abs(weight) for weight in weights] == pytest.approx(strongest.tolist(), rel=1e-3)
    opened = open_file(graph_page.to_html(graph, tmp_path / "graph.html"))
    assert "150 edges; this page holds the strongest 40" in opened.page.inner_text("#top")


# --------------------------------------------------------------------- the page


def test_the_page_shows_the_graph(opened, graph):
    shown = set(opened.state("visibleNodes"))
    left_over = graph.nodes.of_kind(*LEFT_OVER).tolist()
    names = graph.nodes.names()
    assert shown == {name for name, left in zip(names, left_over, strict=True) if not left}
    edges = opened.state("visibleEdges")
    among = [s in shown and t in shown for s, t in edge_names(graph)]
    assert len(edges) == sum(among)
    assert drawn_pixels(opened, "edges") > 1000
    text = opened.page.inner_text("#top")
    assert f"{len(shown)} of {graph.n_nodes}" in text
    assert "frozen" in text
    assert "gradients" not in text
    assert "↵" in opened.page.inner_text("#columns")
    assert opened.page.inner_text("#bands").split("\n")[:2] == ["output", "mlp out"]


def edge_names(graph):
    names = graph.nodes.names()
    pairs = zip(graph.edges.source.tolist(), graph.edges.target.tolist(), strict=True)
    return [(names[source], names[target]) for source, target in pairs]


def test_gradient_edges_come_with_a_warning(tmp_path, open_file):
    path = graph_page.to_html(random_graph(frozen=False), tmp_path / "graph.html", title="<b>&")
    opened = open_file(path)
    assert "need not add up" in opened.page.inner_text("#top")
    assert opened.page.inner_text("h1") == "<b>&"


def test_hostile_tokens_stay_text(graph, tmp_path, open_file):
    path = graph_page.to_html(graph, tmp_path / "graph.html", Harvest())
    opened = open_file(path)
    page = opened.page
    with_card = next(n for n in graph.nodes.names() if ":4@" in n)
    node(opened, with_card).focus()
    page.keyboard.press("Enter")
    assert HOSTILE[0] in page.inner_text("#panel .examples")
    assert "word4" in page.inner_text("#panel .examples")
    assert page.inner_text("#panel .card-section").count("1.23 %") == 1
    assert page.locator("#panel .examples .focus").get_attribute("title") == (
        "importance 1, activation \u22121.5"
    )
    assert page.locator("#panel .token-tables td").first.inner_text() == HOSTILE[0]
    for name in graph.nodes.names():
        page.evaluate("name => document.querySelector(`[data-name='${name}']`)?.click()", name)
    page.fill("#search", "zebra")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert path.read_text().count("</script>") == 2


def test_hovering_lights_a_nodes_edges(opened):
    name = busiest(opened)
    assert drawn_pixels(opened, "lit-edges") == 0
    node(opened, name).hover()
    assert opened.state("hovered") == name
    near = {name} | {
        other
        for source, target, _ in opened.state("visibleEdges")
        for other in (source, target)
        if name in (source, target)
    }
    lit = opened.page.locator("#nodes .lit").evaluate_all("all => all.map(e => e.dataset.name)")
    assert set(lit) == near
    assert drawn_pixels(opened, "lit-edges") > 100
    assert (
        opened.page.evaluate("getComputedStyle(document.getElementById('edges')).opacity") < "0.5"
    )
    assert name in opened.page.inner_text("#tip")
    opened.page.mouse.move(5, 5)
    assert opened.state("hovered") is None
    assert drawn_pixels(opened, "lit-edges") == 0


def listed(opened, end):
    rows = opened.page.locator(f"#panel [data-end={end}] .edge")
    return rows.evaluate_all("all => all.map(e => e.dataset.name)")


def test_a_pinned_node_lists_all_its_edges_by_strength(opened, graph):
    name = busiest(opened)
    node(opened, name).click()
    assert opened.state("pinned") == name
    assert opened.page.inner_text("#panel h2") == name
    for more in opened.page.locator("#panel .more").all():
        more.click()
    assert listed(opened, "in") == [source for source, _ in graph.incoming(name)]
    assert listed(opened, "out") == [target for target, _ in graph.outgoing(name)]
    first = graph.incoming(name)[0][1]
    shown = opened.page.locator("#panel [data-end=in] .weight").first.inner_text()
    assert float(shown.replace("\u2212", "-")) == pytest.approx(first, rel=0.01)
    sources = listed(opened, "in")
    opened.page.locator("#panel [data-end=in] .edge").first.click()
    assert opened.state("pinned") == sources[0]
    opened.page.keyboard.press("Escape")
    assert opened.state("pinned") is None
    node(opened, name).click()
    opened.page.locator("#board").click(position={"x": 30, "y": 60})
    assert opened.state("pinned") is None


def test_pinning_what_is_hidden_shows_it(opened, graph):
    error = next(n for n in graph.nodes.names() if ".error@" in n)
    target = graph.outgoing(error)[0][0]
    node(opened, target).click()
    for more in opened.page.locator("#panel .more").all():
        more.click()
    assert error not in opened.state("visibleNodes")
    opened.page.locator(f'#panel .edge[data-name="{error}"]').click()
    assert opened.state("pinned") == error
    assert error in opened.state("visibleNodes")
    opened.page.keyboard.press("Escape")
    assert error not in opened.state("visibleNodes")


def test_sliders_hide_edges_and_nodes(opened, graph):
    page = opened.page
    every = opened.state("visibleEdges")
    page.fill("#strength", "800")
    strong = opened.state("visibleEdges")
    assert 0 < len(strong) < len(every)
    assert min(abs(w) for *_, w in strong) > max(
        abs(w) for s, t, w in every if [s, t, w] not in strong
    )
    assert f"{len(strong)} edges" in page.inner_text("#strength-value")
    page.fill("#strength", "0")
    page.fill("#importance", "0.5")
    values = dict(zip(graph.nodes.names(), graph.nodes.importance.tolist(), strict=True))
    kept = [n for n in opened.state("visibleNodes") if n.startswith("blocks")]
    assert kept
    assert all(values[name] >= 0.5 for name in kept)
    page.fill("#importance", "0")
    page.fill("#influence", "5")
    influence = dict(zip(graph.nodes.names(), graph.influence().nodes.tolist(), strict=True))
    top = sorted((n for n in influence if ":" in n and "blocks" in n), key=influence.get)[-5:]
    assert {n for n in opened.state("visibleNodes") if n.startswith("blocks")} == set(top)


def test_what_is_left_over_is_behind_one_toggle(opened, graph):
    opened.page.check("#leftovers")
    assert len(opened.state("visibleNodes")) == graph.n_nodes
    assert len(opened.state("visibleEdges")) == graph.n_edges


def test_about_the_300_strongest_edges_are_drawn_at_first(tmp_path, open_file):
    graph = random_graph(100, 1500)
    opened = open_file(graph_page.to_html(graph, tmp_path / "graph.html"))
    assert 295 <= len(opened.state("visibleEdges")) <= 305


# ----------------------------------------------------------------------- groups


def group_two(opened, graph):
    """Groups the two sources of a target's strongest edges; returns their and its names."""
    output = graph.nodes.names()[-1]
    members = [n for n, _ in graph.incoming(output) if n.startswith("blocks") and ":" in n][:2]
    for member in members:
        node(opened, member).click(modifiers=["Shift"])
    assert opened.page.inner_text("#selection span") == "2 selected"
    opened.page.keyboard.press("g")
    return members, output


def test_a_group_stands_for_its_members(opened, graph):
    page = opened.page
    members, output = group_two(opened, graph)
    assert opened.state("pinned") == "group 1"
    assert not set(members) & set(opened.state("visibleNodes"))
    weights = dict(graph.incoming(output))
    wanted = sum(weights[member] for member in members)
    edges = {(s, t): w for s, t, w in opened.state("visibleEdges")}
    assert edges["group 1", output] == pytest.approx(wanted, rel=1e-3)
    page.fill("#group-name", "readers")
    page.keyboard.press("Enter")
    assert opened.state("groups") == [{"name": "readers", "members": sorted_as(graph, members)}]
    page.wait_for_timeout(300)  # a browser writes what a page stores in the background
    page.reload()
    assert opened.state("groups")[0]["name"] == "readers"
    assert "readers" in opened.state("visibleNodes")
    node(opened, "readers").click()
    page.click("#ungroup")
    assert opened.state("groups") == []
    assert set(members) <= set(opened.state("visibleNodes"))
    page.reload()
    assert opened.state("groups") == []


class Clusters:
    """Two groups, the first of two subcomponents."""

    def __init__(self, graph):
        names = [name for name in graph.nodes.names() if name.startswith("blocks.")]
        self.groups = {"cluster 3@1": names[:2], "cluster 4@2": names[2:5]}

    def groups_in(self, graph):
        return self.groups


def test_clusters_are_groups_until_they_are_changed(graph, tmp_path, open_file):
    clusters = Clusters(graph)
    opened = open_file(graph_page.to_html(graph, tmp_path / "graph.html", clusters=clusters))
    expected = [{"name": name, "members": m} for name, m in clusters.groups.items()]
    assert opened.state("groups") == expected
    node(opened, "cluster 3@1").click()
    opened.page.click("#ungroup")
    assert opened.state("groups") == expected[1:]
    opened.page.wait_for_timeout(300)  # a browser writes what a page stores in the background
    opened.page.reload()
    assert opened.state("groups") == expected[1:]


def test_a_group_may_hold_what_is_explained(opened, graph):
    names = [name for name in graph.nodes.names() if name.startswith("output")]
    for name in names:
        node(opened, name).click(modifiers=["Shift"])
    opened.page.keyboard.press("g")
    opened.page.reload()
    assert opened.state("groups") == [{"name": "group 1", "members": names}]


def sorted_as(graph, names):
    return sorted(names, key=graph.nodes.find)


def test_groups_leave_and_come_back_as_a_file(opened, graph, tmp_path):
    page = opened.page
    group_two(opened, graph)
    before = opened.state("groups")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        page.click("#export-groups")
    saved = tmp_path / "groups.json"
    download.value.save_as(saved)
    assert json.loads(saved.read_text())["groups"] == before
    page.evaluate("localStorage.clear()")
    page.reload()
    assert opened.state("groups") == []
    page.set_input_files("#import-groups", saved)
    expect(page.locator("#nodes .group")).to_have_count(1)
    assert opened.state("groups") == before
    saved.write_text("not groups")
    page.set_input_files("#import-groups", saved)
    expect(page.locator("#status")).to_contain_text("not a file of groups")
    assert opened.state("groups") == before


# -------------------------------------------------------------- search and keys


def test_search_finds_names_tokens_and_examples(graph, tmp_path, open_file):
    opened = open_file(graph_page.to_html(graph, tmp_path / "graph.html", Harvest()))
    page, names = opened.page, graph.nodes.names()
    page.keyboard.press("/")
    page.keyboard.type("mlp.out:")
    wanted = {name for name in names if "mlp.out:" in name}
    hits = page.locator("#nodes .hit").evaluate_all("all => all.map(e => e.dataset.name)")
    assert set(hits) == wanted
    seen = []
    for _ in wanted:
        page.keyboard.press("Enter")
        seen.append(opened.state("pinned"))
    assert set(seen) == wanted
    assert page.inner_text("#search-value") == f"{len(wanted)} / {len(wanted)}"
    page.fill("#search", "word4")
    card_of_4 = [name for name in names if name.partition("@")[0].endswith(":4")]
    page.keyboard.press("Enter")
    assert opened.state("pinned") in card_of_4
    page.keyboard.press("Escape")
    assert page.locator("#nodes .hit").count() == 0
    page.fill("#search", "no such thing")
    assert page.inner_text("#search-value") == "none"


def test_keys_walk_pin_and_unpin(opened, graph):
    page = opened.page
    node(opened, "embed@0").focus()
    page.keyboard.press("ArrowRight")
    assert opened.state("hovered") == "embed@1"
    page.keyboard.press("ArrowLeft")
    assert opened.state("hovered") == "embed@0"
    page.keyboard.press("ArrowUp")
    above = opened.state("hovered")
    assert above.startswith("blocks.0.")
    page.keyboard.press("Enter")
    assert opened.state("pinned") == above
    page.keyboard.press("Escape")
    assert opened.state("pinned") is None
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    assert page.inner_text("#selection span") == "2 selected"
    page.keyboard.press("g")
    assert len(opened.state("groups")[0]["members"]) == 2
    page.keyboard.press("Escape")
    page.locator("#viewport").focus()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    assert page.locator("#nodes [tabindex='0']").count() == 1


@pytest.mark.parametrize("system", ["light", "dark"])
def test_light_and_dark_follow_the_system_until_switched(
    graph,
    tmp_path,
    open_file,
    system,
):
    opened = open_file(graph_page.to_html(graph, tmp_path / "graph.html"), color_scheme=system)
    page = opened.page

    def is_dark():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(",")) < 300

    assert is_dark() == (system == "dark")
    page.click("#theme")
    assert is_dark() == (system == "light")
    page.reload()
    assert is_dark() == (system == "light")


def test_zoom_keeps_everything_drawn(opened):
    before = node(opened, "embed@0").bounding_box()["width"]
    opened.page.click("#zoom-in")
    opened.page.click("#zoom-in")
    assert node(opened, "embed@0").bounding_box()["width"] > 1.3 * before
    assert drawn_pixels(opened, "edges") > 1000


# ------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("n_subcomponents", "n_edges", "n_layers", "n_tokens", "seconds"),
    [(280, 5000, 4, 12, 6), (1950, 50_000, 8, 32, 15)],
)
def test_large_graphs_respond(
    tmp_path,
    open_file,
    n_subcomponents,
    n_edges,
    n_layers,
    n_tokens,
    seconds,
):
    graph = random_graph(n_subcomponents, n_edges, n_layers, n_tokens)
    path = graph_page.to_html(graph, tmp_path / "graph.html")
    began = time.perf_counter()
    opened = open_file(path)
    name = busiest(opened)
    assert time.perf_counter() - began < seconds
    began = time.perf_counter()
    opened.page.evaluate(
        "name => document.querySelector(`[data-name='${name}']`).dispatchEvent("
        "new PointerEvent('pointerover', { bubbles: true }))",
        name,
    )
    assert opened.state("hovered") == name
    assert time.perf_counter() - began < seconds / 3
    opened.page.fill("#influence", str(n_subcomponents))
    opened.page.fill("#strength", "0")
    assert 2000 < len(opened.state("visibleEdges")) <= 5000


def test_a_missing_browser_is_a_failure():
    class Nothing:
        def launch(self, **options):
            raise Error("no such program")

    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        tests.browser.launch(Nothing())
