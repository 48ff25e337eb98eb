"""Processes for the tests. They start at once: a server that has imported everything forks them."""

import multiprocessing
import os
import sys
import time
import traceback
from uuid import uuid4

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["transformer_lens.model_bridge", "torch.distributed.launcher", "vpd_lens.training.trainer"]
)
PRINTED = "printed.txt"


def start(function, *arguments, folder):
    """Call a function in `folder`, where what the process prints goes to `PRINTED`."""
    process = CONTEXT.Process(target=_inside, args=(function, arguments, str(folder)))
    process.start()
    return process


def signalled(number, process, folder, once, seconds=600):
    """Send a signal to a process once it has come so far; then as `ended`."""
    deadline = time.monotonic() + seconds
    while process.is_alive() and not once() and time.monotonic() < deadline:
        time.sleep(0.01)
    if process.is_alive():
        os.kill(process.pid, number)
    return ended(process, folder)


def ended(process, folder, seconds=600):
    """Wait for a process; its exit status and what it printed."""
    process.join(seconds)
    process.terminate()  # which ends the processes that it started, too
    process.join()
    return process.exitcode, (folder / PRINTED).read_text()


def _inside(function, arguments, folder):
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    printed = os.open(PRINTED, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(printed, stream.fileno())
    function(*arguments)


def two(function):
    """Call a function in two processes, as `torchrun` does."""
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=0,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # at a port of their own, jobs of two workers do not meet
        start_method="fork",
    )
    elastic_launch(config, _reported)(function)


def _reported(function):
    try:
        function()
    except BaseException:
        traceback.print_exc()  # the launcher prints that of the first process to fail
        raise
