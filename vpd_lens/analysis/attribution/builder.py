"""Nodes and edges of one prompt, from one forward pass cut at the matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor

from vpd_lens.analysis.attribution.cut_forward import (
    EMBEDDING,
    POSITIONS,
    Cut,
    CutForward,
)
from vpd_lens.analysis.attribution.edges import (
    Edges,
    Sources,
    contributions,
    edges_into,
    packed_rows,
)
from vpd_lens.analysis.attribution.nodes import KINDS, SUBCOMPONENT, Nodes
from vpd_lens.analysis.targets import Output
from vpd_lens.errors import InputError

OUTPUTS = "output"
# Two ids and a weight, held in parts and once more when these are joined.
BYTES_PER_EDGE = 24


class GraphBuilder:
    """Builds the graph of one prompt.

    Args:
        forward: How the model is cut.
        tokens: The prompt.
        importance: Causal importances, `[pos, C_total]`.
        threshold: Subcomponents with an importance above it are nodes.
        batch_size: Copies of the prompt in one backward pass.
        max_edges: Limit of the number of edges.
    """

    def __init__(
        self,
        forward: CutForward,
        tokens: Int[Tensor, " pos"],
        importance: Float[Tensor, "pos C_total"],
        threshold: float,
        batch_size: int,
        max_edges: int,
    ) -> None:
        self.forward, self.vpd = forward, forward.vpd
        self.tokens, self.threshold = tokens, threshold
        self.importance = importance
        self.batch_size, self.max_edges = batch_size, max_edges

    def build(self, outputs: list[Output], progress: bool) -> tuple[Nodes, Edges]:
        """All nodes, and the edges between them.

        Args:
            outputs: The output nodes.
            progress: Show a progress bar.

        Raises:
            InputError: If the graph may become too large.
        """
        layout = self.vpd.layout
        last = max(output.position for output in outputs)
        g = torch.where(self.importance > self.threshold, self.importance, 0)
        g[last + 1 :] = 0
        alive = dict(zip(layout.names, (part > 0 for part in layout.split(g)), strict=True))
        self._require_small(alive, outputs)
        cut = self.forward(self.tokens, self.batch_size)
        places = (*cut.leaves, OUTPUTS)
        nodes, sources = self._sources(cut, places, g, last)
        first_output = len(nodes)
        nodes = Nodes.concatenated(places, [nodes, self._outputs(cut, places, outputs)])
        parts: list[Edges] = []
        with Progress(disable=not progress, transient=True) as bar:
            names = [name for name in layout.names if bool(alive[name].any())]
            task = bar.add_task("Attributing", total=len(names) + 1)
            for name in names:
                grid = next(s.nodes for s in sources if s.place == name)
                assert grid is not None
                alone = self.forward.mixes_positions or name.endswith(".attn.o")
                rows = packed_rows(grid, alone)
                read = self.vpd.v(name).detach()
                parts += edges_into(cut, cut.inputs[name], rows, read, sources)
                bar.advance(task)
            parts += self._edges_into_outputs(cut, outputs, first_output, sources)
            bar.advance(task)
        edges = Edges.concatenated(parts)
        return _without_idle(nodes, edges)

    def _require_small(self, alive: dict[str, Tensor], outputs: list[Output]) -> None:
        """At most so many edges as there are pairs of nodes that a path may join."""
        before = torch.full((len(self.tokens),), 2.0)  # embedding and position
        estimate, of_layer = 0.0, {}
        for name in (site.name for site in self.forward.sites):
            if name not in alive:
                before = before + 2  # its bias, and that of a norm or of neurons
                continue
            targets = alive[name].sum(1).cpu().float()
            prefix, _, part = name.rpartition(".")
            reads = [of_layer.get(f"{prefix}.{p}") for p in "qkv"]
            if part == "o" and None not in reads and not self.forward.mixes_positions:
                sources = torch.stack(reads).sum(0).cumsum(0)  # type: ignore[arg-type]
            elif part == "o" or self.forward.mixes_positions:
                sources = before.cumsum(0)
            else:
                sources = before
            estimate += float((targets * sources).sum())
            # Error, delta and bias of the matrix, and the bias of a norm or of neurons.
            of_layer[name] = targets + 4
            before = before + of_layer[name]
        reached = before.cumsum(0) if self.forward.mixes_positions else before
        estimate += sum(float(reached[output.position]) for output in outputs)
        if estimate > self.max_edges:
            raise InputError(
                f"the graph may have {estimate:,.0f} edges (about "
                f"{estimate * BYTES_PER_EDGE / 2**30:.1f} GiB), more than max_edges="
                f"{self.max_edges:,}. Raise threshold, prune to a behaviour (prune='adversarial'), "
                "use a shorter prompt, or raise max_edges."
            )

    # ------------------------------------------------------------------ nodes

    def _sources(
        self, cut: Cut, places: tuple[str, ...], g: Tensor, last: int
    ) -> tuple[Nodes, list[Sources]]:
        tables: list[Nodes] = []
        sources: list[Sources] = []
        importances = dict(
            zip(self.vpd.layout.names, self.vpd.layout.split(g.float()), strict=True)
        )
        count = 0
        for index, place in enumerate(places[:-1]):
            source = Sources(place, vectors=self._vectors(cut, place))
            if place in importances:
                own = importances[place]
                acts = self._add_subcomponents(cut, source, own)
                source.nodes, table = self._subcomponents(index, own, acts, count)
                tables.append(table)
                count += len(table)
            for kind, vector in source.vectors.items():
                source.vector_nodes[kind], table = self._vector_table(
                    index, kind, vector[: last + 1], count
                )
                tables.append(table)
                count += len(table)
            sources.append(source)
        return Nodes.concatenated(places, tables), sources

    def _vectors(self, cut: Cut, place: str) -> dict[str, Tensor]:
        """What goes into a place's output without being a subcomponent of it."""
        if place == EMBEDDING:
            rest = {} if cut.positions is None else {"position": cut.positions.float()}
            return {"embedding": cut.embeddings.float(), **rest}
        constant = cut.constants.get(place)
        if constant is None or not bool(constant.any()):
            return {}
        kind = "position" if place == POSITIONS else "bias"
        return {kind: constant.float().expand(len(self.tokens), -1)}

    def _add_subcomponents(self, cut: Cut, source: Sources, g: Float[Tensor, "pos C"]) -> Tensor:
        x = cut.inputs[source.place][0].detach().float()
        acts = x @ self.vpd.v(source.place).detach()
        source.write = self.vpd.u(source.place).detach()
        source.weighted = g * acts
        source.vectors["error"] = ((1 - g) * acts) @ source.write
        if not self.forward.through_delta:
            source.vectors["delta"] = x @ self.vpd.delta(source.place)
        return acts

    def _subcomponents(
        self, place: int, g: Float[Tensor, "pos C"], acts: Float[Tensor, "pos C"], count: int
    ) -> tuple[Int[Tensor, "pos C"], Nodes]:
        position, index = (g > 0).nonzero(as_tuple=True)
        grid = torch.full(g.shape, -1)
        numbers = count + torch.arange(len(position))
        grid[position.cpu(), index.cpu()] = numbers
        kept = acts[position, index].cpu(), g[position, index].cpu()
        return grid, _table(SUBCOMPONENT, place, position.cpu(), index.cpu(), *kept)

    def _vector_table(
        self, place: int, kind: str, vector: Float[Tensor, "pos d"], count: int
    ) -> tuple[Int[Tensor, " all_pos"], Nodes]:
        position = torch.arange(len(vector))
        numbers = torch.full((len(self.tokens),), -1)
        numbers[: len(vector)] = count + position
        embedded = kind == "embedding"
        index = self.tokens[: len(vector)].cpu() if embedded else torch.full_like(position, -1)
        norm = vector.norm(dim=-1).cpu()
        importance = torch.full_like(norm, float(embedded))
        return numbers, _table(KINDS.index(kind), place, position, index, norm, importance)

    def _outputs(self, cut: Cut, places: tuple[str, ...], outputs: list[Output]) -> Nodes:
        values = [
            float(
                self._stream(cut, output.layer)[0, output.position].detach().float() @ output.vector
            )
            + output.bias
            for output in outputs
        ]
        return _table(
            KINDS.index("output"),
            len(places) - 1,
            torch.tensor([output.position for output in outputs]),
            torch.tensor([output.token_id for output in outputs]),
            torch.tensor(values),
            torch.tensor([output.probability for output in outputs]),
        )

    # ---------------------------------------------------------------- outputs

    def _stream(self, cut: Cut, layer: int | None) -> Tensor:
        return cut.inputs["unembed"] if layer is None else cut.residuals[layer]

    def _edges_into_outputs(
        self, cut: Cut, outputs: list[Output], first: int, sources: list[Sources]
    ) -> Iterator[Edges]:
        unembed = next(source for source in sources if source.place == "unembed")
        streams: dict[int | None, list[tuple[int, int, Tensor]]] = {}
        for node, output in enumerate(outputs, first):
            vector: Tensor | None = output.vector
            if output.tokens:
                yield from self._edges_from_unembed(cut, output, node, unembed)
                vector = self._vector_past_unembed(output)
            if vector is not None:
                streams.setdefault(output.layer, []).append((node, output.position, vector))
        for layer, members in streams.items():
            grid = torch.full((len(self.tokens), len(members)), -1)
            for column, (node, position, _) in enumerate(members):
                grid[position, column] = node
            read = torch.stack([vector for _, _, vector in members], dim=1)
            rows = packed_rows(grid, self.forward.mixes_positions)
            yield from edges_into(cut, self._stream(cut, layer), rows, read, sources)

    def _edges_from_unembed(
        self, cut: Cut, output: Output, node: int, unembed: Sources
    ) -> Iterator[Edges]:
        """From the unembedding's bias and, if it is decomposed, its subcomponents."""
        at = output.position
        gradient = torch.zeros_like(cut.leaves["unembed"][:1, at : at + 1])
        for token, coefficient in output.tokens.items():
            gradient[..., token] = coefficient
        return contributions(unembed.at(at), gradient, torch.tensor([[node]]))

    def _vector_past_unembed(self, output: Output) -> Tensor | None:
        """What of a logit's vector is not cut at the unembedding; `None` for nothing."""
        if "unembed" not in self.forward.decomposed:
            return output.vector
        if not self.forward.through_delta:
            return None
        coefficients = output.vector.new_tensor(list(output.tokens.values()))
        return self.vpd.delta("unembed")[:, list(output.tokens)] @ coefficients


def _table(
    kind: int, place: int, position: Tensor, index: Tensor, acts: Tensor, importance: Tensor
) -> Nodes:
    same = torch.full_like(position, kind), torch.full_like(position, place)
    return Nodes((), *same, position, index, acts.float(), importance.float())


def _without_idle(nodes: Nodes, edges: Edges) -> tuple[Nodes, Edges]:
    """Drop what contributes nothing to anything, unless it is a subcomponent or an output."""
    used = nodes.of_kind("subcomponent", "output", "embedding")
    used[edges.source.long()] = True
    renumbered = (used.cumsum(0) - 1).int()
    source, target = renumbered[edges.source.long()], renumbered[edges.target.long()]
    return nodes.where(used), Edges(source, target, edges.weight)
