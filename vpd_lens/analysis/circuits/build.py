"""Nodes and edges of one prompt, from its cut forward.

`CutForward` holds several copies (rows) of the prompt. A row receives the read directions of some
target nodes as cotangents at its input, and the gradients at the cuts before it are what the
targets' activations change by, per unit of those matrices' outputs. Where nothing between two cuts
mixes positions (everything but attention itself), one row serves a target at every position.

Which edges a pass can find is known beforehand: weights stay on the device until many are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING, POSITIONS, CutForward
from vpd_lens.analysis.circuits.tables import KINDS, Edges, Nodes, subgraph
from vpd_lens.analysis.circuits.targets import Output
from vpd_lens.errors import InputError
from vpd_lens.progress import Progress

# Two ids and a weight, held in parts and once more when these are joined.
BYTES_PER_EDGE = 24
# Candidate edges held on the device, most of them not 0.
MOST_HELD = 2**24


@dataclass
class Contributor:
    """What some nodes at one place contribute, per unit of gradient at the place's output.

    They are subcomponents `index`, with `g a` as `weighted` and `write` directions `[C, d_out]`, or
    vectors `write [pos, d_out]`, one at each position.
    """

    numbers: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    write: Float[Tensor, "m d_out"]
    index: Int[Tensor, " n"] | None = None
    weighted: Float[Tensor, " n"] | None = None

    def weights(self, gradient: Float[Tensor, "row pos d_out"]) -> Float[Tensor, "row n"]:
        """The weight of the edge from each node to each row's target at the node's position."""
        if self.index is None or self.weighted is None:
            return torch.linalg.vecdot(gradient, self.write)[:, : len(self.numbers)]
        at = self.position.to(gradient.device)
        return (gradient @ self.write.T)[:, at, self.index] * self.weighted


def packed(
    numbers: Int[Tensor, "pos C"], one_position: bool
) -> tuple[Int[Tensor, "row pos"], tuple[Tensor, Tensor, Tensor]]:
    """Target nodes of some read directions, distributed over few rows of backward passes.

    Returns the node that a source in a row acts on (-1: none), and of each target its row, position
    and column of `numbers`. With `one_position`, no two targets share a row.
    """
    position, column = (numbers >= 0).nonzero(as_tuple=True)
    node, order = numbers[position, column], torch.arange(len(position))
    if one_position:
        return node[:, None].expand(-1, len(numbers)), (order, position, column)
    count = position.bincount(minlength=len(numbers))
    row = order - (count.cumsum(0) - count)[position]
    table = torch.full((int(count.max()), len(numbers)), -1)
    table[row, position] = node
    return table, (row, position, column)


class EdgeCollector:
    """Edges whose weights wait on the device."""

    def __init__(self) -> None:
        none = torch.zeros(0, dtype=torch.int32)
        self.found, self.n_waiting = [Edges(none, none, torch.zeros(0))], 0
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(
        self,
        nodes: Contributor,
        gradient: Float[Tensor, "row pos d_out"],
        table: Int[Tensor, "row pos"],
    ) -> None:
        """The edges from some nodes to the targets of some rows; see `packed`."""
        weight = nodes.weights(gradient).flatten()
        target = table[:, nodes.position].flatten()
        source = nodes.numbers.expand(len(table), -1).flatten()
        self.waiting.append((source.int(), target.int(), weight))
        self.n_waiting += len(weight)
        if self.n_waiting > MOST_HELD:
            self.fetch()

    def fetch(self) -> None:
        """Move what waits, and is not 0, to the edges found."""
        if self.waiting:
            edges = Edges(*(torch.cat(column).cpu() for column in zip(*self.waiting, strict=True)))
            self.found.append(edges.where((edges.weight != 0) & (edges.target >= 0)))
        self.waiting, self.n_waiting = [], 0


class GraphBuilder:
    """Builds the graph of one prompt, up to its last output; see `attribute` for the settings."""

    def __init__(
        self,
        forward: CutForward,
        tokens: Int[Tensor, " pos"],
        importance: Float[Tensor, "pos C_total"],
        threshold: float,
        outputs: Sequence[Output],
        batch_size: int,
        max_edges: int,
    ) -> None:
        self.forward, self.vpd = forward, forward.vpd
        self.tokens, self.outputs = tokens, outputs
        self.last = max(output.position for output in outputs)
        layout = self.vpd.layout
        g = torch.where(importance > threshold, importance, 0).float()
        g[self.last + 1 :] = 0
        self.importance = dict(zip(layout.names, layout.split(g), strict=True))
        counts = layout.sum_per_site((g > 0).float()).cpu()  # [pos, n_sites]
        self.counts = dict(zip(layout.names, counts.unbind(-1), strict=True))
        self.cost = self._require_small(max_edges)
        # No more rows than the matrix, or the outputs, with most targets can fill.
        rows = [int(n.sum() if self._alone(s) else n.max()) for s, n in self.counts.items()]
        self.copies = min(batch_size, max(1, len(outputs), *rows))
        self.tables: list[Nodes] = []
        self.collector = EdgeCollector()

    def build(self, progress: bool) -> tuple[Nodes, Edges]:
        """All nodes, and the edges between them."""
        self.cut = self.forward(self.tokens, self.copies)
        self.names = (*self.cut.leaves, "output")
        self.places = {name: self._nodes_at(name) for name in self.cut.leaves}
        streams = [self._stream(o.layer)[0, o.position].detach().float() for o in self.outputs]
        values = [x @ o.vector + o.bias for x, o in zip(streams, self.outputs, strict=True)]
        columns = [(o.position, o.token_id, o.probability) for o in self.outputs]
        position, index, probability = map(torch.tensor, zip(*columns, strict=True))
        outputs = self._add("output", "output", position, index, torch.stack(values), probability)
        matrices = [name for name, count in self.counts.items() if bool(count.any())]
        with Progress("Attributing", len(matrices), show=progress, cost=self.cost) as bar:
            for name in bar.counting(matrices):
                own, numbers = self.places[name][0], torch.full(self.importance[name].shape, -1)
                numbers[own.position, own.index.cpu()] = own.numbers  # type: ignore[union-attr]
                x, read = self.cut.inputs[name], self.vpd.v(name).detach()
                self._edges_into(x, numbers, self._alone(name), read)
        self._edges_into_outputs(outputs)
        self.collector.fetch()
        nodes, edges = Nodes.concatenated(self.tables), Edges.concatenated(self.collector.found)
        # What contributes nothing to anything goes, unless it is a subcomponent or an output.
        used = nodes.of_kind("subcomponent", "output", "embedding")
        used[edges.source] = True
        return subgraph(nodes, edges, used, torch.ones(len(edges.weight), dtype=torch.bool))

    def _alone(self, name: str) -> bool:
        """Whether a target of this matrix needs a row of its own."""
        return self.forward.mixes_positions or name.endswith(".attn.o")

    def _require_small(self, max_edges: int) -> str:
        """At most so many edges as there are pairs of nodes that a path may join, in words."""
        before = torch.full((len(self.tokens),), 2.0)  # embedding and position
        estimate, of_layer = 0.0, {}
        for name in (site.name for site in self.forward.sites):
            if name not in self.counts:
                before = before + 2  # its bias, and that of a norm or of neurons
                continue
            prefix, _, part = name.rpartition(".")
            reads = [of_layer.get(f"{prefix}.{p}") for p in "qkv"]
            if part == "o" and None not in reads and not self.forward.mixes_positions:
                sources = torch.stack(reads).sum(0).cumsum(0)  # type: ignore[arg-type]
            else:
                sources = before.cumsum(0) if self._alone(name) else before
            estimate += float((self.counts[name] * sources).sum())
            # Error, delta and bias of the matrix, and the bias of a norm or of neurons.
            of_layer[name] = self.counts[name] + 4
            before = before + of_layer[name]
        reached = before.cumsum(0) if self.forward.mixes_positions else before
        estimate += sum(float(reached[output.position]) for output in self.outputs)
        size = f"about {estimate * BYTES_PER_EDGE / 2**30:.1g} GiB"
        if estimate > max_edges:
            raise InputError(
                f"the graph may have {estimate:,.0f} edges ({size}), more than max_edges="
                f"{max_edges:,}. Raise threshold, prune to a behaviour (prune='adversarial'), "
                "use a shorter prompt, or raise max_edges."
            )
        matrices = sum(bool(count.any()) for count in self.counts.values())
        return f"at most {estimate:,.0f} edges ({size}), into {matrices} matrices and the outputs"

    def _nodes_at(self, name: str) -> list[Contributor]:
        """The nodes at one matrix, norm or `embed`; of a decomposed matrix, subcomponents first."""
        found: list[Contributor] = []
        # What goes into the place's output whatever the subcomponents do, by kind of node.
        vectors = {"embedding": self.cut.embeddings[0].float()} if name == EMBEDDING else {}
        constant = self.cut.constants.get(name)
        if constant is not None and bool(constant.any()):
            kind = "position" if name in (EMBEDDING, POSITIONS) else "bias"
            vectors[kind] = constant.float().expand(len(self.tokens), -1)
        if name in self.importance:
            g = self.importance[name]
            x = self.cut.inputs[name][0].detach().float()
            acts = x @ self.vpd.v(name).detach()
            write = self.vpd.u(name).detach()
            position, index = (g > 0).nonzero(as_tuple=True)
            a, importance = acts[position, index], g[position, index]
            numbers = self._add("subcomponent", name, position, index, a, importance)
            found.append(Contributor(numbers, position.cpu(), write, index, importance * a))
            vectors["error"] = ((1 - g) * acts) @ write
            if not self.forward.through_delta:
                vectors["delta"] = x @ self.vpd.delta(name)
        for kind, vector in vectors.items():
            norm, embedded = vector[: self.last + 1].norm(dim=-1), kind == "embedding"
            position = torch.arange(len(norm))
            index = self.tokens[: len(norm)] if embedded else torch.full_like(position, -1)
            importance = torch.full_like(norm, float(embedded))
            numbers = self._add(kind, name, position, index, norm, importance)
            found.append(Contributor(numbers, position, vector))
        return found

    def _add(
        self,
        kind: str,
        place: str,
        position: Int[Tensor, " n"],
        index: Int[Tensor, " n"],
        activation: Float[Tensor, " n"],
        importance: Float[Tensor, " n"],
    ) -> Int[Tensor, " n"]:
        """Add nodes of one kind at one place, and return their numbers."""
        position, index, first = position.cpu(), index.cpu(), sum(map(len, self.tables))
        numbers = KINDS.index(kind), self.names.index(place)
        same = (torch.full_like(position, number) for number in numbers)
        floats = activation.float().cpu(), importance.float().cpu()
        self.tables.append(Nodes(self.names, *same, position, index, *floats))
        return torch.arange(len(position)) + first

    def _stream(self, layer: int | None) -> Float[Tensor, "row pos d_model"]:
        return self.cut.inputs["unembed"] if layer is None else self.cut.residuals[layer]

    def _edges_into(
        self,
        x: Float[Tensor, "row pos d_in"],
        numbers: Int[Tensor, "pos C"],
        alone: bool,
        read: Float[Tensor, "d_in C"],
    ) -> None:
        """Edges into target nodes that read `x`; see `packed`."""
        leaves = list(self.cut.leaves.values())
        all_rows, columns = packed(numbers, alone)
        for start in range(0, len(all_rows), self.copies):
            table = all_rows[start : start + self.copies]
            here = (columns[0] >= start) & (columns[0] < start + self.copies)
            row, position, column = (c[here].to(x.device) for c in columns)
            cotangents = torch.zeros_like(x)
            cotangents[row - start, position] = read.T[column].to(x.dtype)
            grads = torch.autograd.grad(x, leaves, cotangents, retain_graph=True, allow_unused=True)
            for found, gradient in zip(self.places.values(), grads, strict=True):
                for nodes in found if gradient is not None else ():
                    self.collector.add(nodes, gradient[: len(table)].float(), table)

    def _edges_into_outputs(self, numbers: Int[Tensor, " n_outputs"]) -> None:
        streams: dict[int | None, list[tuple[int, int, Tensor]]] = defaultdict(list)
        for node, output in zip(numbers.tolist(), self.outputs, strict=True):
            vector, position = output.vector, output.position
            if tokens := list(output.tokens):
                # From the unembedding's bias and, if it is decomposed, its subcomponents.
                coefficients = vector.new_tensor(list(output.tokens.values()))
                width = self.cut.leaves["unembed"].shape[-1]
                gradient = vector.new_zeros(1, len(self.tokens), width)
                gradient[0, position, tokens] = coefficients
                table = torch.full((1, len(self.tokens)), -1)
                table[0, position] = node
                for nodes in self.places["unembed"]:
                    self.collector.add(nodes, gradient, table)
                if "unembed" in self.forward.decomposed:
                    if not self.forward.through_delta:
                        continue
                    vector = self.vpd.delta("unembed")[:, tokens] @ coefficients
            streams[output.layer].append((node, position, vector))
        for layer, members in streams.items():
            nodes, positions, vectors = zip(*members, strict=True)
            table = torch.full((len(self.tokens), len(members)), -1)
            table[torch.tensor(positions), torch.arange(len(nodes))] = torch.tensor(nodes)
            read = torch.stack(vectors, dim=1)
            self._edges_into(self._stream(layer), table, self.forward.mixes_positions, read)
