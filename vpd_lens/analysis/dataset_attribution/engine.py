"""Adds up tables, one batch after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import CutForward
from vpd_lens.analysis.dataset_attribution.batch import Batch, Directions, observe
from vpd_lens.analysis.dataset_attribution.choose import choose_routes
from vpd_lens.analysis.dataset_attribution.result import OUTPUT, DatasetAttributions, Settings
from vpd_lens.analysis.dataset_attribution.routes import Route
from vpd_lens.analysis.harvest.token_strings import token_strings
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import InputError
from vpd_lens.sites import find_sites

GIB = 2**30


class Engine:
    """Adds up the tables of batches.

    Args:
        vpd: The decomposition.
        alive: Which subcomponents count.
        settings: What to do.
    """

    def __init__(self, vpd: Decomposition, alive: dict[str, Tensor], settings: Settings) -> None:
        self.vpd, self.alive, self.settings = vpd, alive, settings
        self.forward = CutForward(vpd, settings.frozen, through_delta=False)
        targets = settings.targets
        self.directions = Directions.of(vpd, alive)
        self.unembed = find_sites(vpd.model, ["unembed"])[0]
        self.reads = {name: self.directions.read[name] for name in targets if name != OUTPUT}
        # A decomposed unembedding cuts the logits off from everything but its own subcomponents.
        self.own_logits = "unembed" in vpd.layout.names
        if OUTPUT in targets and not self.own_logits:
            self.reads[OUTPUT] = torch.eye(self.unembed.shape[0], device=vpd.device)
        matrices = {name: "unembed" if name == OUTPUT else name for name in self.reads}
        wanted = {matrices[name] for name, read in self.reads.items() if read.shape[1]}
        chosen = choose_routes(self.forward, self.directions, alive, sorted(wanted))
        self.routes: dict[str, Route] = {
            name: chosen[matrix] for name, matrix in matrices.items() if matrix in chosen
        }
        self.places = {name: route.places for name, route in self.routes.items()}
        if OUTPUT in targets and self.own_logits:
            self.places[OUTPUT] = ("unembed",)

    def shapes(self) -> Iterator[tuple[str, int, int]]:
        """Name, number of targets and number of sources of every table."""
        for name, places in self.places.items():
            n_sources = sum(self.directions.n_sources(place) for place in places)
            yield name, self.reads[name].shape[1] if name in self.reads else n_sources, n_sources

    def require_small(self, limit: float) -> None:
        """Refuse tables that are too large.

        Raises:
            InputError: If they are.
        """
        sizes = {
            name: 4 * rows * columns * (1 + self._has_absolute(name))
            for name, rows, columns in self.shapes()
        }
        total = sum(sizes.values()) / GIB
        if total > limit:
            largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
            listed = ", ".join(f"{name}: {sizes[name] / GIB:.2g} GiB" for name in largest)
            raise InputError(
                f"the tables of targets times sources take {total:.2g} GiB ({listed}, ...), more "
                f"than memory_limit={limit:g}. Take some targets at a time with targets=[...], "
                "raise alive_threshold, or raise memory_limit."
            )

    def _has_absolute(self, target: str) -> bool:
        return self.settings.absolute and target != OUTPUT

    def empty(self) -> DatasetAttributions:
        """Attributions over nothing yet."""
        tables = {n: torch.zeros(rows, columns) for n, rows, columns in self.shapes()}
        sums = {n: torch.zeros(len(index), dtype=torch.float64) for n, index in self.alive.items()}
        weight = self.unembed.weight.float()
        readout = self.directions.write["unembed"] if self.own_logits else weight
        n_tokens = self.directions.n_tokens
        tokenizer = getattr(self.vpd.model, "tokenizer", None)
        return DatasetAttributions(
            alive=self.alive,
            places=self.places,
            signed=tables,
            absolute={n: torch.zeros_like(tables[n]) for n in tables if self._has_absolute(n)},
            importance=sums,
            squares={n: total.clone() for n, total in sums.items()},
            token_counts=torch.zeros(n_tokens, dtype=torch.float64),
            logit_squares=torch.zeros(weight.shape[1], dtype=torch.float64),
            readout=readout.cpu(),
            strings=token_strings(tokenizer, max(n_tokens, weight.shape[1])),
            settings=self.settings,
            fingerprint=fingerprint(self.vpd),
        )

    def add(self, result: DatasetAttributions, tokens: Tensor) -> None:
        """Add one batch."""
        batch = observe(self.forward, self.directions, self.alive, tokens)
        for name, route in self.routes.items():
            result.signed[name] += route(batch, self.reads[name], None)
            if name in result.absolute:
                sign = batch.acts[name].sign()
                result.absolute[name] += route(batch, self.reads[name], sign)
        if OUTPUT in self.places and self.own_logits:
            result.signed[OUTPUT] += batch.weighted["unembed"].sum(0).diag()
        self._add_sums(result, batch)

    def _add_sums(self, result: DatasetAttributions, batch: Batch) -> None:
        for name in self.alive:
            result.importance[name] += batch.importance[name].sum(0)
            result.squares[name] += batch.acts[name].square().sum(0)
        ones = torch.ones_like(batch.tokens, dtype=torch.float64)
        result.token_counts.index_add_(0, batch.tokens, ones)
        logits = (
            batch.cut.inputs["unembed"].detach().flatten(0, -2).float()
            @ self.unembed.weight.float()
        )
        if self.unembed.bias is not None:
            logits += self.unembed.bias
        result.logit_squares += logits.square().sum(0)
        result.n_positions += len(batch.tokens)
        result.n_batches += 1
