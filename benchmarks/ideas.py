"""Ideas of the method's authors, each a few lines over this library's training step.

    python benchmarks/ideas.py smooth-l0 --weights FOLDER
    python benchmarks/ideas.py smooth-l0 --weights FOLDER --seed 1 --set minimality.coefficient=1e-3

Decomposes the target S of `step.py` with `VPDConfig.small()` and one idea, evaluates it and writes
a record with everything that is needed to repeat it to `docs/results/ideas`. `FOLDER` holds
`model.safetensors`, `train_tokens.npy` and `eval_tokens.npy` of a trained target.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file
from step import CONFIGURATIONS, build, load_weights
from torch import Tensor, nn

import vpd_lens
from vpd_lens.decomposition.masks import SourceMasks, uniform_sources
from vpd_lens.decomposition.sigmoids import lower_leaky, upper_leaky
from vpd_lens.experiments.record import Machine, versions
from vpd_lens.files import write_json
from vpd_lens.training import VPDConfig
from vpd_lens.training.initialisation import align
from vpd_lens.training.losses import importance_power_sum, minimality
from vpd_lens.training.schedules import exponent
from vpd_lens.training.step import Losses, Stepper, warm_up_faithfulness

TARGET = CONFIGURATIONS["S"]
COUNTS = {**TARGET["counts"], "q": 64, "k": 64}
EVALUATED_ROWS = 128
Options = dict[str, float]

# ------------------------------------------------------------------------------------- the ideas


class Idea(Stepper):
    """`VPDConfig.small()` as it is; `options` are what an idea has to choose."""

    options: Options = {}
    changes: dict[str, Any] = {}

    def step(self, batch: Tensor, step: int) -> tuple[Losses, Tensor]:
        self.now = step
        return super().step(batch, step)


class NoRestart(Idea):
    """The fast adversary alone: lr 0.1, and sources never start over."""

    changes = {"adversary.restart": 0.0}


class Penalty(Idea):
    """Another minimality loss, in place of the fused one and with its coefficient."""

    def size(self, z: Tensor) -> Tensor:
        """How much of each subcomponent is in use, summed over positions, `[C_total]`."""
        minimal = self.config.minimality
        p = exponent(minimal, self.now, self.config.steps)
        return importance_power_sum(z, p, minimal.eps)

    def price(self, size: Tensor, n_positions: int) -> Tensor:
        """The loss, from the sizes."""
        return minimality(size, n_positions, self.config.minimality.frequency)

    def _reconstruction(self, part: Any, n_parts: int) -> Losses:
        losses = super()._reconstruction(part, n_parts)
        return losses | {"penalty": self.price(self.size(part.z), part.z[..., 0].numel())}

    def _weights(self) -> list[tuple[str, float]]:
        renamed = {"minimality": "penalty"}
        return [(renamed.get(name, name), weight) for name, weight in super()._weights()]


class SmoothL0(Penalty):
    """`c^2 / (c^2 + gamma^2)`, 1 at `c = 1`, in place of `c^p`: its slope is bounded.

    Gamma falls linearly from 1 to its end over the first 90 % of training.
    """

    options = {"gamma_end": 0.01}

    def size(self, z: Tensor) -> Tensor:
        done = min(1.0, self.now / (0.9 * self.config.steps))
        gamma = 1 + (self.options["gamma_end"] - 1) * done
        square = upper_leaky(z).square()
        return ((1 + gamma**2) * square / (square + gamma**2)).flatten(0, -2).sum(0)


class Frequency(Penalty):
    """Importance plus `weight * sum_c f_c log2(1 + reference f_c)`, f the mean use of c.

    The frequency term sees a debiased moving average of f over many batches, its gradient flows
    through this batch's f. With `half_life` 0, weight `beta` and reference `B T` this is the
    fused loss.
    """

    options = {"weight": 0.5, "reference": 1024.0, "half_life": 20.0}

    def price(self, size: Tensor, n_positions: int) -> Tensor:
        f = size / n_positions
        average = self._average(f.detach()) + f - f.detach()
        frequency = average * torch.log2(1 + self.options["reference"] * average)
        return f.sum() + self.options["weight"] * frequency.sum()

    def _average(self, f: Tensor) -> Tensor:
        half_life = self.options["half_life"]
        decay = 0.5 ** (1 / half_life) if half_life else 0.0
        self.sum = decay * getattr(self, "sum", 0.0) + (1 - decay) * f
        return self.sum / (1 - decay ** (self.now + 1))


class SmoothL0Frequency(SmoothL0, Frequency):
    """Both, as in the authors' newest code."""

    options = {**SmoothL0.options, **Frequency.options}


