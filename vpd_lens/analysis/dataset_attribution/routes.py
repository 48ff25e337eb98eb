"""From sources to the targets at one matrix: tables of `sum (d a_t / d a_s) a_s g_s`.

Gradients stop at every matrix, so between a source and a target lie only norms, attention and
activation functions. `Backward` takes whatever lies there, with one backward pass per target.
Of norms and activation functions the Jacobian is known at every position, and the whole table is a
few products of matrices: `ThroughNorm`, `ThroughNeurons`. Heads of attention do not meet, so that
one backward pass may serve all of them: `ThroughHeads`.

A route is called with a batch, the targets' read directions, and for the absolute variant the sign
of their activations; its columns are the sources of its places, one after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING
from vpd_lens.analysis.circuits.linear import LinearNorm
from vpd_lens.analysis.dataset_attribution.batch import Batch

# Numbers in a temporary of `ThroughNeurons`: large enough to be fast, small enough for caches.
_TEMPORARY = 2**21


class Route(ABC):
    """How the table of one target matrix is computed; `places` are those of its columns."""

    places: tuple[str, ...]

    @abstractmethod
    def __call__(
        self, batch: Batch, read: Float[Tensor, "d_in T"], sign: Float[Tensor, "n T"] | None
    ) -> Float[Tensor, "T n_sources"]:
        """The table of one batch.

        Args:
            batch: The batch.
            read: Read directions of the targets.
            sign: Signs of their activations for the absolute variant, else `None`.
        """


class Backward(Route):
    """One backward pass per target, whatever lies between.

    Args:
        matrix: The matrix that reads.
        places: Where the sources are.
    """

    def __init__(self, matrix: str, places: tuple[str, ...]) -> None:
        self.matrix, self.places = matrix, places

    def __call__(
        self, batch: Batch, read: Float[Tensor, "d_in T"], sign: Float[Tensor, "n T"] | None
    ) -> Float[Tensor, "T n_sources"]:
        """The table of one batch; see `Route`."""
        x = batch.cut.inputs[self.matrix]
        d_in, n_targets = read.shape
        if sign is None and n_targets > d_in:
            # It is linear in the read direction, so the axes will do.
            return read.T @ self(batch, torch.eye(d_in, device=read.device), None)
        leaves = [batch.cut.leaves[place] for place in self.places]
        rows = []
        for target in range(n_targets):
            direction = read[:, target].expand(x.shape[:-1].numel(), -1)
            cotangent = direction if sign is None else direction * sign[:, target, None]
            gradients = torch.autograd.grad(
                x, leaves, cotangent.to(x.dtype).view_as(x), retain_graph=True
            )
            parts = zip(self.places, gradients, strict=True)
            rows.append(
                torch.cat([batch.contribution(p, g.flatten(0, -2).float()) for p, g in parts])
            )
        return torch.stack(rows)


class ThroughHeads(Route):
    """From q, k and v through attention: every head by itself.

    Args:
        exact: The route for the absolute variant, where targets that read several heads have one
            sign for all of them.
        n_heads: Number of heads.
    """

    def __init__(self, exact: Backward, n_heads: int) -> None:
        self.exact, self.places, self.n_heads = exact, exact.places, n_heads

    def __call__(
        self, batch: Batch, read: Float[Tensor, "d_in T"], sign: Float[Tensor, "n T"] | None
    ) -> Float[Tensor, "T n_sources"]:
        """The table of one batch; see `Route`."""
        if sign is not None:
            return self.exact(batch, read, sign)
        x = batch.cut.inputs[self.exact.matrix]
        leaves = [batch.cut.leaves[place] for place in self.places]
        axes = []
        for axis in torch.eye(len(read) // self.n_heads).to(x):
            cotangent = axis.repeat(self.n_heads).expand_as(x).contiguous()
            gradients = torch.autograd.grad(x, leaves, cotangent, retain_graph=True)
            parts = zip(self.places, gradients, strict=True)
            axes.append(torch.cat([self._by_head(batch, p, g) for p, g in parts], 1))
        return read.T @ torch.stack(axes, 1).flatten(0, 1)  # [(head d_head), n_sources]

    def _by_head(
        self, batch: Batch, place: str, gradient: Tensor
    ) -> Float[Tensor, "n_heads n_sources"]:
        summed = batch.weighted[place].T @ gradient.flatten(0, -2).float()
        products = summed * batch.directions.write[place]
        return products.unflatten(1, (self.n_heads, -1)).sum(-1).T


class ThroughNorm(Route):
    """From the residual stream through one norm, `x = w c / scale + b`, `c` the centred stream.

    At each position the Jacobian is `(I - u u^T / d) / scale` between `w` and the centring, where
    `u = c / scale`: a multiple of one matrix, and a matrix of rank 1.

    Args:
        places: Where the sources are; all of them write to the residual stream.
        name: Of the norm.
        norm: The norm.
        frozen: Hold the scale.
    """

    def __init__(self, places: tuple[str, ...], name: str, norm: LinearNorm, frozen: bool) -> None:
        self.places, self.name, self.norm, self.frozen = places, name, norm, frozen

    def __call__(
        self, batch: Batch, read: Float[Tensor, "d_in T"], sign: Float[Tensor, "n T"] | None
    ) -> Float[Tensor, "T n_sources"]:
        """The table of one batch; see `Route`."""
        inverse, unit = self._parts(batch)
        read = read * self.norm.weight[:, None]
        if self.norm.centred:
            read = read - read.mean(0)
        first = inverse if sign is None else inverse * sign
        second = first * (unit @ read) * (0 if self.frozen else 1 / len(read))
        tables = []
        sites = [place for place in self.places if place != EMBEDDING]
        if sites:
            weighted = torch.cat([batch.weighted[site] for site in sites], 1)
            write = torch.cat([batch.directions.write[site] for site in sites])
            table = (first.T @ weighted) * (write @ read).T
            if not self.frozen:
                table -= second.T @ (weighted * (unit @ write.T))
            tables.append(table)
        if EMBEDDING in self.places:
            embedded = batch.embeddings @ read
            radial = torch.linalg.vecdot(unit, batch.embeddings)[:, None]
            tables.insert(0, batch.by_token(first * embedded - second * radial))
        return torch.cat(tables, 1)

    def _parts(self, batch: Batch) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n d"]]:
        """One over the scale, and `u`, at every position."""
        residual, out = (t.flatten(0, -2).float() for t in batch.cut.norms[self.name])
        centred = residual - residual.mean(-1, keepdim=True) if self.norm.centred else residual
        scaled = out if self.norm.bias is None else out - self.norm.bias
        unscaled = self.norm.weight * centred
        square = torch.linalg.vecdot(unscaled, unscaled).clamp(min=1e-30)
        inverse = (torch.linalg.vecdot(scaled, unscaled) / square)[:, None]
        return inverse, inverse * centred


class ThroughNeurons(Route):
    """From an MLP's first matrices to its last: every neuron has a slope at every position.

    Args:
        matrix: The MLP's last matrix.
        places: Its first ones.
    """

    def __init__(self, matrix: str, places: tuple[str, ...]) -> None:
        self.matrix, self.places = matrix, places

    def __call__(
        self, batch: Batch, read: Float[Tensor, "d_in T"], sign: Float[Tensor, "n T"] | None
    ) -> Float[Tensor, "T n_sources"]:
        """The table of one batch; see `Route`."""
        x = batch.cut.inputs[self.matrix]
        leaves = [batch.cut.leaves[place] for place in self.places]
        slopes = torch.autograd.grad(x, leaves, torch.ones_like(x), retain_graph=True)
        tables = []
        for place, slope in zip(self.places, slopes, strict=True):
            parts = (
                slope.flatten(0, -2).float(),
                batch.weighted[place],
                batch.directions.write[place],
            )
            tables.append(_signed(read, *parts) if sign is None else _absolute(read, sign, *parts))
        return torch.cat(tables, 1)


def _signed(
    read: Float[Tensor, "d T"],
    slope: Float[Tensor, "n d"],
    weighted: Float[Tensor, "n S"],
    write: Float[Tensor, "S d"],
) -> Float[Tensor, "T S"]:
    return read.T @ ((weighted.T @ slope) * write).T


def _absolute(
    read: Float[Tensor, "d T"],
    sign: Float[Tensor, "n T"],
    slope: Float[Tensor, "n d"],
    weighted: Float[Tensor, "n S"],
    write: Float[Tensor, "S d"],
) -> Float[Tensor, "T S"]:
    """Signs tie positions to targets, so each active source is taken at each position by itself."""
    table = read.new_zeros(len(write), read.shape[1])
    for pairs in weighted.nonzero().split(max(1, _TEMPORARY // sum(read.shape))):
        position, source = pairs.T
        written = slope[position] * write[source] * weighted[position, source, None]
        table.index_add_(0, source, (written @ read) * sign[position])
    return table.T
