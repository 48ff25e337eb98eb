"""From sources to the targets at one matrix: tables of `sum (d a_t / d a_s) a_s g_s`.

Gradients stop at every matrix, so between a source and a target lie only norms, attention and
activation functions. `Backward` takes whatever lies there, with one backward pass per target.
Of norms and activation functions the Jacobian is known at every position, and the whole table is a
few products of matrices: `ThroughNorm`, `ThroughNeurons`. Heads of attention do not meet, so that
one backward pass may serve all of them: `ThroughHeads`.

A shortcut is taken where it gives what the backward passes give, on a few made-up tokens with
random weights. So no knowledge of architectures is needed: a model that is put together in another
way is merely slower.

A route is called with a batch, the targets' read directions, and for the absolute variant the sign
of their activations; its columns are the sources of its places, one after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING, CutForward
from vpd_lens.analysis.circuits.linear import LinearNorm
from vpd_lens.analysis.dataset_attribution.batch import Alive, Directions, Observed, observe
from vpd_lens.data import Batch
from vpd_lens.sites.site import relative_error

# Numbers in a temporary of `ThroughNeurons`: large enough to be fast, small enough for caches.
_TEMPORARY = 2**21

# Size of the made-up batch that decides on shortcuts.
_POSITIONS = 6
_DIRECTIONS = 3


class Route(ABC):
    """How the table of one target matrix is computed; `places` are those of its columns."""

    places: tuple[str, ...]

    @abstractmethod
    def __call__(
        self, batch: Observed, read: Float[Tensor, "d_in T"], sign: Float[Tensor, "n T"] | None
    ) -> Float[Tensor, "T n_sources"]:
        """The table of one batch.

        Args:
            batch: The batch.
            read: Read directions of the targets.
            sign: Signs of their activations for the absolute variant, else `None`.
        """

    def n_passes(self, d_in: int, n_targets: int, absolute: bool) -> int:
        """Number of backward passes of a call, which take most of its time."""
        return 0


class Backward(Route):
    """One backward pass per target, whatever lies between.

    Args:
        matrix: The matrix that reads.
        places: Where the sources are.
    """

    def __init__(self, matrix: str, places: tuple[str, ...]) -> None:
        self.matrix, self.places = matrix, places

    def __call__(
        self, batch: Observed, read: Float[Tensor, "d_in T"], sign: Float[Tensor, "n T"] | None
    ) -> Float[Tensor, "T n_sources"]:
        """The table of one batch; see `Route`."""
        d_in, n_targets = read.shape
        if sign is None and n_targets > d_in:
            # It is linear in the read direction, so the axes will do.
            return read.T @ self(batch, torch.eye(d_in, device=read.device), None)
        rows = []
        for target in range(n_targets):
            cotangent = read[:, target].expand(len(batch.tokens), -1)
            if sign is not None:
                cotangent = cotangent * sign[:, target, None]
            gradients = batch.gradients(self.matrix, self.places, cotangent)
            parts = zip(self.places, gradients, strict=True)
            rows.append(torch.cat([batch.contribution(p, gradient) for p, gradient in parts]))
        return torch.stack(rows)

    def n_passes(self, d_in: int, n_targets: int, absolute: bool) -> int:
        """See `Route`."""
        return n_targets if absolute else min(n_targets, d_in)


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
        self, batch: Observed, read: Float[Tensor, "d_in T"], sign: Float[Tensor, "n T"] | None
    ) -> Float[Tensor, "T n_sources"]:
        """The table of one batch; see `Route`."""
        if sign is not None:
            return self.exact(batch, read, sign)
        axes = []
        for axis in torch.eye(len(read) // self.n_heads, device=read.device):
            cotangent = axis.repeat(self.n_heads).expand(len(batch.tokens), -1)
            gradients = batch.gradients(self.exact.matrix, self.places, cotangent)
            parts = zip(self.places, gradients, strict=True)
            axes.append(torch.cat([self._by_head(batch, p, g) for p, g in parts], 1))
        return read.T @ torch.stack(axes, 1).flatten(0, 1)  # [(head d_head), n_sources]

    def n_passes(self, d_in: int, n_targets: int, absolute: bool) -> int:
        """See `Route`."""
        return self.exact.n_passes(d_in, n_targets, True) if absolute else d_in // self.n_heads

    def _by_head(
        self, batch: Observed, place: str, gradient: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, "n_heads n_sources"]:
        summed = batch.weighted[place].T @ gradient
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
        self, batch: Observed, read: Float[Tensor, "d_in T"], sign: Float[Tensor, "n T"] | None
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

    def _parts(self, batch: Observed) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n d"]]:
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
        self, batch: Observed, read: Float[Tensor, "d_in T"], sign: Float[Tensor, "n T"] | None
    ) -> Float[Tensor, "T n_sources"]:
        """The table of one batch; see `Route`."""
        ones = read.new_ones(len(batch.tokens), len(read))
        slopes = batch.gradients(self.matrix, self.places, ones)
        tables = []
        for place, slope in zip(self.places, slopes, strict=True):
            weighted, write = batch.weighted[place], batch.directions.write[place]
            if sign is None:
                tables.append(read.T @ ((weighted.T @ slope) * write).T)
            else:
                tables.append(_absolute(read, sign, slope, weighted, write))
        return torch.cat(tables, 1)

    def n_passes(self, d_in: int, n_targets: int, absolute: bool) -> int:
        """See `Route`."""
        return 1


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


# ------------------------------------------------------------------ which route


def choose_routes(
    forward: CutForward, directions: Directions, alive: Alive, matrices: Sequence[str]
) -> dict[str, Route]:
    """The route to every matrix that any source reaches."""
    probe = _probe(forward, directions, alive)
    routes: dict[str, Route] = {}
    for matrix in matrices:
        exact = Backward(matrix, _places(probe, matrix))
        if exact.places:
            shortcuts = (s for s in _shortcuts(forward, exact, probe) if _agree(s, exact, probe))
            routes[matrix] = next(shortcuts, exact)
    return routes


def _probe(forward: CutForward, directions: Directions, alive: Alive) -> Observed:
    """Tokens and weights that leave nothing zero by chance."""
    n_positions = min(_POSITIONS, int(forward.vpd.model.cfg.n_ctx))
    tokens = (torch.arange(2 * n_positions) % directions.n_tokens).view(2, n_positions)
    batch = observe(forward, directions, alive, Batch(tokens.to(forward.vpd.device)))
    generator = torch.Generator().manual_seed(0)
    weighted = {name: _random(w, generator) for name, w in batch.weighted.items()}
    return replace(batch, weighted=weighted, embeddings=_random(batch.embeddings, generator))


def _places(probe: Observed, matrix: str) -> tuple[str, ...]:
    """Where gradients from a matrix' input arrive."""
    x = probe.cut.inputs[matrix]
    places = [EMBEDDING, *(name for name, w in probe.weighted.items() if w.shape[1])]
    leaves = [probe.cut.leaves[place] for place in places]
    gradients = torch.autograd.grad(
        x, leaves, torch.ones_like(x), retain_graph=True, allow_unused=True
    )
    return tuple(p for p, gradient in zip(places, gradients, strict=True) if gradient is not None)