class RelativeFaithfulness(Idea):
    """`mean_l ||Delta_l||^2 / ||W_l||^2`: small sites count as much as large ones."""

    changes = {"faithfulness.coefficient": 1e3}

    def _faithfulness(self) -> Tensor:
        deltas = self.vpd.subcomponents.deltas(self.weights)
        pairs = zip(deltas, self.weights, strict=True)
        return torch.stack([d.square().sum() / w.square().sum() for d, w in pairs]).mean()


class Merged(Idea):
    """One masked forward for the stochastic and the adversarial loss together.

    Each sequence takes the adversary's sources with the probability that makes the expected loss
    that of the two apart, random ones otherwise.
    """

    def shape(self, masks: SourceMasks) -> tuple[int, ...]:
        """What chooses independently: a sequence."""
        return (masks.importance.shape[0], 1, 1)

    def _reconstruction(self, part: Any, n_parts: int) -> Losses:
        g = lower_leaky(part.z)
        adversarial = self.adversary.masks(g, part.rows)
        masks = uniform_sources(g, self.vpd.layout, self.generator).over(g)
        fraction = self.config.adversary.coefficient / self._merged_coefficient()
        chance = torch.rand(self.shape(masks), generator=self.generator, device=g.device)
        chosen = chance < fraction
        masks.components = torch.where(chosen, adversarial.components, masks.components)
        masks.delta = torch.where(chosen[..., :1], adversarial.delta, masks.delta)
        return {"merged": part.under(self.run)(masks)}

    def _merged_coefficient(self) -> float:
        return self.config.stochastic.coefficient + self.config.adversary.coefficient

    def _weights(self) -> list[tuple[str, float]]:
        return [("merged", self._merged_coefficient()), *super()._weights()]


class MergedPositions(Merged):
    """The same, chosen position by position."""

    def shape(self, masks: SourceMasks) -> tuple[int, ...]:
        return (*masks.importance.shape[:-1], 1)


class MergedSubcomponents(Merged):
    """The same, chosen subcomponent by subcomponent in each sequence."""

    def shape(self, masks: SourceMasks) -> tuple[int, ...]:
        return (masks.importance.shape[0], 1, masks.importance.shape[-1])


IDEAS: dict[str, type[Idea]] = {
    "base": Idea,
    "no-restart": NoRestart,
    "smooth-l0": SmoothL0,
    "frequency": Frequency,
    "smooth-l0-frequency": SmoothL0Frequency,
    "relative-faithfulness": RelativeFaithfulness,
    "merged": Merged,
    "merged-positions": MergedPositions,
    "merged-subcomponents": MergedSubcomponents,
}

# --------------------------------------------------------------------------------------- one run


def load_target(folder: Path) -> nn.Module:
    """The trained target, whole: matrices by `step.py`, embeddings and norms here."""
    model = build("S", "hooked_transformer")
    load_weights(model, folder)
    tensors = load_file(folder / "model.safetensors")
    named = {"embed.W_E": "embed.weight", "ln_final.w": "norm_out.scale"}
    for layer in range(TARGET["target"]["n_layers"]):
        named[f"blocks.{layer}.ln1.w"] = f"layers.{layer}.norm_attn.scale"
        named[f"blocks.{layer}.ln2.w"] = f"layers.{layer}.norm_mlp.scale"
    rest = {name: tensors[saved] for name, saved in named.items()}
    model.load_state_dict(rest | {"unembed.W_U": tensors["unembed.weight"].T}, strict=False)
    return model


