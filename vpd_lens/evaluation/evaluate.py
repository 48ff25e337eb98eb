"""`evaluate`: measure a decomposition on data and return a report."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens.data import Batch, one_pass
from vpd_lens.decomposition import Decomposition, Divergence
from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.decomposition.idle import contributing
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.modes import masks_of
from vpd_lens.errors import InputError
from vpd_lens.evaluation import audit as audits
from vpd_lens.evaluation import metrics
from vpd_lens.evaluation.report import EvalReport
from vpd_lens.progress import Progress

WITH_HIDDEN_ERROR = ("stochastic", "ci")
NOTHING_HAPPENS = 1e-7


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 16,
    n_batches: int = 8,
    seq_len: int | None = None,
    thresholds: Sequence[float] = (0.0, 0.01, 0.1, 0.5),
    rounding: Sequence[float] = (0.0, 0.1, 0.5),
    pgd_steps: Sequence[int] = (20, 40, 80, 160, 320),
    pgd_step_size: float = 0.1,
    pgd_restarts: int = 3,
    pgd_batches: int = 1,
    audit: bool = False,
    audit_batches: int = 1,
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> EvalReport:
    """Measure a decomposition: faithfulness, sparsity, and robustness to ablation.

    Every row of the data is measured at most once, in order; the short last batch counts by its
    positions, and padding (an `attention_mask` in the data, texts of unequal length) not at all.
    Works inside `torch.no_grad()` and `torch.inference_mode()` too.

    Args:
        model: A decomposed model.
        data: As for `vpd_lens.train`; held-out data, please.
        batch_size: Sequences per batch.
        n_batches: Batches; fewer if the data ends before.
        seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
        thresholds: L0 counts subcomponents with importance above each.
        rounding: Thresholds of the rounded masks.
        pgd_steps: Step counts of the adversarial curve; empty skips it.
        pgd_step_size: Size of a sign step; `steps * size` of about 2 crosses [0, 1] twice.
        pgd_restarts: Random starts of the adversary, reported as mean and maximum.
        pgd_batches: Batches on which the adversary is run; each is a fresh attack.
        audit: Also switch on what other tokens need, delete what none needs, raise what is in use
            and mask some layers only (`Audit`): about sixty forwards a batch.
        audit_batches: Batches that are audited.
        seed: Seed of masks and adversary; the report is reproducible bit for bit on CPU.
        prepend_bos: BOS policy for text; `None` follows the model.
        progress: Show a progress bar, which moves with every forward.

    Raises:
        AttachError: If the model carries no decomposition.
        DataError: If the data does not fit the model.
        InputError: If the divergence is KL and the model has a single logit.
    """
    vpd = decomposition_of(model)
    # The adversary needs gradients.
    with torch.inference_mode(False), torch.enable_grad(), vpd.kept_below():
        sizes = {"batch_size": batch_size, "n_batches": n_batches, "seq_len": seq_len}
        batches = one_pass(data, model=model, **sizes, prepend_bos=prepend_bos, seed=seed)
        measured = _Measurement(vpd, thresholds, rounding, seed)
        n_forwards = n_batches * (1 + len(measured.modes))
        if pgd_steps:
            n_forwards += pgd_batches * pgd_restarts * (max(pgd_steps) + 1)
        if audit:
            n_forwards += audit_batches * audits.n_forwards(vpd)
        audited: list[audits.Audited] = []
        with Progress("Evaluating", n_forwards, show=progress) as bar:
            for index, batch in enumerate(batches):
                batch = batch.to(vpd.device)
                found = (batch, *measured.add(batch, bar.advance))
                if audit and index < audit_batches:
                    audited.append(audits.Audited(*found))
                for _ in range(pgd_restarts if pgd_steps and index < pgd_batches else 0):
                    adversary = (pgd_steps, pgd_step_size, measured.generator, bar.advance)
                    measured.curves.append(metrics.pgd_curve(vpd, *found, *adversary))
            result = None
            if audit:
                drawn = (measured.sparsity.largest, measured.generator, bar.advance)
                result = audits.audit(vpd, audited, *drawn)
        return measured.report(seed, result)


class _Measurement:
    """Sums over the batches so far."""

    def __init__(
        self, vpd: Decomposition, thresholds: Sequence[float], rounding: Sequence[float], seed: int
    ) -> None:
        self.vpd = vpd
        self.generator = torch.Generator(device=vpd.device).manual_seed(seed)
        self.sparsity = metrics.Sparsity(vpd.layout, thresholds, vpd.device)
        self.contributing = metrics.Sparsity(vpd.layout, thresholds, vpd.device)
        self.modes = metrics.reported_modes(rounding)
        self.divergences, self.cross_entropies = metrics.Means(), metrics.Means()
        self.hidden = {mode: metrics.Means() for mode in WITH_HIDDEN_ERROR}
        self.curves: list[dict[int, float]] = []
        self.predicts_next_token = True
        self.batch_shape: list[int] = []

    @torch.no_grad()
    def add(self, batch: Batch, tick: Callable[[], Any]) -> tuple[Tensor, Divergence]:
        """Measure one batch under all masking modes; returns what the adversary needs."""
        vpd, (tokens, real) = self.vpd, batch
        self.batch_shape = self.batch_shape or list(tokens.shape)
        output, inputs = vpd.target(tokens, **batch.mask_argument())
        if vpd.divergence == "kl" and output.shape[-1] == 1:
            raise InputError(
                "the model has one logit per position, so its KL divergence is 0 whatever the "
                "masks do. Decompose it with divergence='mse'."
            )
        importance = lower_leaky(vpd.pre_importance(inputs, real))
        self.sparsity.add(importance, real)
        self.contributing.add(importance * contributing(vpd, inputs), real)
        n_positions = math.prod(importance.shape[:-1]) if real is None else int(real.sum())
        divergence = Divergence(output, vpd.divergence, real)
        if vpd.divergence != "kl" or not metrics.predicts_next_token(vpd.model, tokens, output):
            self.predicts_next_token = False
        self.divergences.add("blind", float(divergence.blind()), n_positions)
        self._add_cross_entropy("target", output, batch)
        tick()
        for name, (mode, threshold) in self.modes.items():
            masks = masks_of(mode, importance, vpd.layout, self.generator, threshold, real)
            if mode in WITH_HIDDEN_ERROR:
                masked, outputs = vpd.run_recording(masks, tokens, **batch.mask_argument())
                for site, error in metrics.hidden_errors(vpd, inputs, outputs, real).items():
                    self.hidden[mode].add(site, error, n_positions)
            else:
                masked = vpd.run(masks, tokens, **batch.mask_argument())
            self.divergences.add(name, float(divergence(masked)), n_positions)
            self._add_cross_entropy(name, masked, batch)
            tick()
        return importance, divergence

    def _add_cross_entropy(self, name: str, output: Tensor, batch: Batch) -> None:
        if self.predicts_next_token:
            mean, n = metrics.next_token_cross_entropy(output, batch.tokens, batch.real)
            self.cross_entropies.add(name, mean, n)

    def report(self, seed: int, audit: audits.Audit | None = None) -> EvalReport:
        vpd = self.vpd
        steps = sorted(self.curves[0]) if self.curves else ()
        pgd = {str(n): [curve[n] for curve in self.curves] for n in steps}
        return EvalReport(
            modes=self._mode_table(),
            pgd={n: _over_attacks(kl) for n, kl in pgd.items()},
            l0=self.sparsity.l0(),
            alive=self.sparsity.alive(),
            l0_contributing=self.contributing.l0(),
            alive_contributing=self.contributing.alive(),
            n_subcomponents=dict(zip(vpd.layout.names, vpd.layout.sizes, strict=True)),
            hidden_error={mode: errors.means() for mode, errors in self.hidden.items()},
            delta=metrics.delta_sizes(vpd),
            ci_histogram=self.sparsity.histogram.tolist(),
            mean_ci=self.sparsity.sorted_by_site(),
            blind=self.divergences.means()["blind"],
            divergence=vpd.divergence if isinstance(vpd.divergence, str) else "custom",
            n_positions=self.sparsity.n_positions,
            batch_shape=self.batch_shape,
            n_pgd_runs=len(self.curves),
            seed=seed,
            trained_steps=vpd.trained_steps,
            audit=audit,
        )

    def _mode_table(self) -> dict[str, dict[str, float]]:
        means = self.divergences.means()
        table = {name: {"kl": means[name]} for name in self.modes}
        if (nothing := table["zero"]["kl"]) < NOTHING_HAPPENS:
            warnings.warn(
                f"with every decomposed matrix ablated the divergence is {nothing:.1e}: "
                "the output hardly depends on them, or the divergence does not see it. The figures "
                "of this report then say nothing. Decompose other sites, or pass divergence=.",
                stacklevel=4,
            )
        means = self.cross_entropies.means()
        if not self.predicts_next_token or not means:
            return table
        table = {"target": {"kl": 0.0}, **table}
        lost = means["zero"] - means["target"]
        for name, row in table.items():
            row["ce"] = means[name]
            row["ce_recovered"] = 1 - (row["ce"] - means["target"]) / lost if lost else math.nan
        return table


def _over_attacks(divergences: list[float]) -> dict[str, float]:
    """Mean and maximum over attacks, and the standard error of the mean if there are several."""
    n, mean = len(divergences), sum(divergences) / len(divergences)
    found = {"mean": mean, "max": max(divergences)}
    if n > 1:
        variance = sum((kl - mean) ** 2 for kl in divergences) / (n - 1)
        found["error"] = math.sqrt(variance / n)
    return found
