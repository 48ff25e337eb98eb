"""Which sources reach each matrix, and by which route their table is computed.

A shortcut is taken where it gives what the backward passes give, on a few made-up tokens with
random weights. So no knowledge of architectures is needed: a model that is put together in another
way is merely slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING, CutForward
from vpd_lens.analysis.dataset_attribution.batch import Alive, Batch, Directions, observe
from vpd_lens.analysis.dataset_attribution.routes import (
    Backward,
    Route,
    ThroughHeads,
    ThroughNeurons,
    ThroughNorm,
)
from vpd_lens.sites.site import relative_error

_POSITIONS = 6
_DIRECTIONS = 3


def choose_routes(
    forward: CutForward, directions: Directions, alive: Alive, matrices: Sequence[str]
) -> dict[str, Route]:
    """The route to every matrix that any source reaches.

    Args:
        forward: The cut model.
        directions: Of the alive subcomponents.
        alive: Which these are.
        matrices: Whose inputs are wanted.
    """
    probe = _probe(forward, directions, alive)
    routes: dict[str, Route] = {}
    for matrix in matrices:
        exact = Backward(matrix, _places(probe, matrix))
        if exact.places:
            shortcuts = (s for s in _shortcuts(forward, exact, probe) if _agree(s, exact, probe))
            routes[matrix] = next(shortcuts, exact)
    return routes


def _probe(forward: CutForward, directions: Directions, alive: Alive) -> Batch:
    """Tokens and weights that leave nothing zero by chance."""
    n_positions = min(_POSITIONS, int(forward.vpd.model.cfg.n_ctx))
    tokens = (torch.arange(2 * n_positions) % directions.n_tokens).view(2, n_positions)
    batch = observe(forward, directions, alive, tokens.to(forward.vpd.device))
    generator = torch.Generator().manual_seed(0)
    weighted = {name: _random(w, generator) for name, w in batch.weighted.items()}
    return replace(batch, weighted=weighted, embeddings=_random(batch.embeddings, generator))


def _places(probe: Batch, matrix: str) -> tuple[str, ...]:
    """Where gradients from a matrix' input arrive."""
    x = probe.cut.inputs[matrix]
    places = [EMBEDDING, *(name for name, w in probe.weighted.items() if w.shape[1])]
    leaves = [probe.cut.leaves[place] for place in places]
    gradients = torch.autograd.grad(
        x, leaves, torch.ones_like(x), retain_graph=True, allow_unused=True
    )
    return tuple(p for p, gradient in zip(places, gradients, strict=True) if gradient is not None)


def _shortcuts(forward: CutForward, exact: Backward, probe: Batch) -> Iterator[Route]:
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


def _agree(shortcut: Route, exact: Backward, probe: Batch) -> bool:
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
