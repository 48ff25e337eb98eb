"""From sources to the targets at one matrix: tables of `sum (d a_t / d a_s) a_s g_s`.

Gradients stop at every matrix, so only norms, attention and activation functions lie between a
source and a target. `Backward` takes whatever lies there, pass after pass. Of norms and activation
functions the Jacobian is known at every position, and the table is a few products of matrices.

A shortcut is taken where it gives what the backward passes give, on a few made-up tokens with
random weights: a model that is put together in another way is merely slower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING
from vpd_lens.analysis.circuits.linear import LinearNorm
from vpd_lens.analysis.dataset_attribution.batch import Observed, Observer, flat
from vpd_lens.analysis.dataset_attribution.result import OUTPUT
from vpd_lens.data import Batch
from vpd_lens.sites.site import relative_error

__all__ = ["choose_routes"]

# Numbers in a temporary of `ThroughNeurons`: large enough to be fast, small enough for caches.
_TEMPORARY = 2**21
_POSITIONS, _DIRECTIONS = 6, 3  # of the made-up batch that decides on shortcuts

Read = Float[Tensor, "d_in T"]  # directions of the targets
Sign = Float[Tensor, "n T"] | None  # of their activations for the absolute variant
Table = Float[Tensor, "T n_sources"]


@dataclass(frozen=True)
class Route(ABC):
    """How the table of one batch is computed for the targets that read at one matrix.

    Columns are the sources at one of `places` after the other.
    """

    matrix: str
    places: tuple[str, ...]

    @abstractmethod
    def __call__(self, batch: Observed, read: Read, sign: Sign) -> Table: ...

    def n_passes(self, read: Read, absolute: bool) -> int:
        """Number of backward passes of a call, which take most of its time."""
        return 0


@dataclass(frozen=True)
class Backward(Route):
    """One backward pass per target, whatever lies between, or per axis of what targets read.

    The table is linear in the read directions, so fewer axes than targets, or those of one head of
    attention for every head at once, will do. Not with signs: targets that read several have one
    for all.
    """

    n_heads: int = 1

    def __call__(self, batch: Observed, read: Read, sign: Sign) -> Table:
        by_axes, n_heads, directions = self._by_axes(read, sign is not None), 1, read.T
        if by_axes:
            n_heads = self.n_heads
            directions = torch.eye(len(read) // n_heads, device=read.device).repeat(1, n_heads)
        signs = read.new_ones(len(directions), len(batch.tokens)) if sign is None else sign.T
        rows = [
            batch.contributions(self.matrix, self.places, s[:, None] * direction, n_heads)
            for s, direction in zip(signs, directions, strict=True)
        ]
        table = torch.stack(rows, 1).flatten(0, 1)  # [(head axis) or T, n_sources]
        return read.T @ table if by_axes else table

    def n_passes(self, read: Read, absolute: bool) -> int:
        return len(read) // self.n_heads if self._by_axes(read, absolute) else read.shape[1]

    def _by_axes(self, read: Read, absolute: bool) -> bool:
        return not absolute and (self.n_heads > 1 or read.shape[1] > len(read))


@dataclass(frozen=True)
class ThroughNorm(Route):
    """From the residual stream through one norm, `x = w c / scale + b`, `c` the centred stream.

    At each position the Jacobian is `(I - u u^T / d) / scale` between `w` and the centring, where
    `u = c / scale`: a multiple of one matrix, and a matrix of rank 1, which holding the scale
    (`frozen`) leaves out. All sources write to the residual stream.
    """

    name: str
    norm: LinearNorm
    frozen: bool

    def __call__(self, batch: Observed, read: Read, sign: Sign) -> Table:
        residual, out = (flat(t, batch.real) for t in batch.cut.norms[self.name])
        inverse = self.norm.inverse_scale(residual, self.norm.unbiased(out))
        unit = inverse * self.norm.centre(residual)
        read = read * self.norm.weight[:, None]
        if self.norm.centred:
            read = read - read.mean(0)
        first = inverse if sign is None else inverse * sign
        second = first * (unit @ read) * (0 if self.frozen else 1 / len(read))
        tables = []
        for place in self.places:
            if place == EMBEDDING:
                radial = torch.linalg.vecdot(unit, batch.embeddings)[:, None]
                tables.append(batch.by_token(first * (batch.embeddings @ read) - second * radial))
                continue
            weighted, write = batch.weighted[place], batch.observer.write[place]
            table = (first.T @ weighted) * (write @ read).T
            if not self.frozen:
                table -= second.T @ (weighted * (unit @ write.T))
            tables.append(table)
        return torch.cat(tables, 1)


class ThroughNeurons(Route):
    """From an MLP's first matrices to its last: every neuron has a slope at every position."""

    def __call__(self, batch: Observed, read: Read, sign: Sign) -> Table:
        ones = read.new_ones(len(batch.tokens), len(read))
        slopes = batch.gradients(self.matrix, self.places, ones)
        tables = []
        for place, slope in zip(self.places, slopes, strict=True):
            weighted, write = batch.weighted[place], batch.observer.write[place]
            if sign is None:
                tables.append(read.T @ ((weighted.T @ slope) * write).T)
                continue
            # Signs tie positions to targets: each active source at each position by itself.
            table = read.new_zeros(len(write), read.shape[1])
            for pairs in weighted.nonzero().split(max(1, _TEMPORARY // sum(read.shape))):
                position, source = pairs.T
                written = slope[position] * write[source] * weighted[position, source, None]
                table.index_add_(0, source, (written @ read) * sign[position])
            tables.append(table.T)
        return torch.cat(tables, 1)

    def n_passes(self, read: Read, absolute: bool) -> int:
        return 1


class OwnLogits(Route):
    """From the subcomponents of a decomposed unembedding to themselves, who alone reach logits."""

    def __call__(self, batch: Observed, read: Read, sign: Sign) -> Table:
        return batch.weighted[self.matrix].sum(0).diag()


def choose_routes(observer: Observer, targets: Sequence[str]) -> dict[str, Route]:
    """The route to every target site, or `output`, that any source reaches."""
    probe = _probe(observer)
    routes: dict[str, Route] = {}
    for target in targets:
        matrix = "unembed" if target == OUTPUT else target
        exact = Backward(matrix, _places(probe, matrix))
        if target == OUTPUT and matrix in observer.alive:
            routes[target] = OwnLogits(matrix, (matrix,))
        elif exact.places:
            shortcuts = (s for s in _shortcuts(exact, probe) if _agree(s, exact, probe))
            routes[target] = next(shortcuts, exact)
    return routes


def _probe(observer: Observer) -> Observed:
    """Tokens and weights that leave nothing zero by chance."""
    vpd = observer.forward.vpd
    n_positions = min(_POSITIONS, int(vpd.model.cfg.n_ctx))
    tokens = (torch.arange(2 * n_positions) % observer.n_tokens).view(2, n_positions)
    batch = observer(Batch(tokens.to(vpd.device)))
    generator = torch.Generator().manual_seed(0)
    weighted = {name: _random(w, generator) for name, w in batch.weighted.items()}
    return replace(batch, weighted=weighted, embeddings=_random(batch.embeddings, generator))


def _places(probe: Observed, matrix: str) -> tuple[str, ...]:
    """Where gradients from a matrix' input arrive."""
    x = probe.cut.inputs[matrix]
    places = [EMBEDDING, *(name for name, w in probe.weighted.items() if w.shape[1])]
    leaves = [probe.cut.leaves[place] for place in places]
    found = torch.autograd.grad(x.sum(), leaves, retain_graph=True, allow_unused=True)
    return tuple(p for p, gradient in zip(places, found, strict=True) if gradient is not None)


def _shortcuts(exact: Backward, probe: Observed) -> Iterator[Route]:
    """Those that may fit."""
    matrix, places, forward = exact.matrix, exact.places, probe.observer.forward
    x = probe.cut.inputs[matrix].detach().flatten(0, -2)
    widths = {probe.cut.leaves[place].shape[-1] for place in places}
    for name, _, norm in forward.norms:
        _, out = probe.cut.norms.get(name, (None, None))
        is_read = out is not None and torch.equal(out.flatten(0, -2), x)
        if is_read and widths == {probe.embeddings.shape[1]}:
            yield ThroughNorm(matrix, places, name, norm, forward.frozen)
    if EMBEDDING not in places and widths == {x.shape[1]}:
        yield ThroughNeurons(matrix, places)
        yield Backward(matrix, places, int(forward.vpd.model.cfg.n_heads))


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
