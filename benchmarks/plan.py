"""The cost model against measurement: FLOPs, peak memory and time of a step on this CPU.

    python benchmarks/plan.py --json benchmarks/results/plan.json

Every configuration of `step.py` runs on both model classes, each in a process of its own. Memory
is measured twice: as the largest sum of all tensors' storages that live at once, which is what the
model predicts, and as the growth of the process' resident memory, which includes libraries that
are loaded on first use and what the C allocator keeps. Timings of a busy machine are worthless.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from memory import live_tensors, peak_of_step
from rich.console import Console
from rich.table import Table
from step import CONFIGURATIONS, batches, build, preset, stepper_for
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from vpd_lens.training.cost.hardware import measure
from vpd_lens.training.cost.prediction import predict
from vpd_lens.training.cost.workload import Workload

aten = torch.ops.aten
# Operations that PyTorch's counter leaves out.
UNCOUNTED = {
    aten.addmm_: lambda _out, a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: (
        sdpa_flop_count(q, k, v)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


def measured(name: str, kind: str, changes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Predicted and measured figures of one configuration, in this process.

    The machine's speed is measured after the peak of the resident memory, to which it would add.
    """
    config = preset(name).replaced(changes)
    before = _resident()
    model = build(name, kind)
    stepper = stepper_for(name, model, config)
    data = batches(name, None, rounds + 4)
    times = []
    for index, batch in enumerate(data[:-2]):
        begun = time.perf_counter()
        stepper.step(batch, index)
        times.append(time.perf_counter() - begun)
    grown = _resident() - before
    live = live_tensors() + peak_of_step(stepper, data[-2], rounds + 2)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        stepper.step(data[-1], rounds + 3)
    hardware = measure("cpu")
    prediction = predict(Workload.of(model.vpd, config, CONFIGURATIONS[name]["n_ctx"]), hardware)
    return {
        "configuration": name,
        "model": kind,
        "changes": changes,
        "flops": {"predicted": prediction.flops, "measured": counter.get_total_flops()},
        "memory": {
            "predicted": prediction.memory.total,
            "live_tensors": live,
            "resident_growth": grown,
        },
        "seconds": {
            "predicted": prediction.seconds,
            "products": sum(p.product_seconds for p in prediction.phases),
            "passes": sum(p.traffic_seconds for p in prediction.phases),
            "median": statistics.median(times[2:]),
            "fastest": min(times[2:]),
        },
        "hardware": {
            "products": dict(hardware.products),
            "bandwidth": hardware.bandwidth,
            "threads": torch.get_num_threads(),
        },
        "torch": torch.__version__,
    }


def _resident() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


CASES = [
    (name, kind, changes)
    for name in ("S", "M")
    for kind in ("hooked_transformer", "bridge")
    for changes in ({}, {"adversary.scope": "position", "micro_batches": 4})
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", type=int, help="measure one case only, printed as JSON")
    options = parser.parse_args()
    if options.case is not None:
        torch.set_num_threads(options.threads)
        print(json.dumps(measured(*CASES[options.case], options.rounds)))
        return
    results = []
    for case in range(len(CASES)):
        arguments = ["--case", str(case), "--rounds", str(options.rounds)]
        arguments += ["--threads", str(options.threads)]
        done = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
        show(results)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="predicted / measured")
    for column in ("configuration", "model", "changes", "GFLOP", "live MB", "resident MB", "ms"):
        table.add_column(column)
    for result in results:
        flops, memory, seconds = result["flops"], result["memory"], result["seconds"]
        table.add_row(
            result["configuration"],
            result["model"],
            " ".join(f"{k}={v}" for k, v in result["changes"].items()),
            f"{flops['predicted'] / 1e9:.2f} / {flops['measured'] / 1e9:.2f}",
            f"{memory['predicted'] / 1e6:.0f} / {memory['live_tensors'] / 1e6:.0f}",
            f"{memory['predicted'] / 1e6:.0f} / {memory['resident_growth'] / 1e6:.0f}",
            f"{1e3 * seconds['predicted']:.0f} / {1e3 * seconds['median']:.0f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
