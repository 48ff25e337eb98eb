"""A graph at a glance: on a terminal, and as a table in a notebook."""

from __future__ import annotations

import html as escaping
import re
from collections import Counter
from typing import TYPE_CHECKING, Literal

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vpd_lens.analysis.attribution.nodes import KINDS

if TYPE_CHECKING:
    from vpd_lens.analysis.attribution.graph import AttributionGraph

_TOP = 10
_BAR = 24

# Title, headings and rows of text.
_Section = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
_Side = Literal["left", "right"]


def summary(graph: AttributionGraph) -> Group:
    """Sizes, scores, outputs, the most influential nodes and L0 by block, for `rich.print`.

    Args:
        graph: The graph.
    """
    prompt = Text("".join(graph.strings), style="bold")
    return Group(Panel(prompt, title="Attribution graph"), *map(_table, _sections(graph)))


def html(graph: AttributionGraph) -> str:
    """The same as HTML that stands alone and takes its colours from the page around it.

    Args:
        graph: The graph.
    """
    prompt = escaping.escape("".join(graph.strings))
    parts = [f"<pre style='margin:0 0 .5em;white-space:pre-wrap'>{prompt}</pre>"]
    parts += [_html_table(section) for section in _sections(graph)]
    return f"<div style='font-size:90%;color:inherit'>{''.join(parts)}</div>"


def _sections(graph: AttributionGraph) -> list[_Section]:
    return [_sizes(graph), _outputs(graph), _most_influential(graph), _l0(graph)]


def _sizes(graph: AttributionGraph) -> _Section:
    counts = Counter(graph.nodes.kind.tolist())
    kinds = ", ".join(f"{counts[i]:,} {kind}" for i, kind in enumerate(KINDS) if counts[i])
    rows = [
        ("tokens", f"{len(graph.tokens):,}"),
        ("nodes", f"{graph.n_nodes:,} ({kinds})"),
        ("edges", f"{graph.n_edges:,}"),
        ("completeness", f"{graph.completeness():.4f}"),
        ("replacement score", f"{graph.replacement_score():.4f}"),
        ("completeness score", f"{graph.completeness_score():.4f}"),
    ]
    return "Graph", ("", ""), rows


def _outputs(graph: AttributionGraph) -> _Section:
    values = graph.nodes.activation[graph.nodes.of_kind("output")].tolist()
    rows = [
        (repr(o.name), str(o.position), f"{o.probability:.4f}", f"{value:+.4f}")
        for o, value in zip(graph.outputs, values, strict=True)
    ]
    return "Outputs", ("output", "position", "probability", "value"), rows


def _most_influential(graph: AttributionGraph) -> _Section:
    nodes, influence = graph.nodes, graph.influence().nodes
    inner = influence.masked_fill(nodes.of_kind("output"), -1)
    rows = []
    for node in inner.argsort(descending=True, stable=True)[:_TOP].tolist():
        if inner[node] <= 0:
            break
        token = repr(graph.strings[int(nodes.position[node])])
        inputs = [f"{name} ({weight:+.3g})" for name, weight in graph.incoming(node, top=1)]
        values = (float(table[node]) for table in (nodes.importance, nodes.activation))
        figures = (f"{float(influence[node]):.3f}", *(f"{value:.3f}" for value in values))
        rows.append((nodes.name(node), token, *figures, *(inputs or [""])))
    headings = ("node", "token", "influence", "importance", "activation", "strongest input")
    return "Most influential nodes", headings, rows


def _l0(graph: AttributionGraph) -> _Section:
    """Subcomponents per position, by block; those outside of blocks by their matrix."""
    inner = graph.nodes.where(graph.nodes.of_kind("subcomponent"))
    per_place = Counter(inner.place.tolist())
    per_block: Counter[str] = Counter()
    for i, place in enumerate(graph.nodes.places):
        if per_place[i]:
            parts = place.split(".")
            per_block[".".join(parts[:2]) if parts[0] == "blocks" else place] += per_place[i]
    longest = max(per_block.values(), default=1)
    rows = [
        (block, f"{count / len(graph.tokens):.1f}", "█" * max(1, round(_BAR * count / longest)))
        for block, count in per_block.items()
    ]
    return "Subcomponents per position (L0)", ("block", "L0", ""), rows


def _table(section: _Section) -> Table:
    title, headings, rows = section
    table = Table(title=title, title_justify="left", show_header=any(headings))
    for heading, side in zip(headings, _sides(section), strict=True):
        table.add_column(heading, justify=side, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as Text: brackets in a prompt are no markup
    return table


def _html_table(section: _Section) -> str:
    title, headings, rows = section
    sides = _sides(section)
    lines = [_html_row("td", row, sides) for row in rows]
    if any(headings):
        lines.insert(0, _html_row("th", headings, sides))
    table = f"<table style='border-collapse:collapse;background:none'>{''.join(lines)}</table>"
    return f"<details open><summary>{title}</summary>{table}</details>"


def _html_row(tag: str, texts: tuple[str, ...], sides: list[_Side]) -> str:
    style = "padding:1px 8px;border-bottom:1px solid rgba(128,128,128,.3);text-align:"
    cells = [
        f"<{tag} style='{style}{side}'>{escaping.escape(text)}</{tag}>"
        for text, side in zip(texts, sides, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _sides(section: _Section) -> list[_Side]:
    """Columns of numbers to the right, others to the left."""
    _, headings, rows = section
    columns = zip(*rows, strict=True) if rows else [()] * len(headings)
    number = re.compile(r"[-+]?[\d,.]+")
    return [
        "right" if column and all(map(number.fullmatch, column)) else "left" for column in columns
    ]
