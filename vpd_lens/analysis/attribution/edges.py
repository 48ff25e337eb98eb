"""Edges into the nodes of one matrix, many targets per backward pass.

The forward pass holds several copies (rows) of the prompt. A row receives the read directions of
some target nodes as cotangents at its input, and the gradients at the cuts before it are what the
targets' activations change by, per unit of those matrices' outputs. Where nothing between two
cuts mixes positions (everything but attention itself), one row serves a target at every position
of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vpd_lens.analysis.attribution.cut_forward import Cut


@dataclass
class Sources:
    """What the nodes at one place contribute, per unit of gradient at the place's output.

    Attributes:
        place: Name of the matrix, norm or `embed`.
        nodes: Node of each subcomponent at each position, `[pos, C]`, or -1; `None` at places
            without subcomponents.
        weighted: `g a` of every subcomponent that is a node, `[pos, C]`.
        write: Write directions `[C, d_out]`.
        vectors: What other nodes at this place put into the output, by kind, `[pos, d_out]`.
        vector_nodes: Their nodes, `[pos]`.
    """

    place: str
    nodes: Int[Tensor, "pos C"] | None = None
    weighted: Float[Tensor, "pos C"] | None = None
    write: Float[Tensor, "C d_out"] | None = None
    vectors: dict[str, Float[Tensor, "pos d_out"]] = field(default_factory=dict)
    vector_nodes: dict[str, Int[Tensor, " pos"]] = field(default_factory=dict)

    def at(self, position: int) -> Sources:
        """The sources at one position."""
        here = slice(position, position + 1)
        return replace(
            self,
            nodes=None if self.nodes is None else self.nodes[here],
            weighted=None if self.weighted is None else self.weighted[here],
            vectors={kind: vector[here] for kind, vector in self.vectors.items()},
            vector_nodes={kind: nodes[here] for kind, nodes in self.vector_nodes.items()},
        )


@dataclass
class Edges:
    """Edges as columns: from node, to node, weight."""

    source: Int[Tensor, " n_edges"]
    target: Int[Tensor, " n_edges"]
    weight: Float[Tensor, " n_edges"]

    @classmethod
    def concatenated(cls, parts: list[Edges]) -> Edges:
        """All edges of several parts."""
        if not parts:
            empty = torch.zeros(0, dtype=torch.int32)
            return cls(empty, empty.clone(), torch.zeros(0))
        return cls(*(torch.cat([getattr(p, n) for p in parts]) for n in cls.__annotations__))


@dataclass
class Row:
    """Cotangents of one copy of the prompt, and the nodes they belong to.

    Attributes:
        targets: Target node at each position, or -1.
        columns: Which read direction each of them has.
    """

    targets: Int[Tensor, " pos"]
    columns: Int[Tensor, " pos"]


def packed_rows(nodes: Int[Tensor, "pos C"], one_position: bool) -> list[Row]:
    """Rows that cover all target nodes of a matrix.

    Args:
        nodes: Node of each subcomponent at each position, or -1.
        one_position: Give each target a row of its own, because its sources lie at other
            positions too.
    """
    if one_position:
        where = (nodes >= 0).nonzero()
        rows = []
        for position, column in where.tolist():
            targets = torch.full((len(nodes),), -1)
            targets[position] = nodes[position, column]
            rows.append(Row(targets, torch.full((len(nodes),), column)))
        return rows
    depth = int((nodes >= 0).sum(1).max()) if len(nodes) else 0
    # At each position the targets first, in order; row r takes the r-th of them.
    order = (nodes >= 0).int().argsort(dim=1, descending=True, stable=True)
    columns = order[:, :depth].T
    return [Row(nodes.gather(1, column[:, None])[:, 0], column) for column in columns]


def edges_into(
    cut: Cut,
    x: Float[Tensor, "row pos d_in"],
    rows: list[Row],
    read: Float[Tensor, "d_in C"],
    sources: list[Sources],
) -> Iterator[Edges]:
    """Edges into the target nodes of one matrix, one part per backward pass.

    Args:
        cut: The forward pass.
        x: What the targets read, with graph.
        rows: Which targets.
        read: Their read directions.
        sources: All nodes that may be sources.
    """
    n_rows = x.shape[0]
    leaves = [cut.leaves[source.place] for source in sources]
    for start in range(0, len(rows), n_rows):
        chunk = rows[start : start + n_rows]
        targets = torch.stack([row.targets for row in chunk])
        columns = torch.stack([row.columns for row in chunk])
        cotangents = torch.zeros_like(x)
        wanted = (targets >= 0).to(x.device)
        directions = read.T[columns.to(read.device)].to(x.dtype)
        cotangents[: len(chunk)] = directions * wanted.unsqueeze(-1)
        gradients = torch.autograd.grad(x, leaves, cotangents, retain_graph=True, allow_unused=True)
        for source, gradient in zip(sources, gradients, strict=True):
            if gradient is not None:
                yield from contributions(source, gradient[: len(chunk)], targets)


def contributions(
    source: Sources, gradient: Float[Tensor, "row pos d_out"], targets: Int[Tensor, "row pos"]
) -> Iterator[Edges]:
    """Edges from the nodes of one place.

    Args:
        source: The place.
        gradient: Of the targets, at the place's output.
        targets: Target node at each position, or -1.
    """
    gradient = gradient.float()
    if source.nodes is not None:
        assert source.write is not None
        assert source.weighted is not None
        weight = (gradient @ source.write.T) * source.weighted
        weight.masked_fill_((source.nodes < 0).to(weight.device), 0)
        yield _nonzero(weight, source.nodes, targets)
    for kind, vector in source.vectors.items():
        weight = torch.linalg.vecdot(gradient, vector)
        yield _nonzero(weight.unsqueeze(-1), source.vector_nodes[kind][:, None], targets)


def _nonzero(
    weight: Float[Tensor, "row pos n"], nodes: Int[Tensor, "pos n"], targets: Int[Tensor, "row pos"]
) -> Edges:
    weight = weight.cpu()
    row, position, column = weight.nonzero(as_tuple=True)
    # A row with several targets has them at different positions, each with its own sources.
    alone = (targets >= 0).sum(1) == 1
    only = targets.max(1).values
    target = torch.where(alone[row], only[row], targets[row, position])
    keep = target >= 0
    return Edges(
        nodes[position, column][keep].int(),
        target[keep].int(),
        weight[row, position, column][keep],
    )
