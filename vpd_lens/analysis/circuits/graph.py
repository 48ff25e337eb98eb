"""`AttributionGraph`: nodes, sparse edges, and what one asks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vpd_lens import storage
from vpd_lens.analysis.circuits import influence
from vpd_lens.analysis.circuits.influence import Influence
from vpd_lens.analysis.circuits.prune import CircuitReport
from vpd_lens.analysis.circuits.tables import Edges, Nodes, subgraph
from vpd_lens.analysis.circuits.targets import Output
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.labels import Labels, LabelsRecord
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.rendering import Shown

if TYPE_CHECKING:
    import networkx
    from rich.console import RenderableType

    from vpd_lens.analysis.attention import HeadLoadings
    from vpd_lens.analysis.cards import Cards
    from vpd_lens.analysis.circuits.tables import AttentionPair
    from vpd_lens.analysis.clustering import Clusters
    from vpd_lens.analysis.harvest import Harvest


class GraphRecord(storage.Record):
    """What a saved graph says in JSON; see `AttributionGraph`."""

    kind = "graph"
    tokens: tuple[int, ...]
    strings: tuple[str, ...]
    places: tuple[str, ...]
    outputs: tuple[Output, ...]
    settings: dict[str, Any]
    circuit: CircuitReport | None
    labels: LabelsRecord = LabelsRecord()


@dataclass(repr=False)
class AttributionGraph(Shown):
    """Which subcomponents of a prompt act on which, and on the outputs.

    Edges are columns of tensors, never Python objects; nodes are addressed by number or by name
    (`"blocks.0.mlp.in:31@5"`, `"embed@3"`, `"output:17@5"`).

    Attributes:
        tokens: Token ids of the prompt; `strings` are the same as text.
        outputs: What is explained, in the order of the output nodes.
        settings: How the graph was made.
        circuit: What `prune=` found out about the circuit, or `None`.
        labels: What subcomponents are called: the model's, `model.vpd.labels`. Saved along.
    """

    tokens: tuple[int, ...]
    strings: tuple[str, ...]
    nodes: Nodes
    edges: Edges
    outputs: tuple[Output, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    circuit: CircuitReport | None = None
    labels: Labels = field(default_factory=Labels, compare=False)

    @property
    def n_nodes(self) -> int:
        """Number of nodes of all kinds."""
        return len(self.nodes)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return len(self.edges.weight)

    def adjacency(self) -> Float[Tensor, "n_nodes n_nodes"]:
        """The edges as a sparse matrix: row = target, column = source."""
        ends, shape = torch.stack([self.edges.target, self.edges.source]), (self.n_nodes,) * 2
        matrix = torch.sparse_coo_tensor(ends, self.edges.weight, shape, check_invariants=True)
        return matrix.coalesce()

    def incoming(self, node: str | int, top: int | None = None) -> list[tuple[str, float]]:
        """Sources of a node and the weights of their edges, the strongest first, `top` at most.

        Raises:
            InputError: If there is no node of this name or number.
        """
        return self._neighbours(self.edges.target, self.edges.source, node, top)

    def outgoing(self, node: str | int, top: int | None = None) -> list[tuple[str, float]]:
        """Targets of a node and the weights of their edges, as in `incoming`."""
        return self._neighbours(self.edges.source, self.edges.target, node, top)

    def _neighbours(
        self, here: Tensor, there: Tensor, node: str | int, top: int | None
    ) -> list[tuple[str, float]]:
        found = here == self.nodes.find(node)
        weights, others = self.edges.weight[found], there[found]
        order = weights.abs().argsort(descending=True, stable=True)[:top]
        return [(self.nodes.name(int(others[i])), float(weights[i])) for i in order]

    def gaps(self) -> Float[Tensor, " n_nodes"]:
        """Activation minus the sum of the incoming edges, for subcomponents and outputs.

        0 to float error with `frozen=True`; NaN for nodes that only have outgoing edges, and
        wrong for those whose sources were pruned away.
        """
        gap = self.nodes.activation.double()
        gap = gap.index_add(0, self.edges.target, self.edges.weight.double(), alpha=-1).float()
        return torch.where(self.nodes.of_kind("subcomponent", "output"), gap, torch.nan)

    def completeness(self) -> float:
        """`1 - sum |gap| / sum |activation|`: 1 if all incoming edges add up."""
        gaps = self.gaps()
        scale = self.nodes.activation[~gaps.isnan()].abs().sum().clamp(min=1e-30)
        return float(1 - gaps.abs().nansum() / scale)

    def total_effects(self, output: str | int | None = None) -> Float[Tensor, " n_nodes"]:
        """To first order, how much of an output each subcomponent accounts for on all paths.

        That is the output's drop if the subcomponent were ablated there; NaN for other nodes. Paths
        through what is not in the graph do not count, so a pruned graph has other effects. The
        output, a node's name or number, may be left out if there is one only.

        Raises:
            InputError: If there is no such node, or several outputs and none is named.
        """
        if output is None:
            if len(self.outputs) > 1:
                names = self.nodes.names()[-len(self.outputs) :]
                raise InputError(f"the graph has several outputs; name one of {names}.")
            output = -1
        return influence.total_effects(self.nodes, self.edges, self.nodes.find(output))

    def influence(self) -> Influence:
        """Influence of every node and edge on the outputs."""
        return influence.influence(self.nodes, self.edges, self._weights())

    def _weights(self) -> Float[Tensor, " n_outputs"]:
        return torch.tensor([output.weight for output in self.outputs], dtype=torch.float64)

    def replacement_score(self) -> float:
        """Share of the outputs' influence that does not begin in errors or deltas."""
        return self.influence().replacement

    def completeness_score(self) -> float:
        """Share of the nodes' inputs, weighted by influence, not from errors or deltas."""
        return self.influence().completeness

    def pruned(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The nodes that hold a share of all influence, and edges that hold a share of the rest.

        Raises:
            InputError: If a threshold is not in (0, 1].
        """
        shares = node_threshold, edge_threshold
        kept = influence.kept_by_influence(self.nodes, self.edges, *shares, self._weights())
        return self._kept(*kept)

    def filtered(self, nodes: Bool[Tensor, " n_nodes"]) -> AttributionGraph:
        """The graph of some of the nodes, outputs always, and the edges between them."""
        keep = nodes | self.nodes.of_kind("output")
        return self._kept(keep, keep[self.edges.source] & keep[self.edges.target])

    def _kept(self, keep: Tensor, kept_edges: Tensor) -> AttributionGraph:
        nodes, edges = subgraph(self.nodes, self.edges, keep, kept_edges)
        return replace(self, nodes=nodes, edges=edges)

    def importance(self, vpd: Decomposition) -> Float[Tensor, "pos C_total"]:
        """Importances of the graph's subcomponents, 0 for all others.

        Raises:
            ArtefactError: If the graph is of another decomposition.
        """
        if self.settings.get("decomposition") not in (None, fingerprint(vpd)):
            raise ArtefactError(
                "this graph is of another decomposition (its V and U have another hash). Trace the "
                "prompt again with vpd_lens.attribute."
            )
        layout, places = vpd.layout, self.nodes.places
        g = torch.zeros(len(self.tokens), layout.total)
        start = torch.tensor([layout.columns(p).start if p in layout.names else 0 for p in places])
        chosen = self.nodes.where(self.nodes.of_kind("subcomponent"))
        g[chosen.position, start[chosen.place] + chosen.index] = chosen.importance
        return g.to(vpd.device)

    def save(self, path: str | Path) -> Path:
        """Write a directory that `load` reads, whole or not at all; an earlier graph is replaced.

        Raises:
            ArtefactError: If something else is there, or the disk does not take it.
            InputError: If `settings` has values that JSON has not.
        """
        elsewhere = {"places": self.nodes.places, "labels": self.labels.record}
        names = GraphRecord.model_fields.keys() - elsewhere.keys()
        own = {name: getattr(self, name) for name in names} | elsewhere
        record = GraphRecord(**own)
        vectors = {f"outputs.{i}": output.vector for i, output in enumerate(self.outputs)}
        tensors = self.nodes.named("nodes") | self.edges.named("edges") | vectors
        return storage.write(path, record, {"graph": tensors})

    @classmethod
    def load(cls, path: str | Path) -> AttributionGraph:
        """Read what `save` wrote.

        Raises:
            ArtefactError: If it is missing, something else, damaged, or too new.
        """
        artefact = storage.read(path, GraphRecord)
        tensors, outputs = artefact.tensors("graph"), artefact.record.outputs
        # Columns of a table are of one length, and vectors of outputs of one width.
        parts = {"nodes": Nodes.columns(), "edges": Edges.columns(), "outputs": range(len(outputs))}
        groups = [[f"{part}.{name}" for name in names] for part, names in parts.items()]
        none = torch.empty(0)
        expected = {name: tensors.get(g[0], none).shape for g in groups for name in g}
        storage.require_shapes(artefact.folder, tensors, expected)
        nodes, edges, vectors = ([tensors[name] for name in names] for names in groups)
        own = dict(artefact.record)
        both = zip(outputs, vectors, strict=True)
        own["labels"] = Labels.of(own["labels"])
        own["outputs"] = tuple(replace(output, vector=vector) for output, vector in both)
        return cls(nodes=Nodes(own.pop("places"), *nodes), edges=Edges(*edges), **own)

    def to_networkx(
        self, loadings: HeadLoadings | None = None, clusters: Clusters | None = None
    ) -> networkx.DiGraph:
        """As a `networkx.DiGraph`, whose nodes are named as here and have their columns.

        With `clusters`, nodes of one position and cluster are one node.
        """
        from vpd_lens.interop.networkx import to_networkx

        return to_networkx(self, loadings, clusters)

    def to_circuit_tracer(
        self,
        folder: str | Path,
        slug: str,
        harvest: Harvest | None = None,
        axis: Literal["site", "block"] = "site",
        node_threshold: float | None = 0.8,
        pairs: Sequence[AttentionPair] | None = None,
        clusters: Clusters | None = None,
    ) -> Path:
        """Write the files of circuit-tracer's local viewer; see `vpd_lens.interop`."""
        from vpd_lens.interop.circuit_tracer import to_circuit_tracer

        settings = harvest, axis, node_threshold, pairs, clusters
        return to_circuit_tracer(self, folder, slug, *settings)

    def to_neuronpedia(
        self,
        path: str | Path,
        model_id: str,
        slug: str,
        pairs: Sequence[AttentionPair] | None = None,
        node_threshold: float | None = 0.8,
        feature_json_base_url: str | None = None,
        clusters: Clusters | None = None,
    ) -> Path:
        """Write a graph for upload to Neuronpedia; see `vpd_lens.interop`."""
        from vpd_lens.interop.neuronpedia import to_neuronpedia

        settings = pairs, node_threshold, feature_json_base_url, clusters
        return to_neuronpedia(self, path, model_id, slug, *settings)

    def to_html(
        self,
        path: str | Path,
        harvest: Harvest | None = None,
        title: str | None = None,
        cards: Cards | None = None,
        loadings: HeadLoadings | None = None,
        clusters: Clusters | None = None,
    ) -> Path:
        """Write one self-contained page to explore the graph on, with a harvest's examples.

        Or with `cards`, `vpd_lens.Cards(model, harvest)`: they also say what the weights read and
        write. `loadings`, of `vpd_lens.analysis.attention.head_loadings`, splits edges over heads;
        `clusters`, of `vpd_lens.cluster`, makes groups of nodes.
        """
        from vpd_lens.viz.graph_page import to_html

        return to_html(self, path, harvest, title, cards, loadings, clusters)

    def summary(self) -> RenderableType:
        """A rich renderable: sizes, scores, outputs and the most influential nodes."""
        from vpd_lens.analysis.circuits.summary import summary

        return summary(self)

    def __rich__(self) -> RenderableType:
        return self.summary()

    def _repr_html_(self) -> str:
        """The summary, and below it the page of `to_html` if the graph is small enough."""
        from vpd_lens.viz.graph_page import inline

        return super()._repr_html_() + inline(self)

    def __repr__(self) -> str:
        n = int(self.nodes.of_kind("subcomponent").sum())
        return (
            f"AttributionGraph({''.join(self.strings)!r}: {n} subcomponents at {len(self.tokens)} "
            f"positions, {len(self.outputs)} outputs, {self.n_edges} edges)"
        )
