"""The toy networks: TMS and the residual MLP, plain modules whose linear layers are the sites."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class TMS(nn.Module):
    """Toy model of superposition: `relu(h(x W) W^T + b)`, with fewer hidden units than features.

    The two matrices are one while the target is trained (`forward_tied`). `untie` then gives the
    second layer a copy of its own: a decomposition treats the layers as separate sites.
    From Elhage et al. 2022 (arXiv:2209.10652), as decomposed in SPD (arXiv:2506.20790).

    Args:
        n_features: Number of features `n`.
        d_hidden: Hidden units `m`.
        identity: Whether a fixed identity layer `h` lies between the two (`tms-...-id`).

    Attributes:
        linear1: `[n, m]`, no bias.
        hidden: The identity `[m, m]`, or `None`.
        linear2: `[m, n]`, with a bias.
    """

    def __init__(self, n_features: int, d_hidden: int, identity: bool = False) -> None:
        super().__init__()
        self.linear1 = nn.Linear(n_features, d_hidden, bias=False)
        self.hidden = nn.Linear(d_hidden, d_hidden, bias=False) if identity else None
        self.linear2 = nn.Linear(d_hidden, n_features)
        nn.init.xavier_normal_(self.linear1.weight)
        nn.init.zeros_(self.linear2.bias)
        if self.hidden is not None:
            nn.init.eye_(self.hidden.weight)
        self.untie()

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """The network, layer by layer."""
        h = self.linear1(x)
        if self.hidden is not None:
            h = self.hidden(h)
        return F.relu(self.linear2(h))

    def forward_tied(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """The same function of `linear1.weight` and the bias alone."""
        w = self.linear1.weight
        return F.relu(F.linear(x @ w.T, w.T, self.linear2.bias))

    @torch.no_grad()
    def untie(self) -> None:
        """Copy the transposed first matrix into the second layer."""
        self.linear2.weight.copy_(self.linear1.weight.T)


class ResidualMLP(nn.Module):
    """Residual MLP blocks between a fixed random embedding and its transpose.

    `r = x W_E; r += relu(r W_in) W_out` per block; the output is `r W_E^T`. The rows of `W_E` are
    random unit vectors. From APD (arXiv:2501.14926) and SPD.

    Args:
        n_features: Number of features `n`.
        d_embed: Width of the residual stream.
        d_mlp: Neurons of each block.
        n_layers: Number of blocks.

    Attributes:
        embedding: `W_E [n, d_embed]`, never trained.
        layers: The blocks; each has `mlp_in` and `mlp_out`, without biases.
    """

    embedding: Tensor

    def __init__(self, n_features: int, d_embed: int, d_mlp: int, n_layers: int) -> None:
        super().__init__()
        directions = F.normalize(torch.randn(n_features, d_embed), dim=-1)
        self.register_buffer("embedding", directions)
        self.layers = nn.ModuleList(_Block(d_embed, d_mlp) for _ in range(n_layers))

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """The network."""
        residual = x @ self.embedding
        for layer in self.layers:
            residual = residual + layer(residual)
        return residual @ self.embedding.T


class _Block(nn.Module):
    def __init__(self, d_embed: int, d_mlp: int) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(d_embed, d_mlp, bias=False)
        self.mlp_out = nn.Linear(d_mlp, d_embed, bias=False)

    def forward(self, residual: Tensor) -> Tensor:
        return self.mlp_out(F.relu(self.mlp_in(residual)))  # type: ignore[no-any-return]
