"""What a query subcomponent and a key subcomponent contribute to an attention score."""

from __future__ import annotations

from dataclasses import dataclass


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
