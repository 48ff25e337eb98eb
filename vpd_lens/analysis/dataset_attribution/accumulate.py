"""`dataset_attributions`: attribution edges summed over data.

Phases: what is alive; by which route each matrix' table is computed; then batch after batch one
forward pass, cut at the matrices, and the tables added up. Source: VPD, attribution graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vpd_lens.analysis.circuits.cut_forward import CutForward
from vpd_lens.analysis.circuits.targets import explained_decomposition
from vpd_lens.analysis.dataset_attribution.batch import Observer, flat
from vpd_lens.analysis.dataset_attribution.result import OUTPUT, DatasetAttributions, Settings
from vpd_lens.analysis.dataset_attribution.routes import choose_routes
from vpd_lens.analysis.gathering import check_output, check_same, check_size, chosen, gather, origin
from vpd_lens.analysis.usage import above, mean_importance
from vpd_lens.data import Batch, one_pass
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import InputError
from vpd_lens.evaluation.metrics import ALIVE
from vpd_lens.progress import Progress
from vpd_lens.sites import find_sites

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
        ArtefactError: If what is in `output` is damaged or of something else.
        DataError: If the data does not fit the model, or is not that of the interrupted pass.
    """
    vpd = explained_decomposition(model)
    check_output(n_batches, output, resume)
    if not 0 <= alive_threshold < 1:
        raise InputError(f"alive_threshold is {alive_threshold:g}; expected a number in [0, 1).")
    names = chosen("targets", targets, "all", (*vpd.layout.names, OUTPUT))
    settings = Settings(
        alive_threshold=alive_threshold, absolute=absolute, frozen=frozen, targets=names
    )
    read = partial(
        one_pass, data, model=model, batch_size=batch_size, seq_len=seq_len, prepend_bos=prepend_bos
    )
    given = None if alive is None else _checked_alive(vpd, alive)
    stored = DatasetAttributions.load(output, vpd) if resume else None
    if stored is not None:
        other = given is not None and any(not given[n].equal(stored.alive[n]) for n in given)
        check_same(output, stored.settings, settings, ["alive was another choice"] * other)
        given = stored.alive
    elif given is None:
        if isinstance(data, Iterator):
            raise InputError(
                f"data is a {type(data).__name__}, which can be read only once, but what is alive "
                "is found in a pass of its own. Give alive={site: indices}, or an iterable."
            )
        with Progress("Finding what is alive", n_batches, show=progress) as bar:
            means = mean_importance(vpd, bar.counting(read(n_batches=n_batches)))
        if not bool((means > alive_threshold).any()):
            raise InputError(
                f"alive_threshold={alive_threshold:g}: no subcomponent's mean importance exceeds "
                f"it; the largest is {float(means.max()):.2g}. Lower it."
            )
        given = above(vpd, means, alive_threshold)
    engine = Engine(vpd, given, settings)
    advice = "Take some targets at a time with targets=[...], raise alive_threshold"
    size = check_size(engine.empty, memory_limit, advice)
    result = engine.empty() if stored is None else stored
    total, done = (n * engine.n_passes for n in (n_batches, result.n_batches))
    batches = read(state=result.data_state)
    cost = (
        f"{engine.n_passes} passes forward or backward for each of {n_batches} batches of "
        f"{batch_size} sequences; {size}"
    )
    with Progress("Attributing", total, done, progress, cost) as bar:
        engine.observer.count_pass = bar.advance
        return gather(result, engine.add, batches, n_batches, output, save_every, vpd.device)


class Engine:
    """Computes the tables of a batch and adds them to those of the batches before."""

    def __init__(self, vpd: Decomposition, alive: dict[str, Tensor], settings: Settings) -> None:
        self.settings = settings
        self.observer = Observer(CutForward(vpd, settings.frozen, through_delta=False), alive)
        self.unembed = find_sites(vpd.model, ["unembed"])[0]
        # A decomposed unembedding cuts the logits off from everything but its own subcomponents.
        own = self.observer.write.get("unembed")
        self.readout = self.unembed.weight.float() if own is None else own
        self.origin = origin(vpd, max(self.observer.n_tokens, self.readout.shape[1]))
        axes = torch.eye(len(self.readout), device=vpd.device)
        reads = {name: self.observer.read.get(name, axes) for name in settings.targets}
        self.reads = {n: read for n, read in reads.items() if n == OUTPUT or read.shape[1]}
        self.routes = choose_routes(self.observer, list(self.reads))

    @property
    def n_passes(self) -> int:
        """Forward and backward passes per batch."""
        return 1 + sum(
            route.n_passes(self.reads[name], absolute)
            for name, route in self.routes.items()
            for absolute in {False, self.settings.absolute and name != OUTPUT}
        )

    def empty(self) -> DatasetAttributions:
        """Attributions over nothing yet."""
        seen, places = self.observer, {name: r.places for name, r in self.routes.items()}
        kept = {"places": places, "settings": self.settings, **self.origin}
        return DatasetAttributions.empty(seen.alive, self.readout, seen.n_tokens, **kept)

    def add(self, result: DatasetAttributions, batch: Batch) -> None:
        """Add one batch on the model's device."""
        seen = self.observer(batch)
        for name, route in self.routes.items():
            result.signed[name] += route(seen, self.reads[name], None)
            if name in result.absolute:
                result.absolute[name] += route(seen, self.reads[name], seen.acts[name].sign())
        for name, g in seen.importance.items():
            result.importance[name] += g.sum(0)
            result.squares[name] += seen.acts[name].square().sum(0)
        result.token_counts += seen.tokens.bincount(minlength=len(result.token_counts))
        x = flat(seen.cut.inputs["unembed"].detach(), seen.real)
        logits = x @ self.unembed.weight.float()
        if self.unembed.bias is not None:
            logits += self.unembed.bias
        result.logit_squares += logits.square().sum(0)
        result.n_positions += len(seen.tokens)
        result.n_batches += 1


def _checked_alive(vpd: Decomposition, alive: Indices) -> dict[str, Tensor]:
    """Indices as users give them, sorted, for every site; a site left out has none."""
    sizes = dict(zip(vpd.layout.names, vpd.layout.sizes, strict=True))
    if unknown := sorted(alive.keys() - sizes.keys()):
        raise InputError(f"alive names {unknown}, which are no sites; sites: {list(sizes)}.")
    checked = {n: torch.as_tensor(alive.get(n, ()), dtype=torch.long).cpu().unique() for n in sizes}
    for name, size in sizes.items():
        first, last = checked[name][[0, -1]].tolist() if len(checked[name]) else (0, -1)
        if first < 0 or last >= size:
            raise InputError(
                f"alive[{name!r}] has indices from {first} to {last}; expected 0 to {size - 1}."
            )
    return checked
