"""`evaluate`: measure a decomposition on data and return a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from vpd_lens.data import one_pass
from vpd_lens.decomposition import Decomposition, Divergence
from vpd_lens.decomposition.sigmoids import lower_leaky
from vpd_lens.errors import AttachError
from vpd_lens.evaluation.metrics import (
    Means,
    Sparsity,
    delta_sizes,
    hidden_error,
    masking_modes,
    next_token_cross_entropy,
    pgd_curve,
)
from vpd_lens.evaluation.report import EvalReport


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
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> EvalReport:
    """Measure a decomposition: faithfulness, sparsity, and robustness to ablation.

    Args:
        model: A decomposed model.
        data: As for `vpd_lens.train`; held-out data, please. Read in order, not shuffled.
        batch_size: Sequences per batch.
        n_batches: Batches; fewer if the data is a tensor with fewer rows.
        seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
        thresholds: L0 counts subcomponents with importance above each.
        rounding: Thresholds of the rounded masks.
        pgd_steps: Step counts of the adversarial curve; empty skips it.
        pgd_step_size: Size of a sign step; `steps * size` of about 2 crosses [0, 1] twice.
        pgd_restarts: Random starts of the adversary, reported as mean and maximum.
        pgd_batches: Batches on which the adversary is run; each is a fresh attack.
        seed: Seed of masks and adversary; the report is reproducible bit for bit on CPU.
        prepend_bos: BOS policy for text; `None` follows the model.
        progress: Show a progress bar.

    Returns:
        An `EvalReport`: print it, `to_json`, `to_html`.

    Raises:
        AttachError: If the model carries no decomposition.
        DataError: If the data does not fit the model.
    """
    if "vpd" not in model.__dict__:
        raise AttachError("This model carries no decomposition. Call vpd_lens.decompose first.")
    vpd: Decomposition = model.__dict__["vpd"]
    batches = _batches(model, data, batch_size, n_batches, seq_len, prepend_bos)
    generator = torch.Generator(device=vpd.device).manual_seed(seed)
    modes = masking_modes(rounding)
    sparsity = Sparsity(vpd.layout, thresholds, vpd.device)
    kl, ce, hidden = Means(), Means(), Means()
    curves: list[dict[int, float]] = []
    n_positions = 0
    for index, batch in enumerate(track(batches, "Evaluating", disable=not progress)):
        batch = batch.to(vpd.device)
        output, inputs = vpd.target(batch)
        with torch.no_grad():
            importance = lower_leaky(vpd.pre_importance(inputs))
        sparsity.add(importance)
        divergence = Divergence(output, vpd.divergence)
        tokens = batch if vpd.divergence == "kl" and batch.ndim == 2 else None
        if tokens is not None:
            ce.add("target", next_token_cross_entropy(output, tokens))
        _, clean = vpd.run_recording(None, batch)
        for name, make in modes.items():
            masks = make(importance, vpd.layout, generator)
            with torch.no_grad():
                masked = vpd.run(masks, batch)
                kl.add(name, float(divergence(masked)))
            if tokens is not None:
                ce.add(name, next_token_cross_entropy(masked, tokens))
            if name in ("stochastic", "ci"):
                for site, error in hidden_error(vpd, batch, masks, clean).items():
                    hidden.add(f"{name}/{site}", error)
        n_positions += math.prod(importance.shape[:-1])
        if pgd_steps and index < pgd_batches:
            curves += [
                pgd_curve(vpd, batch, importance, divergence, pgd_steps, pgd_step_size, generator)
                for _ in range(pgd_restarts)
            ]
    return _report(vpd, modes, kl, ce, hidden, sparsity, curves, n_positions, seed, batches)


def _batches(
    model: nn.Module,
    data: Any,
    batch_size: int,
    n_batches: int,
    seq_len: int | None,
    prepend_bos: bool | None,
) -> list[Tensor]:
    batches = one_pass(
        data,
        model=model,
        batch_size=batch_size,
        n_batches=n_batches,
        seq_len=seq_len,
        prepend_bos=prepend_bos,
    )
    return [batch.tokens for batch in batches]


def _report(
    vpd: Decomposition,
    modes: dict[str, Any],
    kl: Means,
    ce: Means,
    hidden: Means,
    sparsity: Sparsity,
    curves: list[dict[int, float]],
    n_positions: int,
    seed: int,
    batches: list[Tensor],
) -> EvalReport:
    kls, ces, errors = kl.means(), ce.means(), hidden.means()
    table: dict[str, dict[str, float]] = {}
    if ces:
        table["target"] = {"kl": 0.0, "ce": ces["target"], "ce_recovered": 1.0}
    for name in modes:
        table[name] = {"kl": kls[name]}
        if ces:
            lost = ces["zero"] - ces["target"]
            recovered = 1 - (ces[name] - ces["target"]) / lost if lost else float("nan")
            table[name] |= {"ce": ces[name], "ce_recovered": recovered}
    steps = sorted(curves[0]) if curves else []
    mean_importance = sparsity.mean_importance()
    return EvalReport(
        modes=table,
        pgd={
            str(step): {
                "mean": sum(c[step] for c in curves) / len(curves),
                "max": max(c[step] for c in curves),
            }
            for step in steps
        },
        l0=sparsity.l0(),
        alive=sparsity.alive(),
        n_subcomponents=dict(zip(vpd.layout.names, vpd.layout.sizes, strict=True)),
        hidden_error={
            mode: {n: errors[f"{mode}/{n}"] for n in vpd.layout.names}
            for mode in ("stochastic", "ci")
        },
        delta=delta_sizes(vpd),
        ci_histogram=sparsity.histogram.tolist(),
        mean_ci={
            name: part.sort(descending=True).values.tolist()
            for name, part in zip(vpd.layout.names, vpd.layout.split(mean_importance), strict=True)
        },
        divergence=vpd.divergence if isinstance(vpd.divergence, str) else "custom",
        n_positions=n_positions,
        batch_shape=list(batches[0].shape),
        n_pgd_runs=len(curves),
        seed=seed,
        trained_steps=vpd.trained_steps,
    )
