"""The bench on which the paper's claims are tested: one target, many runs of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recorded.record import RunRecord
from recorded.run import Run, Target, load_decomposed, perform
from vpd_lens.analysis.comparison import Directions, directions
from vpd_lens.analysis.usage import Alive, alive_subcomponents
from vpd_lens.training import VPDConfig

BASE, WITHOUT = "vpd", "vpd-without-adversary"
WITHOUT_GENTLER = f"{WITHOUT},gentler"
# Hundreds of ascent steps take longer than the training, so only these runs are attacked so.
LONG_ATTACKED = (BASE, WITHOUT, WITHOUT_GENTLER)


@dataclass
class Laboratory:
    """Runs of one target around one configuration; several claims share runs by their name.

    Attributes:
        output: The directory of runs.
        target: What is decomposed; its held-out data are rows of tokens `[rows, pos]`.
        untrained: The same architecture with random weights, on the same data.
        base: The configuration that the runs vary.
        evaluation: Arguments of `vpd_lens.evaluate`, with `batch_size` and `n_batches`.
        long_attack: The `pgd_steps` instead, for the runs of the adversary's claim.
        progress: Show progress bars.
        say: Receives one line per run.
        records: The runs so far, by name.
    """

    output: Path
    target: Target
    untrained: Target
    base: VPDConfig
    evaluation: Mapping[str, Any]
    long_attack: Sequence[int]
    progress: bool = True
    say: Callable[[str], None] = print
    records: dict[str, RunRecord] = field(default_factory=dict)

    def run(
        self, name: str = BASE, config: VPDConfig | None = None, target: Target | None = None
    ) -> RunRecord:
        """The record of a run, made if need be.

        Args:
            name: Its name; the same name always means the same run.
            config: Its configuration; by default the base.
            target: Its target; by default the laboratory's.
        """
        if name not in self.records:
            evaluation = dict(self.evaluation)
            if name in LONG_ATTACKED:
                evaluation["pgd_steps"] = list(self.long_attack)
            run = Run(name, target or self.target, config or self.base, evaluation)
            self.records[name] = perform(run, self.output, self.progress, self.say)
        return self.records[name]

    def model(self, record: RunRecord) -> nn.Module:
        """The decomposed model of a run of the laboratory's target."""
        return load_decomposed(
            Run(record.name, self.target, record.config, self.evaluation), self.output
        )

    def alive_directions(self, record: RunRecord) -> tuple[Directions, Alive]:
        """V and U of a run, and which subcomponents its evaluation found alive."""
        vpd = self.model(record).vpd
        return directions(vpd), alive_subcomponents(vpd, self._batches())

    def _batches(self) -> tuple[Tensor, ...]:
        size, count = self.evaluation["batch_size"], self.evaluation["n_batches"]
        return self.target.held_out[: size * count].split(size)
