"""What a change does to the training step: two commits in turns, as paired ratios.

    python benchmarks/commits.py
    python benchmarks/commits.py HEAD~20 HEAD --configuration M --set compile=true --json out.json

Compares a commit (`HEAD`) with another (what lies in the working tree). Each is checked out into a
temporary git worktree and imported by a process of its own, which waits while the other computes.
Both train from one seed on the same batches, so that their losses agree unless the change altered
what is computed: the largest relative difference is printed too. The scripts are those of this
folder on both sides; a commit whose configuration or step they do not fit cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from pairs import ratio
from rich.console import Console
from rich.progress import track
from rich.table import Table
from settings import variant
from step import CONFIGURATIONS, PHASES

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("commit_worker.py")
WORKING_TREE = "the working tree"
WARM_UP = 2
PROFILED = 3


def git(*arguments: str, check: bool = True) -> str:
    """What git prints, run in this repository."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checkout(commit: str | None) -> Iterator[tuple[str, Path]]:
    """The name and the tree of a commit, which is there inside the block; `None`: what is here."""
    if commit is None:
        yield f"{WORKING_TREE}, {git('describe', '--always', '--dirty', '--exclude=*')}", ROOT
        return
    name = git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="vpd-lens-") as folder:
        tree = Path(folder).resolve() / name
        try:
            git("worktree", "add", "--detach", str(tree), name)
            yield name, tree
        finally:
            git("worktree", "remove", "--force", str(tree), check=False)


class Side:
    """A process that imports `vpd_lens` from a tree and computes only when asked.

    Args:
        name: What the tree holds, for messages.
        tree: Holds the package.
        settings: What to build, as the worker takes it.
    """

    def __init__(self, name: str, tree: Path, settings: dict[str, Any]) -> None:
        self.name = name
        # In a session of its own: Ctrl-C is for this process, which then closes the others.
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), json.dumps(settings)],
            env={"KINETO_LOG_LEVEL": "99", **os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, request: str) -> Any:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            print(request, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        """Wait for one line of JSON."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended; what it printed is above.")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def measure(commits: list[str | None], settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Both sides' steps in turns; every other round begins with the other side."""
    settings = settings | {"requests": WARM_UP + rounds + PROFILED + 1}
    with ExitStack() as stack:
        sides = []
        for commit in commits:
            name, tree = stack.enter_context(checkout(commit))
            side = Side(name, tree, settings)
            stack.callback(side.close)
            package = Path(side.answer())
            if not package.resolve().is_relative_to(tree):
                raise SystemExit(f"{name}: imported {package}, which is not of its tree {tree}.")
            sides.append(side)

        def in_turns(request: str, count: int) -> list[list[Any]]:
            answers: list[list[Any]] = [[], []]
            for index in track(range(count), request.capitalize(), transient=True):
                for which in (0, 1) if index % 2 == 0 else (1, 0):
                    answers[which].append(sides[which].ask(request))
            return answers

        steps = in_turns("step", WARM_UP + rounds)
        profiles = in_turns("phases", PROFILED)
        peaks = [peak for (peak,) in in_turns("memory", 1)]
        names = [side.name for side in sides]
    return {
        "commits": names,
        **{name: settings[name] for name in ("configuration", "model", "changes", "threads")},
        "trained_weights": settings["weights"] is not None,
        "rounds": rounds,
        **summary(steps, profiles),
        "peak_bytes": peaks,
        "memory_ratio": peaks[1] / peaks[0],
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }


def summary(steps: list[list[Any]], profiles: list[list[Any]]) -> dict[str, Any]:
    """Times and their ratios, the second side's to the first's, and how the losses differ."""
    times, cpu = (
        [[step[clock] for step in side[WARM_UP:]] for side in steps] for clock in ("ms", "cpu_ms")
    )
    phases = {name: [[profile[name] for profile in side] for side in profiles] for name in PHASES}
    losses = [[step["losses"] for step in side] for side in steps]
    return {
        "ms": [statistics.median(side) for side in times],
        "ratio": ratio(times[1], times[0]),
        "cpu_ms": [statistics.median(side) for side in cpu],
        "cpu_ratio": ratio(cpu[1], cpu[0]),
        "phases": {
            name: {
                "ms": [statistics.median(first), statistics.median(second)],
                "ratio": ratio(second, first)["median"],
            }
            for name, (first, second) in phases.items()
            if any(first) and any(second)
        },
        "loss_difference": {
            "first_step": differences(losses[0][:1], losses[1][:1]),
            "all_steps": differences(*losses),
        },
        "only_on_one_side": sorted(losses[0][0].keys() ^ losses[1][0].keys()),
    }


def differences(first: list[dict[str, float]], second: list[dict[str, float]]) -> dict[str, float]:
    """The largest `|a - b| / max(|a|, |b|)` of every loss that both sides have, over steps."""

    def relative(a: float, b: float) -> float:
        return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))

    common = [name for name in first[0] if name in second[0]]
    pairs = list(zip(first, second, strict=True))
    return {name: max(relative(a[name], b[name]) for a, b in pairs) for name in common}


def show(result: dict[str, Any]) -> None:
    first, second = result["commits"]
    title = f"{result['configuration']} on {result['model']}, {result['threads']} thread(s)"
    table = Table("", f"A: {first}", f"B: {second}", "B / A", "quartiles", title=title)
    for label, clock in (("step, ms", ""), ("its CPU time, ms", "cpu_")):
        a, b = result[f"{clock}ms"]
        found = result[f"{clock}ratio"]
        spread = f"{found['low']:.3f} to {found['high']:.3f}"
        table.add_row(label, f"{a:.1f}", f"{b:.1f}", f"{found['median']:.3f}", spread)
    table.add_section()
    for name, phase in result["phases"].items():
        a, b = phase["ms"]
        table.add_row(f"{name}, ms", f"{a:.1f}", f"{b:.1f}", f"{phase['ratio']:.3f}", "")
    table.add_section()
    a, b = (peak / 1e6 for peak in result["peak_bytes"])
    table.add_row("peak of tensors, MB", f"{a:.1f}", f"{b:.1f}", f"{result['memory_ratio']:.3f}")
    Console().print(table)
    for when, found in result["loss_difference"].items():
        name = max(found, key=lambda loss: found[loss])
        where = f" ({name})" if found[name] else ""
        said = when.replace("_", " ")
        print(f"largest relative difference of a loss, {said}: {found[name]:.2g}{where}")
    if result["only_on_one_side"]:
        print("losses of one side only:", ", ".join(result["only_on_one_side"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", nargs="?", default="HEAD", help="commit A (HEAD)")
    parser.add_argument("other", nargs="?", help=f"commit B ({WORKING_TREE})")
    parser.add_argument("--configuration", choices=CONFIGURATIONS, default="S")
    parser.add_argument(
        "--model", choices=("hooked_transformer", "bridge"), default="hooked_transformer"
    )
    parser.add_argument("--set", metavar="FIELD=VALUE[,...]", help="of VPDConfig, on both sides")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--rounds", type=int, default=20, help="at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # A polite kill unwinds like Ctrl-C, so that no worktree is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    settings = {
        "configuration": options.configuration,
        "model": options.model,
        "changes": variant(options.set) if options.set else {},
        "weights": str(options.weights.resolve()) if options.weights else None,
        "threads": options.threads,
    }
    result = measure([options.base, options.other], settings, options.rounds)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
