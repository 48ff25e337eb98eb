"""`dataset_attributions`: attribution edges summed over data.

Phases: what is alive; by which route each matrix' table is computed; then batch after batch one
forward pass, cut at the matrices, and the tables added up.

Source: VPD, attribution graphs (dataset attributions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.circuits.cut_forward import CutForward
from vpd_lens.analysis.circuits.targets import explained_decomposition
from vpd_lens.analysis.dataset_attribution.batch import Directions, Observed, observe
from vpd_lens.analysis.dataset_attribution.nodes import OUTPUT
from vpd_lens.analysis.dataset_attribution.result import DatasetAttributions, Settings
from vpd_lens.analysis.dataset_attribution.routes import Route, choose_routes
from vpd_lens.analysis.gathering import check_output, check_same, gather
from vpd_lens.analysis.harvest.statistics import token_strings
from vpd_lens.analysis.usage import above, mean_importance
from vpd_lens.data import Batch, one_pass
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import InputError
from vpd_lens.evaluation.metrics import ALIVE
from vpd_lens.progress import Progress
from vpd_lens.sites import find_sites

GIB = 2**30

Indices = Mapping[str, Sequence[int] | Int[Tensor, " _n"]]


def dataset_attributions(
    model: nn.Module,
    data: Any,
    *,
    n_batches: int = 100,
    batch_size: int = 16,
    seq_len: int | None = None,
    targets: Literal["all"] | Sequence[str] = "all",
    alive: Indices | None = None,
    alive_threshold: float = ALIVE,
    absolute: bool = True,
    frozen: bool = False,
    output: str | Path | None = None,
    resume: bool = False,
    save_every: float = 60.0,
    memory_limit: float = 4.0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> DatasetAttributions:
    """Which subcomponents act on which, over a whole data set.

    Sums the edges of `vpd_lens.attribute` over all positions, or pairs of positions:

        sum (d a_t / d a_s) a_s g_s / (sum g_s * RMS(a_t))

    where gradients are stopped at every subcomponent and delta. The absolute variant has `|a_t|`
    in the place of `a_t`: what makes a target larger, whatever its sign. Sources are subcomponents
    and token embeddings (with the token's count for `sum g_s`); targets are subcomponents, at all
    positions and not only where they are important, and logits (without an absolute variant).

    Memory does not grow with the data. The result is reproducible bit for bit on a CPU, whether
    or not the pass was interrupted and resumed.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        data: As for `vpd_lens.train`. Read in order, not shuffled, and once at most; twice unless
            `alive` is given. Pads count nowhere.
        n_batches: Batches in all, those before a resume included.
        batch_size: Sequences per batch.
        seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
        targets: Sites whose subcomponents are targets, and `"output"` for logits; `"all"`: all.
        alive: Subcomponents that are sources and targets, `{site: indices}`, as from
            `vpd_lens.analysis.alive_subcomponents`. `None`: those above `alive_threshold`.
        alive_threshold: Mean importance on this data that a subcomponent must exceed.
        absolute: Have the absolute variant too, which takes passes and tables of its own.
        frozen: Hold norm scales, attention patterns and neurons' gains at their values; see
            `vpd_lens.attribute`. Without it, what only scales the input of a norm has no effect: in
            a model without position embeddings the first q, k and v owe the embeddings nothing.
        output: Directory of the result; `None`: it is not stored.
        resume: Go on from what is in `output`, with the subcomponents that are alive there.
        save_every: Seconds between the states written to `output`.
        memory_limit: Largest size of the tables, in GiB.
        prepend_bos: BOS policy for text; `None` follows the model.
        progress: Show how far it is and how long it will still take.

    Returns:
        The attributions, on the CPU: `.sources(node)`, `.targets(node)`, `.table(node)`.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If an argument is out of range or the tables exceed `memory_limit`.
        ConfigError: If `output` already holds attributions and `resume` is False.
        ArtefactError: If what is in `output` is damaged, or of another decomposition or other
            arguments.
        DataError: If the data does not fit the model, or is not that of the interrupted pass.

    Examples:
        >>> found = dataset_attributions(model, "stories.npy")  # doctest: +SKIP
        >>> found.sources("blocks.1.mlp.in:31", top=10)  # doctest: +SKIP
    """
    vpd = explained_decomposition(model)
    check_output(n_batches, output, resume)
    if not 0 <= alive_threshold < 1:
        raise InputError(f"alive_threshold is {alive_threshold:g}; expected a number in [0, 1).")
    names = _targets(vpd, targets)
    settings = Settings(
        alive_threshold=alive_threshold, absolute=absolute, frozen=frozen, targets=names
    )
    read = partial(
        one_pass,
        data,
        model=model,
        batch_size=batch_size,
        seq_len=seq_len,
        prepend_bos=prepend_bos,
    )
    given = None if alive is None else _checked_alive(vpd, alive)
    stored = _resumed(Path(str(output)), vpd, settings, given) if resume else None
    if stored is not None:
        given = stored.alive
    elif given is None:
        _require_rereadable(data)
        with Progress("Finding what is alive", n_batches, show=progress) as bar:
            means = mean_importance(vpd, bar.counting(read(n_batches=n_batches)))
        given = _above(vpd, means, alive_threshold)
    engine = Engine(vpd, given, settings)
    engine.require_small(memory_limit)
    result = (engine.empty() if stored is None else stored).moved(vpd.device)
    batches = read(state=result.data_state)
    n_passes = engine.n_passes
    done = result.n_batches * n_passes
    with Progress("Attributing", n_batches * n_passes, done, progress) as bar:

        def add(batch: Batch) -> None:
            engine.add(result, batch.to(vpd.device), bar.advance)

        gather(result, batches, n_batches, add, output, save_every)
    return result.moved(torch.device("cpu"))


# ------------------------------------------------------------------ before the pass


def _targets(vpd: Decomposition, targets: Literal["all"] | Sequence[str]) -> tuple[str, ...]:
    available = (*vpd.layout.names, OUTPUT)
    if targets == "all":
        return available
    if isinstance(targets, str) or not targets or not set(targets) <= set(available):
        raise InputError(
            f"targets={targets!r}; expected 'all' or a list of some of {list(available)}."
        )
    return tuple(name for name in available if name in targets)


def _require_rereadable(data: Any) -> None:
    if isinstance(data, Iterator):
        raise InputError(
            f"data is a {type(data).__name__}, which can be read only once, but what is alive is "
            "found in a pass of its own. Give alive={site: indices}, or an iterable."
        )


def _resumed(
    output: Path, vpd: Decomposition, settings: Settings, alive: dict[str, Tensor] | None
) -> DatasetAttributions:
    stored = DatasetAttributions.load(output, vpd)
    other = alive is not None and any(not torch.equal(alive[n], stored.alive[n]) for n in alive)
    check_same(output, stored.settings, settings, ["alive was another choice"] * other)
    return stored


# ------------------------------------------------------------------ what is alive


def _above(
    vpd: Decomposition, means: Float[Tensor, " C_total"], threshold: float
) -> dict[str, Tensor]:
    if not bool((means > threshold).any()):
        raise InputError(
            f"alive_threshold={threshold:g}: no subcomponent's mean importance exceeds it; the "
            f"largest is {float(means.max()):.2g}. Lower it."
        )
    return above(vpd, means, threshold)


def _checked_alive(vpd: Decomposition, alive: Indices) -> dict[str, Tensor]:
    """Indices as users give them, sorted, for every site; a site left out has none."""
    names, sizes = vpd.layout.names, vpd.layout.sizes
    if unknown := sorted(set(alive) - set(names)):
        raise InputError(f"alive names {unknown}, which are no sites; sites: {list(names)}.")
    checked = {}
    for name, size in zip(names, sizes, strict=True):
        index = torch.as_tensor(alive.get(name, ()), dtype=torch.long).cpu().unique()
        if len(index) and not (int(index[0]) >= 0 and int(index[-1]) < size):
            raise InputError(
                f"alive[{name!r}] has indices from {int(index[0])} to {int(index[-1])}; expected 0 "
                f"to {size - 1}."
            )
        checked[name] = index
    return checked


# ------------------------------------------------------------------ batch after batch


class Engine:
    """Computes the tables of a batch and adds them to those of the batches before.

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

    @property
    def n_passes(self) -> int:
        """Forward and backward passes per batch."""
        return 1 + sum(
            route.n_passes(*self.reads[name].shape, absolute)
            for name, route in self.routes.items()
            for absolute in (False, True)[: 1 + self._has_absolute(name)]
        )

    def shapes(self) -> Iterator[tuple[str, int, int]]:
        """Name, number of targets and number of sources of every table."""
        for name, places in self.places.items():
            n_sources = sum(self.directions.n_sources(place) for place in places)
            yield name, self.reads[name].shape[1] if name in self.reads else n_sources, n_sources

    def require_small(self, limit: float) -> None:
        """Refuse tables of more than `limit` GiB."""
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

    def add(
        self,
        result: DatasetAttributions,
        batch: Batch,
        count_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """Add one batch on the model's device, calling `count_pass` after each of `n_passes`."""
        seen = observe(self.forward, self.directions, self.alive, batch)
        seen.count_pass = count_pass
        count_pass()
        for name, route in self.routes.items():
            result.signed[name] += route(seen, self.reads[name], None)
            if name in result.absolute:
                sign = seen.acts[name].sign()
                result.absolute[name] += route(seen, self.reads[name], sign)
        if OUTPUT in self.places and self.own_logits:
            result.signed[OUTPUT] += seen.weighted["unembed"].sum(0).diag()
        self._add_sums(result, seen)

    def _add_sums(self, result: DatasetAttributions, seen: Observed) -> None:
        for name in self.alive:
            result.importance[name] += seen.importance[name].sum(0)
            result.squares[name] += seen.acts[name].square().sum(0)
        real = slice(None) if seen.real is None else seen.real
        tokens = seen.tokens[real]
        ones = torch.ones_like(tokens, dtype=torch.float64)
        result.token_counts.index_add_(0, tokens, ones)
        x = seen.cut.inputs["unembed"].detach().flatten(0, -2)[real].float()
        logits = x @ self.unembed.weight.float()
        if self.unembed.bias is not None:
            logits += self.unembed.bias
        result.logit_squares += logits.square().sum(0)
        result.n_positions += len(tokens)
        result.n_batches += 1
