"""The explorer's pages: those of `vpd_lens.viz`, with a head, edits and jobs around them."""

from __future__ import annotations

import secrets
from functools import cache
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from starlette.responses import HTMLResponse

from vpd_lens.errors import InputError
from vpd_lens.explorer.orders import Question
from vpd_lens.explorer.saved import KeptGraph
from vpd_lens.explorer.workbench import Workbench
from vpd_lens.viz import explain_page, graph_page, harvest_page, html

PACKAGE = "vpd_lens.explorer"
# In this order, after those of the page itself.
HEAD, CARDS = ("client", "head", "jobs"), ("edits", "cards")


def home(
    bench: Workbench, question: Question | None = None, error: str = "", status: int = 200
) -> HTMLResponse:
    """What is there to begin with; also where a question that has no answer leads to."""
    nonce = secrets.token_urlsafe(16)
    page = html.render_template(
        PACKAGE,
        "assets/home.html.j2",
        styles=[html.asset(f"assets/{name}") for name in explain_page.STYLES] + _styles(),
        scripts=[html.asset("assets/text.js"), *_scripts(*HEAD)],
        graphs=bench.graphs.listed(),
        data=None if bench.data is None else str(bench.data),
        texts=[] if error else bench.texts,
        error=error,
        **_shell(bench, question, nonce),
    )
    return _response(page, nonce, status)


def text(bench: Workbench, question: Question) -> HTMLResponse:
    """What a text needs, with cards and edits."""
    data, nonce = bench.explained(question), secrets.token_urlsafe(16)
    page = explain_page.render(
        data | {"labels": bench.labels.texts()},
        template=(PACKAGE, "assets/text.html.j2"),
        styles=_styles(),
        scripts=_scripts(*HEAD, *CARDS),
        **_shell(bench, question, nonce, "What a text needs"),
    )
    return _response(page, nonce)


def graph(bench: Workbench, key: str) -> HTMLResponse:
    """A graph, with cards, edits and groups that are kept."""
    kept, nonce = bench.graph(key), secrets.token_urlsafe(16)
    data = graph_page.payload(kept.graph, loadings=kept.loadings)
    data["labels"] = bench.labels.texts()
    data["groups"] = [group.model_dump() for group in kept.notes.groups]
    data["keepsGroups"] = True
    shell = _shell(bench, kept.notes.question, nonce, "Attribution graph", graph=_of(key, kept))
    page = graph_page.render(
        data,
        template=(PACKAGE, "assets/graph.html.j2"),
        styles=_styles(),
        scripts=_scripts(*HEAD, *CARDS, "graph"),
        **shell,
    )
    return _response(page, nonce)


def harvest(bench: Workbench, page: str) -> HTMLResponse:
    """A page of the harvest, by the name that its file would have."""
    if bench.harvest is None:
        raise InputError("this explorer has no harvest. Start it with --harvest DIR.")
    nonce, sites = secrets.token_urlsafe(16), bench.harvest.layout.names
    how: Any = {"nonce": nonce, "title": f"Harvest of {bench.title}"}
    if page == harvest_page.INDEX:
        template = PACKAGE, "assets/harvest_index.html.j2"
        return _response(harvest_page.index_page(bench.harvest, template=template, **how), nonce)
    site = {harvest_page.page_name(site): site for site in sites}.get(page)
    if site is None:
        raise InputError(f"there is no page {page!r} of the harvest.")
    template = PACKAGE, "assets/harvest_site.html.j2"
    return _response(harvest_page.site_page(bench.harvest, site, template=template, **how), nonce)


def _of(key: str, kept: KeptGraph) -> dict[str, Any]:
    circuit = kept.graph.circuit
    mean = None if circuit is None else circuit.mean
    return {"key": key, "name": kept.name, "circuit": mean and graph_page.rounded(mean, 3)}


def _shell(
    bench: Workbench,
    question: Question | None,
    nonce: str,
    what: str = "Explorer",
    graph: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What the explorer's own templates and scripts are given."""
    asked = (question or Question(text="")).model_dump()
    known = {
        "question": asked,
        "graph": graph,
        "harvested": list(bench.harvest.layout.names) if bench.harvest else [],
    }
    return {
        "title": what,
        "heading": bench.title,
        "harvested": bench.harvest is not None,
        "asked": asked,
        "context": int(bench.model.cfg.n_ctx),  # type: ignore[union-attr, arg-type]
        "explorer": htmlsafe_json_dumps(known, allow_nan=False),
        "nonce": nonce,
    }


@cache
def _asset(name: str) -> Markup:
    return html.asset(f"assets/{name}", PACKAGE)


def _styles() -> list[Markup]:
    return [_asset("explorer.css")]


def _scripts(*names: str) -> list[Markup]:
    return [_asset(f"{name}.js") for name in names]


def _response(page: str, nonce: str, status: int = 200) -> HTMLResponse:
    own = f"'nonce-{nonce}'"
    policy = (
        f"default-src 'none'; script-src {own}; style-src {own}; img-src data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(page, status, {"content-security-policy": policy})
