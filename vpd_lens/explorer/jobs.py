"""Long work, one after the other in a thread of its own: how far it is, and how to end it."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from vpd_lens.errors import BusyError, InputError, VPDError
from vpd_lens.progress import Progress, watching

MOST_WAITING, MOST_KEPT = 8, 30
State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass
class Job:
    """One long computation and how far it is."""

    key: str
    title: str
    state: State = "waiting"
    phase: str = ""  # of what `done` of `total` units are done
    done: int = 0
    total: int = 0
    began: float = 0.0
    error: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    to_end: threading.Event = field(default_factory=threading.Event)

    def watch(self, bar: Progress) -> None:
        """Note how far the work is; end it if that was asked for."""
        if bar.title != self.phase:
            self.began = time.monotonic()
        self.phase, self.done, self.total = bar.title, bar.done, bar.total
        if self.to_end.is_set():
            raise CancelledError

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    def shown(self) -> dict[str, Any]:
        """As pages see it; `left` are the seconds that the present phase may still take."""
        shown = ("key", "title", "state", "phase", "done", "total", "error", "result")
        passed = time.monotonic() - self.began
        left = passed / self.done * (self.total - self.done) if self.done else None
        return {name: getattr(self, name) for name in shown} | {"left": left}


class Jobs:
    """The jobs of this session, in the order in which they were started."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "explorer")
        self._jobs: dict[str, Job] = {}
        self._numbers = itertools.count(1)

    def start(self, title: str, work: Callable[[Job], dict[str, Any]]) -> Job:
        """Do some work when what came before is done; a `BusyError` if too much is waiting."""
        if sum(job.state == "waiting" for job in self.all()) >= MOST_WAITING:
            raise BusyError(f"{MOST_WAITING} jobs are waiting already; cancel some, or wait.")
        job = Job(str(next(self._numbers)), title)
        self._jobs[job.key] = job
        for old in [old for old in self.all() if old.ended][:-MOST_KEPT]:
            self._jobs.pop(old.key, None)
        self._worker.submit(self._run, job, work)
        return job

    def _run(self, job: Job, work: Callable[[Job], dict[str, Any]]) -> None:
        if job.to_end.is_set():
            job.state = "cancelled"
            return
        job.state, job.began = "running", time.monotonic()
        try:
            with watching(job.watch):
                job.result = work(job)
        except CancelledError:
            job.state = "cancelled"
        except VPDError as error:
            job.state, job.error = "failed", str(error)
        except Exception as error:  # a page is to say so, too
            logging.getLogger(__name__).exception("job %s failed", job.title)
            job.state, job.error = "failed", f"{type(error).__name__}: {error}"
        else:
            job.state = "done"

    def all(self) -> list[Job]:
        """All that are known, the oldest first."""
        return list(self._jobs.values())

    @property
    def running(self) -> Job | None:
        """The one at work."""
        return next((job for job in self.all() if job.state == "running"), None)

    def __getitem__(self, key: str) -> Job:
        """The job of a key; an `InputError` if there is none."""
        if key not in self._jobs:
            raise InputError(f"there is no job {key!r}; the explorer may have been started anew.")
        return self._jobs[key]

    def cancel(self, key: str) -> Job:
        """End a job: at once if it waits, else after the unit of work that it is at."""
        job = self[key]
        job.to_end.set()
        if job.state == "waiting":
            job.state = "cancelled"
        return job

    def close(self) -> None:
        """End all of them and wait until they have."""
        for job in self.all():
            job.to_end.set()
        self._worker.shutdown(cancel_futures=True)