def tokens(folder: Path, split: str) -> Tensor:
    return torch.from_numpy(np.load(folder / f"{split}_tokens.npy").astype(np.int64))


def train(model: nn.Module, stepper: Idea, stream: Tensor) -> dict[str, float]:
    """Train as `vpd_lens.train` does; seconds, without the first step, which compiles."""
    config = stepper.config
    align(model.vpd.subcomponents, model.vpd.sites)
    warm_up_faithfulness(stepper)
    generator = torch.Generator().manual_seed(config.seed + 1)
    positions = torch.arange(TARGET["n_ctx"])
    wall = cpu = 0.0
    for index in track(range(config.steps), "Training"):
        shape = (config.batch_size, 1)
        starts = torch.randint(len(stream) - len(positions), shape, generator=generator)
        stepper.step(stream[starts + positions], index)
        if index == 0:
            wall, cpu = time.perf_counter(), time.process_time()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def figures(model: nn.Module, held_out: Tensor, attack: list[int]) -> dict[str, Any]:
    """What the table of the documentation shows."""
    report = vpd_lens.evaluate(
        model, held_out, batch_size=len(held_out), n_batches=1, pgd_steps=attack, progress=False
    )
    kl = {name: mode["kl"] for name, mode in report.modes.items()}
    return {"l0": report.l0["0"]["total"], "alive": report.alive["total"], "kl": kl} | {
        "adversary": report.pgd
    }


def perform(options: argparse.Namespace) -> dict[str, Any]:
    """One run, as a record."""
    idea = IDEAS[options.idea]
    config = VPDConfig.small(steps=options.steps, seed=options.seed, compile=True).replaced(
        {
            "n_subcomponents": {rf"\.{part}$": count for part, count in COUNTS.items()},
            **{f"importance.{name}": value for name, value in TARGET["importance"].items()},
            "minimality.coefficient": 1.2e-3,
            **idea.changes,
            **options.set,
        }
    )
    model = load_target(options.weights)
    counts = config.n_subcomponents
    vpd_lens.decompose(
        model, n_subcomponents=counts, importance=config.importance, seed=config.seed
    )
    stepper = idea(model.vpd, config)
    stepper.options = {**idea.options, **options.option}
    seconds = train(model, stepper, tokens(options.weights, "train"))
    length = TARGET["n_ctx"]
    held_out = tokens(options.weights, "eval")[: EVALUATED_ROWS * length].view(-1, length)
    return {
        "idea": options.idea,
        "options": stepper.options,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "seconds": seconds,
        "figures": figures(model, held_out, options.attack),
        "versions": versions(),
        "machine": Machine.this().model_dump(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("idea", choices=IDEAS)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=assignment, nargs="*", default=[], help="of VPDConfig")
    parser.add_argument("--option", type=assignment, nargs="*", default=[], help="of the idea")
    parser.add_argument("--attack", type=int, nargs="*", default=[20, 80])
    parser.add_argument("--name", help="of the record; by default the idea and the seed")
    parser.add_argument("--output", type=Path, default=Path("docs/results/ideas"))
    options = parser.parse_args()
    options.set, options.option = dict(options.set), dict(options.option)
    torch.set_num_threads(1)
    record = perform(options)
    options.output.mkdir(parents=True, exist_ok=True)
    name = options.name or f"{options.idea},seed={options.seed}"
    write_json(options.output / f"{name}.json", record)
    print(name, json.dumps(record["figures"]), json.dumps(record["seconds"]), flush=True)


if __name__ == "__main__":
    main()
