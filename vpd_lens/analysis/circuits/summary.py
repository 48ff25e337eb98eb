"""A graph at a glance: on a terminal of 80 columns, and the same text in a notebook."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vpd_lens.analysis.circuits.tables import KINDS

if TYPE_CHECKING:
    from vpd_lens.analysis.circuits.graph import AttributionGraph

_TOP = 10
_BAR = 24


def summary(graph: AttributionGraph) -> Group:
    """Sizes, scores, outputs, the most influential nodes and L0 by block, for `rich.print`."""
    prompt = Panel(Text("".join(graph.strings), style="bold"), title="Attribution graph")
    return Group(prompt, _sizes(graph), _outputs(graph), _most_influential(graph), _l0(graph))


def _sizes(graph: AttributionGraph) -> Table:
    counts = Counter(graph.nodes.kind.tolist())
    kinds = ", ".join(f"{counts[i]:,} {kind}" for i, kind in enumerate(KINDS) if counts[i])
    table = _table("Graph")
    table.add_row("tokens", f"{len(graph.tokens):,}")
    table.add_row("nodes", f"{graph.n_nodes:,} ({kinds})")
    if n_idle := graph.settings.get("n_idle"):
        table.add_row("left out", f"{n_idle:,} idle subcomponents")
    table.add_row("edges", f"{graph.n_edges:,}")
    for score in ("completeness", "replacement_score", "completeness_score"):
        table.add_row(score.replace("_", " "), f"{getattr(graph, score)():.4f}")
    return table


def _outputs(graph: AttributionGraph) -> Table:
    table = _table("Outputs", "output", ">position", ">probability", ">value")
    values = graph.nodes.activation[graph.nodes.of_kind("output")].tolist()
    for output, value in zip(graph.outputs, values, strict=True):
        figures = str(output.position), f"{output.probability:.4f}", f"{value:+.4f}"
        table.add_row(Text(repr(output.name)), *figures)  # as Text: brackets are no markup
    return table


def _most_influential(graph: AttributionGraph) -> Table:
    nodes, influence, named = graph.nodes, graph.influence().nodes, graph.labels.named
    inner = influence.masked_fill(nodes.of_kind("output"), 0)
    headings = "node, and its strongest input", ">influence", ">importance", ">activation"
    table = _table("Most influential nodes", *headings)
    order = inner.argsort(descending=True, stable=True)[:_TOP]
    for node in order[inner[order] > 0].tolist():
        name = Text(f"{named(nodes.name(node))}  {graph.strings[int(nodes.position[node])]!r}")
        for source, weight in graph.incoming(node, top=1):
            name.append(f"\n  <- {named(source)} {weight:+.3g}")
        figures = influence, nodes.importance, nodes.activation
        table.add_row(name, *(f"{float(column[node]):.3f}" for column in figures))
    return table


def _l0(graph: AttributionGraph) -> Table:
    """Subcomponents per position, by block; those outside of blocks by their matrix."""
    places, inner = graph.nodes.places, graph.nodes.of_kind("subcomponent")
    owners = [".".join(p.split(".")[:2]) if p.startswith("blocks.") else p for p in places]
    counts = Counter(owners[place] for place in sorted(graph.nodes.place[inner].tolist()))
    table = _table("Subcomponents per position (L0)", "block", ">L0", "")
    for block, count in counts.items():
        bar = "█" * max(1, round(_BAR * count / max(counts.values())))
        table.add_row(block, f"{count / len(graph.tokens):.1f}", bar)
    return table


def _table(title: str, *headings: str) -> Table:
    """A table; columns whose heading begins with > are numbers."""
    table = Table(title=title, title_justify="left", show_header=bool(headings), box=SIMPLE_HEAD)
    for heading in headings:
        number = heading.startswith(">")
        side = "right" if number else "left"
        table.add_column(heading.removeprefix(">"), justify=side, no_wrap=number, overflow="fold")
    return table
