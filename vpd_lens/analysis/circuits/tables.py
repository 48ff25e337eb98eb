"""The nodes and edges of an attribution graph, as columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vpd_lens.errors import InputError

KINDS = ("embedding", "position", "subcomponent", "error", "delta", "bias", "output")


@dataclass
class Nodes:
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

    def where(self, keep: Bool[Tensor, " n"] | Int[Tensor, " m"]) -> Nodes:
        """Some of the nodes."""
        columns = {name: getattr(self, name)[keep] for name in self.columns()}
        return Nodes(self.places, **columns)

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the columns."""
        return [field.name for field in fields(cls) if field.name != "places"]

    @classmethod
    def concatenated(cls, places: tuple[str, ...], parts: Sequence[Nodes]) -> Nodes:
        """Several tables, one below the other."""
        columns = {n: torch.cat([getattr(part, n) for part in parts]) for n in cls.columns()}
        return cls(places, **columns)

    def name(self, node: int) -> str:
        """A node's name, such as `blocks.0.mlp.in:31@5` or `blocks.0.mlp.in.error@5`."""
        kind, place = KINDS[int(self.kind[node])], self.places[int(self.place[node])]
        position = int(self.position[node])
        if kind == "subcomponent":
            return f"{place}:{int(self.index[node])}@{position}"
        if kind == "embedding":
            return f"embed@{position}"
        if kind == "position":
            return f"embed.position@{position}"
        if kind == "output":
            # Logits by their token; others, whose index is -1, by their order.
            index = int(self.index[node])
            first = int(self.of_kind("output").nonzero()[0, 0])
            return f"output:{index if index >= 0 else f'#{node - first}'}@{position}"
        return f"{place}.{kind}@{position}"

    def names(self) -> list[str]:
        """Names of all nodes."""
        return [self.name(node) for node in range(len(self))]

    def find(self, name: str | int) -> int:
        """The node of this name.

        Raises:
            InputError: If there is none.
        """
        if isinstance(name, int):
            if not -len(self) <= name < len(self):
                raise InputError(f"node {name}: the graph has {len(self)} nodes.")
            return name % len(self)
        match = re.fullmatch(r"(.+?)(?::#?(-?\d+))?@(\d+)", name)
        if match is not None:
            for node in (self.position == int(match[3])).nonzero()[:, 0].tolist():
                if self.name(node) == name:
                    return node
        raise InputError(
            f"no node named {name!r} in this graph; names are like 'blocks.0.mlp.in:31@5' "
            "(site:subcomponent@position), 'embed@5' and 'output:17@5'."
        )


@dataclass
class Edges:
    """Edges as columns: from node, to node, weight."""

    source: Int[Tensor, " n_edges"]
    target: Int[Tensor, " n_edges"]
    weight: Float[Tensor, " n_edges"]

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the columns."""
        return [field.name for field in fields(cls)]

    @classmethod
    def concatenated(cls, parts: Sequence[Edges]) -> Edges:
        """Several tables, one below the other."""
        if not parts:
            empty = torch.zeros(0, dtype=torch.int32)
            return cls(empty, empty.clone(), torch.zeros(0))
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in cls.columns()))


@dataclass(frozen=True)
class AttentionPair:
    """The contribution of one pair of nodes to one pre-softmax attention score.

    Attributes:
        layer: Block.
        head: Attention head.
        query_position: Token that attends.
        key_position: Token that is attended to.
        query: Name of the query's node, such as `blocks.1.attn.q:31@5`.
        key: Name of the key's node, such as `blocks.1.attn.k:8@2`.
        weight: What the pair adds to the score.
    """

    layer: int
    head: int
    query_position: int
    key_position: int
    query: str
    key: str
    weight: float
