"""What ablating a node would do to an output, as far as a graph can tell.

Edges are local: `w / (a_s g_s)` is the derivative of the target's activation by the source's. The
total derivative of an output by a node is the sum over all paths of products of these, and the
node's activation times it is the output's change, to first order, when the node is ablated.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_matrix
from torch import Tensor

from vpd_lens.analysis.attribution.edges import Edges
from vpd_lens.analysis.attribution.nodes import Nodes


def total_effects(nodes: Nodes, edges: Edges, output: int) -> Float[Tensor, " n_nodes"]:
    """The part of an output that each subcomponent accounts for, along all paths.

    Args:
        nodes: The nodes of a graph.
        edges: Its edges.
        output: Number of the output node.

    Returns:
        `a_s d(output)/d(a_s)` for subcomponents, NaN for other nodes. Effects of nodes on one path
        overlap, so they do not add up to the output.
    """
    inner = nodes.of_kind("subcomponent")
    source, target = edges.source.long(), edges.target.long()
    kept = inner[source]
    scale = (nodes.activation * nodes.importance).double()[source[kept]]
    slopes = (edges.weight[kept].double() / scale).numpy()
    n = len(nodes)
    jacobian = csr_matrix((slopes, (target[kept].numpy(), source[kept].numpy())), shape=(n, n))
    total = np.zeros(n)
    wave = np.zeros(n)
    wave[output] = 1
    for _ in range(len(nodes.places) + 1):  # a path visits each place at most once
        wave = wave @ jacobian
        if not wave.any():
            break
        total += wave
    effects = torch.from_numpy(total) * nodes.activation.double()
    return torch.where(inner, effects, torch.nan).float()
