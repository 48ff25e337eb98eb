"""Where subcomponents are active: what is clustered, and how any two go together.

A subcomponent is active where its causal importance exceeds a threshold; of those that never are,
nothing more is said. It is kept as one bit for every subcomponent and position.

Source: VPD, clustering; the centring is that of later work, where otherwise the subcomponents that
are always active dominate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from vpd_lens.analysis.clustering.bits import Bits, packed, unpacked
from vpd_lens.analysis.gathering import chosen
from vpd_lens.data import Batch, one_pass
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.decomposition.idle import idle
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import DataError, InputError
from vpd_lens.progress import Progress
from vpd_lens.rendering import Shown, titled

ACTIVE = 0.01


class Coactivity(NamedTuple):
    """Two subcomponents, how their being active correlates, and at how many positions both are."""

    first: str
    second: str
    correlation: float
    both: int


@dataclass(repr=False, eq=False)
class Activity(Shown):
    """Where every subcomponent is active that is active anywhere.

    Attributes:
        names: Of the subcomponents.
        bits: Where each is active, in the order of the text, 64 positions to a word.
        sequence: Which sequence each position is of.
        position: Its place there.
        threshold: Importance above which a subcomponent is active.
        n_dead: How many others are never active, or too small to write anything.
        fingerprint: Of the decomposition.
    """

    names: tuple[str, ...]
    bits: Bits
    sequence: Int[np.ndarray, " n_positions"]
    position: Int[np.ndarray, " n_positions"]
    threshold: float
    n_dead: int
    fingerprint: str

    @property
    def n_positions(self) -> int:
        """Positions that were looked at."""
        return len(self.sequence)

    def active(self, site: str | None = None) -> Bool[Tensor, "n_positions n_site"]:
        """Where the subcomponents of a site, or all, are active.

        Raises:
            InputError: If nothing of the site is.
        """
        return torch.from_numpy(unpacked(self.bits[:, self._columns(site)], self.n_positions))

    @property
    def counts(self) -> Int[np.ndarray, " n"]:
        """At how many positions each is active."""
        return np.bitwise_count(self.bits).sum(0, dtype=np.int64)

    def correlation(
        self, first: str | None = None, second: str | None = None, offset: int = 0
    ) -> Float[Tensor, "n_first n_second"]:
        """How the activity of two sites' subcomponents goes together, their densities apart.

        The correlation of the first's being active at a position with the second's `offset`
        positions before, in the same sequence; 0 where one always is or never is. With q first,
        k second and an offset of 1, what a head needs to look one back.

        Raises:
            InputError: If nothing of a site is active, or no two positions are so far apart.
        """
        both, n_first, n_second, n = self._together(first, second, offset)
        covariance = both / n - (n_first / n)[:, None] * (n_second / n)
        spreads = [np.sqrt(x / n * (1 - x / n)) for x in (n_first, n_second)]
        scale = spreads[0][:, None] * spreads[1]
        found = np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)
        return torch.from_numpy(found).float()

    def top(
        self,
        n: int = 10,
        first: str | None = None,
        second: str | None = None,
        offset: int = 0,
        at_least: int = 10,
    ) -> list[Coactivity]:
        """The `n` pairs that go together most; each once, and active at `at_least` positions.

        Raises:
            InputError: As for `correlation`.
        """
        values = self.correlation(first, second, offset).numpy()
        both, n_first, n_second, _ = self._together(first, second, offset)
        values[(n_first < at_least)[:, None] | (n_second < at_least)] = -np.inf
        rows, columns = self._columns(first), self._columns(second)
        if first == second and not offset:
            values[np.tril_indices(len(values))] = -np.inf
        best = np.argsort(-values, axis=None, kind="stable")[:n]
        return [
            Coactivity(
                self.names[rows[r]], self.names[columns[c]], float(values[r, c]), int(both[r, c])
            )
            for r, c in zip(*np.unravel_index(best, values.shape), strict=True)
            if values[r, c] > -np.inf
        ]

    def _together(
        self, first: str | None, second: str | None, offset: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Positions where both are active, those of each, and all pairs of positions."""
        now, then = self._apart(offset)
        a = self.active(first)[now].float()
        b = a if first == second and not offset else self.active(second)[then].float()
        return (a.T @ b).numpy(), a.sum(0).numpy(), b.sum(0).numpy(), len(now)

    def _apart(self, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows, and the rows that are `offset` positions before them."""
        if offset < 0:
            raise InputError(f"offset={offset}; expected 0 or more: how far the second is before.")
        stride = int(self.position.max(initial=0)) + offset + 1
        place = self.sequence.astype(np.int64) * stride + self.position
        wanted = place - offset
        at = np.searchsorted(place, wanted).clip(max=len(place) - 1)
        there = (place[at] == wanted) & (self.position >= offset)
        if not there.any():
            raise InputError(
                f"offset={offset}: no two of the positions are so far apart in one sequence. Take "
                "a smaller one, or look at all positions (per_sequence=None)."
            )
        return np.flatnonzero(there), at[there]

    def _columns(self, site: str | None) -> Int[np.ndarray, " n"]:
        found = [i for i, n in enumerate(self.names) if site in (None, n.rpartition(":")[0])]
        if not found:
            sites = dict.fromkeys(name.rpartition(":")[0] for name in self.names)
            raise InputError(f"nothing of {site!r} is active; sites of what is: {[*sites]}.")
        return np.array(found)

    def __rich__(self) -> RenderableType:
        title = (
            f"{len(self.names)} subcomponents active (importance above {self.threshold:g}) at "
            f"{self.n_positions} positions, {self.counts.sum() / self.n_positions:.1f} at each; "
            f"{self.n_dead} never"
        )
        table = Table("site")
        for heading in ("active", "at each position"):
            table.add_column(heading, justify="right")
        sites = np.array([name.rpartition(":")[0] for name in self.names])
        for site in dict.fromkeys(sites.tolist()):
            of_site = self.counts[sites == site]
            table.add_row(site, str(len(of_site)), f"{of_site.sum() / self.n_positions:.2f}")
        return titled(title, table)


def activity(
    model: nn.Module,
    data: Any,
    *,
    threshold: float = ACTIVE,
    n_batches: int = 32,
    batch_size: int = 16,
    seq_len: int | None = None,
    per_sequence: int | None = None,
    sites: Sequence[str] | None = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Activity:
    """Look where subcomponents are active.

    A harvest does not keep this, so it is looked up in a pass of its own.

    Args:
        model: A decomposed model with positions.
        data: As for `vpd_lens.train`. Read in order, not shuffled, and once at most.
        threshold: A subcomponent is active where its causal importance exceeds this.
        n_batches: Batches at most.
        batch_size: Sequences per batch.
        seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
        per_sequence: Positions of each sequence, drawn at random: neighbours are alike, so that
            fewer of more sequences say more. `None`: all. Pads never count.
        sites: Names of the sites to look at; `None`: all.
        seed: Seed of the positions.
        prepend_bos: BOS policy for text; `None` follows the model.
        progress: Show how far it is and how long it will still take.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If an argument is out of range, or nothing is active anywhere.
        DataError: If the data does not fit the model, or there is none.
    """
    vpd = decomposition_of(model)
    if not 0 < threshold < 1:
        raise InputError(f"threshold={threshold}; expected an importance between 0 and 1.")
    for name, value in (("n_batches", n_batches), ("per_sequence", per_sequence)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected at least 1.")
    names = chosen("sites", sites, None, vpd.layout.names)
    usable = torch.zeros(vpd.layout.total, dtype=torch.bool, device=vpd.device)
    for name in names:
        usable[vpd.layout.columns(name)] = True
    usable &= ~idle(vpd)
    how = {"batch_size": batch_size, "seq_len": seq_len, "prepend_bos": prepend_bos}
    batches = islice(one_pass(data, model=model, **how), n_batches)
    rng, found, n_sequences = np.random.default_rng(seed), [], 0
    with Progress("Looking where subcomponents are active", n_batches, 0, progress) as bar:
        for batch in bar.counting(batches):
            places = _places(batch, per_sequence, rng)
            active = _active(vpd, batch.to(vpd.device), places, threshold) & usable
            found.append((places[0] + n_sequences, places[1], active.cpu()))
            n_sequences += len(batch.tokens)
    if not found:
        raise DataError("there is no batch of data to look at; give at least one.")
    return _gathered(vpd, names, found, threshold)


def _places(
    batch: Batch, per_sequence: int | None, rng: np.random.Generator
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Sequence and place of the positions to look at, in their order."""
    real = batch.real
    real = torch.ones(batch.tokens.shape[:2], dtype=torch.bool) if real is None else real.cpu()
    if per_sequence is not None:
        keys = torch.from_numpy(rng.random(tuple(real.shape))).masked_fill(~real, 2.0)
        kept = keys.argsort(dim=1)[:, :per_sequence]
        real = real & torch.zeros_like(real).scatter(1, kept, True)
    sequence, position = real.nonzero(as_tuple=True)
    return sequence, position


@torch.no_grad()
def _active(
    vpd: Decomposition, batch: Batch, places: tuple[Tensor, Tensor], threshold: float
) -> Bool[Tensor, "n C_total"]:
    return vpd.causal_importance(batch.tokens, **batch.mask_argument())[places] > threshold


def _gathered(
    vpd: Decomposition, sites: Sequence[str], found: list[tuple[Tensor, ...]], threshold: float
) -> Activity:
    sequence, position, active = (torch.cat(parts) for parts in zip(*found, strict=True))
    used = active.any(0).nonzero()[:, 0]
    if not len(used):
        raise InputError(
            f"no subcomponent has an importance above threshold={threshold} at any of "
            f"{len(active)} positions. Give more data (n_batches=...), or a lower threshold."
        )
    sizes = list(zip(vpd.layout.names, vpd.layout.sizes, strict=True))
    names = [f"{site}:{c}" for site, n in sizes for c in range(n)]
    return Activity(
        names=tuple(names[i] for i in used.tolist()),
        bits=packed(active.numpy()[:, used.numpy()]),
        sequence=sequence.numpy(),
        position=position.numpy(),
        threshold=threshold,
        n_dead=sum(n for site, n in sizes if site in sites) - len(used),
        fingerprint=fingerprint(vpd),
    )
