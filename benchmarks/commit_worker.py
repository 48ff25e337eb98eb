"""One side of `commits.py`: trains with the `vpd_lens` of its PYTHONPATH, a step per request.

The arguments are one JSON object. Every line of standard input is a request, `step`, `phases` or
`memory`; each takes the next batch and is answered by one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from memory import live_tensors, peak_of_step
from step import batches, build, load_weights, phases, preset, stepper_for
from torch import Tensor

import vpd_lens
from vpd_lens.training.step import Stepper


def timed_step(stepper: Stepper, batch: Tensor, index: int) -> dict[str, Any]:
    begun, cpu_begun = time.perf_counter(), time.process_time()
    losses, _ = stepper.step(batch, index)
    ended, cpu_ended = time.perf_counter(), time.process_time()
    return {
        "ms": 1e3 * (ended - begun),
        "cpu_ms": 1e3 * (cpu_ended - cpu_begun),
        "losses": {name: float(loss) for name, loss in losses.items()},
    }


ANSWERS = {
    "step": timed_step,
    "phases": lambda stepper, batch, _: phases(stepper.step, batch, repeats=1),
    "memory": lambda stepper, batch, index: live_tensors() + peak_of_step(stepper, batch, index),
}


def main() -> None:
    settings = json.loads(sys.argv[1])
    # Whatever else prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(settings["threads"])
    name, weights = settings["configuration"], settings["weights"]
    folder = Path(weights) if weights else None
    model = build(name, settings["model"])
    if folder is not None:
        load_weights(model, folder)
    stepper = stepper_for(name, model, preset(name).replaced(settings["changes"]))
    data = batches(name, folder, settings["requests"])
    print(json.dumps(vpd_lens.__file__), file=answers, flush=True)
    for index, request in enumerate(sys.stdin):
        answer = ANSWERS[request.strip()](stepper, data[index], index)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
