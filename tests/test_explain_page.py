"""The page of an explanation, and cards on the other pages, driven in a browser."""

import pytest

import vpd_lens
from tests.test_understanding import PROMPT, example, explained  # noqa: F401
from vpd_lens.viz import harvest_page

pytestmark = pytest.mark.slow


@pytest.fixture
def page(explained, tmp_path, open_file):  # noqa: F811
    return open_file(explained.to_html(tmp_path / "explained.html", title="<b>&")).page


def test_cells_are_the_numbers_of_what_is_needed(page, explained):  # noqa: F811
    assert page.inner_text("h1") == "<b>&"
    cells = page.locator("#map tbody tr").nth(4).locator("td:not(.next)").all_inner_texts()
    assert [int(cell) for cell in cells] == [int(n[4]) for n in explained.counts().values()]


def test_a_cell_lists_its_needs_and_a_need_opens_its_card(page, explained):  # noqa: F811
    """In the chosen order, with the figures that Python has."""
    site = "blocks.3.mlp.out"
    last, number = len(explained.strings) - 1, explained.layout.names.index(site)
    page.click(f'[data-at="{last},{number}"]')
    for by in ("effect", "importance"):
        page.select_option("#order", by)
        shown = page.locator("#panel .who").all_inner_texts()
        sizes = {need.name: abs(getattr(need, by)) for need in explained.needs(-1, None, site=site)}
        assert set(shown) == set(sizes)
        found = [float(f"{sizes[name]:.2g}") for name in shown]
        assert found == sorted(found, reverse=True)
    page.select_option("#order", "effect")
    name = page.locator("#panel .who").first.inner_text()
    page.locator("#panel .need").first.click()
    assert page.inner_text("#panel h2") == name
    card = explained.cards[name]
    shown = page.locator("#panel .weights .entry b").all_inner_texts()
    assert shown[0] == card.promotes[0].token.replace(" ", "·").replace("\n", "↵")
    neighbour = card.alike[0].name
    page.locator("#panel .weights button", has_text=neighbour).first.click()
    assert page.inner_text("#panel h2") == neighbour


def test_arrows_walk_over_cells_and_escape_leaves_a_card(page):
    page.locator('[data-at="0,0"]').click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.at") == "1,1"
    assert page.locator('.cell[aria-pressed="true"]').get_attribute("data-at") == "1,1"
    for _ in range(9):
        page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.at") == "1,"


def test_effects_have_signs(page, explained):  # noqa: F811
    page.select_option("#measure", "effect")
    columns = explained.layout.columns("blocks.0.attn.q")
    needed = explained.importance[3, columns] > 0.1
    sign = "plus" if (explained.effect[3, columns] * needed).sum() >= 0 else "minus"
    assert sign in page.locator("#map tbody tr").nth(3).locator("td").nth(1).get_attribute("class")


def test_a_card_in_a_graph_leads_to_the_node_of_a_neighbour(example, tmp_path, open_file):  # noqa: F811
    model, harvest = example
    graph = vpd_lens.attribute(model, PROMPT, "self", progress=False).pruned(0.7)
    cards = vpd_lens.Cards(model, harvest)
    page = open_file(graph.to_html(tmp_path / "graph.html", cards=cards)).page
    names = {name.rpartition("@")[0]: name for name in graph.nodes.names()}
    own = [name for name in names if name.startswith("blocks.")]
    pair = next(
        (name, other.name)
        for name in own
        if ":" in name
        for other in cards[name].alike + cards[name].downstream
        if other.name in names
    )
    page.evaluate("name => document.querySelector(`[data-name='${name}']`).click()", names[pair[0]])
    page.locator("#panel .weights button", has_text=pair[1]).first.click()
    assert page.inner_text("#panel h2").startswith(pair[1] + "@")


def test_edges_from_v_to_o_show_their_heads(example, tmp_path, open_file):  # noqa: F811
    """Also when the page holds edges in another order, and in networkx."""
    from vpd_lens.analysis.attention import head_loadings

    model, _ = example
    graph = vpd_lens.attribute(model, PROMPT, "self", progress=False).pruned(0.7)
    loadings = head_loadings(model, graph)
    n = int(loadings.weights.abs().sum(1).argmax())
    edge, weights = int(loadings.edge[n]), loadings.weights[n].tolist()
    names = graph.nodes.names()
    source, target = (names[int(end[edge])] for end in (graph.edges.source, graph.edges.target))
    assert graph.to_networkx(loadings).edges[source, target]["heads"] == weights
    page = open_file(graph.to_html(tmp_path / "graph.html", loadings=loadings)).page
    page.evaluate("name => document.querySelector(`[data-name='${name}']`).click()", target)
    for more in page.locator("#panel .more").all():
        more.click()
    row = page.locator("#panel li", has=page.locator(f"[data-name='{source}']")).first
    title = row.locator(".heads").get_attribute("title").replace("\u2212", "-")
    shown = [float(part.split(": ")[1]) for part in title.split(", ")]
    assert shown == pytest.approx(weights, rel=1e-2, abs=1e-4)
    assert row.locator(".heads i").count() == 4


def test_cards_of_a_dashboard_lead_to_each_other(example, tmp_path, open_file):  # noqa: F811
    model, harvest = example
    cards = vpd_lens.Cards(model)
    sites = ("blocks.0.mlp.out", "blocks.3.attn.o")
    known = {f"{site}:{c}" for site in sites for c in range(3)}

    class Few:
        labels = cards.labels

        def weights(self, name):
            return cards.weights(name) if name in known else []

    harvest_page.write(harvest, tmp_path, cards=Few())
    page = open_file(tmp_path / harvest_page.page_name(sites[0])).page
    name = cards[f"{sites[0]}:2"].alike[0].name
    page.fill("#search", "#2")
    link = page.locator(".weights a", has_text=name).first
    site, _, index = name.rpartition(":")
    assert link.get_attribute("href") == f"{harvest_page.page_name(site)}#c{index}"
    assert (tmp_path / harvest_page.page_name(site)).exists()
