"""What `vpd-lens plan` prints and writes."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vpd_lens.training.cost.named import NAMED
from vpd_lens.training.cost.prediction import Prediction
from vpd_lens.training.cost.products import products
from vpd_lens.training.cost.remedies import remedies
from vpd_lens.training.cost.workload import Workload

# Reported for the authors' own code: 8 GPUs, and one with an eighth of the batch.
_AUTHORS = (
    "The authors report for their code on this target, batch 64 x 512: 3.99 steps/s on 8 H100; on "
    "one H100 with batch 8 x 512 2.73 steps/s, 3.42 compiled. It also multiplies by the dense "
    "deltas and runs a second backward pass for the sources, which are not counted here."
)


def tables(prediction: Prediction) -> Group:
    """Phases, memory and verdict, for `rich.print`."""
    parts: list[Any] = [_heading(prediction), _phases(prediction), _memory(prediction)]
    parts += [_speed(prediction), _verdict(prediction)]
    if prediction.work.target == NAMED["vpd-67m"]:
        parts.append(Text(f"\n{_AUTHORS}"))
    return Group(*parts)


def _heading(prediction: Prediction) -> Text:
    work, hardware = prediction.work, prediction.hardware
    return Text(
        f"Target: {_count(work.target.parameters)} parameters, {len(work.sites)} sites with "
        f"{_count(work.decomposed)}, {work.c_total:,} subcomponents\n"
        f"Trained: V and U {_count(work.directions)}, importance function "
        f"{_count(work.importance_parameters)}\n"
        f"Step: {work.config.batch_size} sequences of {work.seq_len} tokens on {work.n_ranks} x "
        f"{hardware.name}, {work.config.micro_batches} micro-batch(es) each, {work.precision}\n"
        f"{hardware.name}: {hardware.source}"
    )


def _phases(prediction: Prediction) -> Table:
    title = "One step on one GPU" if prediction.hardware.is_gpu else "One step"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("phase", no_wrap=True)
    for column in ("n", "TFLOP", "products ms", "moved GB", "passes ms"):
        table.add_column(column, justify="right")
    for phase in prediction.phases:
        table.add_row(
            phase.name,
            str(phase.passes),
            _figure(phase.flops / 1e12),
            _figure(1e3 * phase.product_seconds),
            _figure(phase.moved / 1e9),
            _figure(1e3 * phase.traffic_seconds),
        )
    table.add_section()
    table.add_row(
        "in all",
        "",
        _figure(prediction.flops / 1e12),
        _figure(1e3 * sum(p.product_seconds for p in prediction.phases)),
        _figure(sum(p.moved for p in prediction.phases) / 1e9),
        _figure(1e3 * sum(p.traffic_seconds for p in prediction.phases)),
    )
    return table


def _memory(prediction: Prediction) -> Table:
    memory, where = prediction.memory, "GPU" if prediction.hardware.is_gpu else "process"
    title = f"Memory of one {where} at its peak ({memory.moment})"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("item", no_wrap=True)
    table.add_column("GB", justify="right")
    for name, size in sorted(memory.items.items(), key=lambda item: -item[1]):
        table.add_row(name, _figure(size / 1e9))
    table.add_section()
    table.add_row("in all", _figure(memory.total / 1e9))
    return table


def _speed(prediction: Prediction) -> Table:
    work = prediction.work
    title = f"{work.config.steps:,} steps on {work.n_ranks} x {prediction.hardware.name}"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("")
    for column in ("ms a step", "steps/s", "% of peak", "hours", "GPU hours"):
        table.add_column(column, justify="right")
    rows = {"predicted": prediction.seconds}
    if prediction.cautious_seconds is not None:
        rows["as the authors' code"] = prediction.cautious_seconds
    for name, seconds in rows.items():
        hours = seconds * work.config.steps / 3600
        table.add_row(
            name,
            _figure(1e3 * seconds),
            _figure(1 / seconds),
            f"{100 * prediction.flops / seconds / prediction.peak:.0f}",
            _figure(hours),
            _figure(hours * work.n_ranks),
        )
    return table


def _verdict(prediction: Prediction) -> Text:
    limit, lines = prediction.hardware.memory, []
    if prediction.launch_seconds > prediction.device_seconds:
        lines.append("Starting kernels takes longer than running them: try compile=true.")
    if prediction.work.n_ranks > 1:
        lines.append(
            f"Each GPU sends {_figure(prediction.communicated / 1e9)} GB a step, in "
            f"{_figure(1e3 * prediction.communication_seconds)} of the predicted ms."
        )
    if prediction.fits:
        left = limit - prediction.memory.total
        lines.append(f"Fits: {_figure(left / 1e9)} of {_figure(limit / 1e9)} GB stay free.")
    else:
        lines.append(f"Does NOT fit into {_figure(limit / 1e9)} GB. {_advice(prediction)}")
    return Text("\n".join(lines))


def _advice(prediction: Prediction) -> str:
    found = remedies(prediction.work, prediction.hardware.memory)
    if found:
        return "Any of these is enough:\n" + "\n".join(f"  {remedy}" for remedy in found)
    return (
        "Neither micro-batches, shared sources, sharding nor 64 subcomponents per site are enough: "
        "choose fewer sites, a smaller importance function, or fewer tokens per step."
    )


def record(prediction: Prediction) -> dict[str, Any]:
    """All figures, in FLOP, bytes and seconds, for JSON."""
    work, hardware = prediction.work, prediction.hardware
    return {
        "hardware": {"name": hardware.name, "source": hardware.source, "count": work.n_ranks},
        "sizes": _sizes(work),
        "phases": [vars(phase) for phase in prediction.phases],
        "flops": prediction.flops,
        "products": [vars(product) for product in products(work)],
        "seconds_per_step": prediction.seconds,
        "cautious_seconds_per_step": prediction.cautious_seconds,
        "launch_seconds": prediction.launch_seconds,
        "communication_seconds": prediction.communication_seconds,
        "steps_per_second": 1 / prediction.seconds,
        "gpu_hours": prediction.gpu_hours,
        "utilisation": prediction.utilisation,
        "memory": {
            "total": prediction.memory.total,
            "available": hardware.memory,
            "moment": prediction.memory.moment,
            "items": prediction.memory.items,
            "moments": prediction.memory.moments,
        },
        "fits": prediction.fits,
        "remedies": []
        if prediction.fits
        else [vars(remedy) for remedy in remedies(work, hardware.memory)],
        "config": work.config.model_dump(mode="json"),
    }


def _sizes(work: Workload) -> dict[str, int]:
    return {
        "target": work.target.parameters,
        "decomposed": work.decomposed,
        "subcomponents": work.c_total,
        "v_and_u": work.directions,
        "importance": work.importance_parameters,
        "positions_per_rank": work.positions,
    }


def _count(number: int | float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _figure(number: int | float) -> str:
    """Three significant digits, without exponents."""
    if number >= 100:
        return f"{float(f'{number:.3g}'):,.0f}"
    return f"{number:.3g}" if number >= 0.001 or number == 0 else "<0.001"
