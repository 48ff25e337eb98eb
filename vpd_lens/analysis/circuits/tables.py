"""The nodes and edges of an attribution graph, as columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vpd_lens.errors import InputError

KINDS = ("embedding", "position", "subcomponent", "error", "delta", "bias", "output")

T = TypeVar("T", bound="_Table")


@dataclass
class _Table:
    """Columns of equal length: every field of a subclass but `places`."""

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the columns."""
        return [field.name for field in fields(cls) if field.name != "places"]

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The columns by name, each with a prefix."""
        return {f"{prefix}.{name}": getattr(self, name) for name in self.columns()}

    def where(self: T, keep: Bool[Tensor, " n"] | Int[Tensor, " m"]) -> T:
        """Some of the rows."""
        return replace(self, **{name: getattr(self, name)[keep] for name in self.columns()})

    @classmethod
    def concatenated(cls: type[T], parts: Sequence[T]) -> T:
        """Several tables, one below the other."""
        columns = {n: torch.cat([getattr(part, n) for part in parts]) for n in cls.columns()}
        return replace(parts[0], **columns)


@dataclass
class Nodes(_Table):
    """Nodes as columns of equal length.

    | kind | what it stands for | its activation |
    |---|---|---|
    | `embedding` | the token's embedding at a position | norm |
    | `position` | what else the residual stream begins with (position embeddings) | norm |
    | `subcomponent` | a subcomponent at a position | `a_c = x V_c` |
    | `error` | what subcomponents write beyond their importance (below) | norm |
    | `delta` | a matrix' output through its delta, `x Delta` | norm |
    | `bias` | a bias of a matrix, a norm or an activation function | norm |
    | `output` | a logit, a difference of logits, or a direction | its value |

    The error of a matrix is `sum_c (1 - g_c) a_c U_c`, where `g` is 0 for those that are no nodes.

    Attributes:
        places: Names of matrices, norms and `embed`, in the order of the forward pass.
        kind: Index into `KINDS`.
        place: Index into `places`; outputs belong to the last.
        position: Token of the prompt.
        index: Subcomponent, or token id of an embedding or output (-1 for other outputs).
        activation: See the table.
        importance: Causal importance of a subcomponent, probability of an output, 1 for an
            embedding, 0 otherwise.
    """

    places: tuple[str, ...]
    kind: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    index: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    importance: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.kind)

    def of_kind(self, *kinds: str) -> Bool[Tensor, " n"]:
        """Which nodes are of one of these kinds."""
        return torch.isin(self.kind, torch.tensor([KINDS.index(kind) for kind in kinds]))

    def name(self, node: int) -> str:
        """A node's name, such as `blocks.0.mlp.in:31@5` or `blocks.0.mlp.in.error@5`."""
        kind, place = KINDS[int(self.kind[node])], self.places[int(self.place[node])]
        index, position = int(self.index[node]), int(self.position[node])
        if kind == "output" and index < 0:  # no logit of one token: named by its order
            index = f"#{node - int(self.of_kind('output').nonzero()[0, 0])}"
        labels = {
            "subcomponent": f"{place}:{index}",
            "embedding": "embed",
            "position": "embed.position",
            "output": f"output:{index}",
        }
        return f"{labels.get(kind, f'{place}.{kind}')}@{position}"

    def names(self) -> list[str]:
        """Names of all nodes."""
        return [self.name(node) for node in range(len(self))]

    def lists(self) -> dict[str, list[Any]]:
        """The columns as lists, with names, and with kinds and sites as text."""
        plain = ("position", "index", "activation", "importance")
        return {
            "name": self.names(),
            "kind": [KINDS[kind] for kind in self.kind.tolist()],
            "site": [self.places[place] for place in self.place.tolist()],
            **{name: getattr(self, name).tolist() for name in plain},
        }

    def find(self, name: str | int) -> int:
        """The node of this name.

        Raises:
            InputError: If there is none.
        """
        if isinstance(name, int):
            if not -len(self) <= name < len(self):
                raise InputError(f"node {name}: the graph has {len(self)} nodes.")
            return name % len(self)
        at = re.search(r"@(\d+)$", name)
        for node in (self.position == int(at[1])).nonzero()[:, 0].tolist() if at else ():
            if self.name(node) == name:
                return node
        raise InputError(
            f"no node named {name!r} in this graph; names are like 'blocks.0.mlp.in:31@5' "
            "(site:subcomponent@position), 'embed@5' and 'output:17@5'."
        )


@dataclass
class Edges(_Table):
    """Edges as columns: from node, to node, weight."""

    source: Int[Tensor, " n_edges"]
    target: Int[Tensor, " n_edges"]
    weight: Float[Tensor, " n_edges"]


def subgraph(
    nodes: Nodes, edges: Edges, keep: Bool[Tensor, " n_nodes"], kept_edges: Bool[Tensor, " n_edges"]
) -> tuple[Nodes, Edges]:
    """Some nodes, numbered anew, and some edges between them."""
    number, edges = (keep.cumsum(0) - 1).int(), edges.where(kept_edges)
    return nodes.where(keep), Edges(number[edges.source], number[edges.target], edges.weight)


@dataclass(frozen=True)
class AttentionPair:
    """What one pair of nodes, `query` and `key`, adds to one attention score before the softmax.

    Nodes are named as in `Nodes`: `blocks.1.attn.q:31@5`, `blocks.1.attn.k:8@2`.
    """

    layer: int
    head: int
    query_position: int
    key_position: int
    query: str
    key: str
    weight: float