def _shortcuts(forward: CutForward, exact: Backward, probe: Observed) -> Iterator[Route]:
    """Those that may fit."""
    x = probe.cut.inputs[exact.matrix].detach().flatten(0, -2)
    d_model = probe.embeddings.shape[1]
    outputs = [probe.cut.leaves[place].shape[-1] for place in exact.places]
    for name, _, norm in forward.norms:
        read = probe.cut.norms.get(name)
        if read is not None and torch.equal(read[1].flatten(0, -2), x) and {*outputs} == {d_model}:
            yield ThroughNorm(exact.places, name, norm, forward.frozen)
    if EMBEDDING not in exact.places and {*outputs} == {x.shape[1]}:
        yield ThroughNeurons(exact.matrix, exact.places)
        yield ThroughHeads(exact, int(forward.vpd.model.cfg.n_heads))


def _agree(shortcut: Route, exact: Backward, probe: Observed) -> bool:
    x = probe.cut.inputs[exact.matrix]
    generator = torch.Generator().manual_seed(1)
    read = _random(x.new_empty(x.shape[-1], _DIRECTIONS, dtype=torch.float32), generator)
    sign = _random(read.new_empty(x.shape[:-1].numel(), _DIRECTIONS), generator).sign()
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    return all(
        relative_error(shortcut(probe, read, s), exact(probe, read, s)) < tolerance
        for s in (None, sign)
    )


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
