"""Jobs of the explorer: one after the other, watched, and ended when asked to."""

import threading

import pytest

from vpd_lens.errors import BusyError, InputError
from vpd_lens.explorer import jobs as module
from vpd_lens.explorer.jobs import Jobs
from vpd_lens.progress import Progress

SOON = 10  # seconds


@pytest.fixture
def jobs():
    jobs = Jobs()
    yield jobs
    jobs.close()


class Work:
    """Counts to `total`, and waits before each unit until it may go on."""

    def __init__(self, total=3):
        self.total, self.steps = total, threading.Semaphore(0)
        self.at = threading.Semaphore(0)

    def __call__(self, job):
        with Progress("Counting", self.total, show=False) as bar:
            for unit in bar.counting(range(self.total)):
                self.at.release()
                assert self.steps.acquire(timeout=SOON), unit
        return {"counted": self.total}


def ended(jobs, job):
    """After everything that was started before."""
    jobs._worker.submit(lambda: None).result(SOON)
    return job


def test_a_job_says_how_far_it_is(jobs):
    work = Work()
    job = jobs.start("a", work)
    assert work.at.acquire(timeout=SOON)
    work.steps.release()
    assert work.at.acquire(timeout=SOON)
    shown = job.shown()
    assert (shown["state"], shown["phase"], shown["done"], shown["total"]) == (
        *("running", "Counting"),
        *(1, 3),
    )
    assert shown["left"] >= 0
    assert jobs.running is job
    work.steps.release(2)
    shown = ended(jobs, job).shown()
    assert (shown["state"], shown["done"], shown["result"]) == ("done", 3, {"counted": 3})
    assert jobs.running is None


def test_a_running_job_ends_after_its_unit_and_a_waiting_one_at_once(jobs):
    first, second, third = Work(), Work(), Work(1)
    running, waiting, last = (
        jobs.start(*x) for x in zip("abc", (first, second, third), strict=True)
    )
    assert first.at.acquire(timeout=SOON)
    assert jobs.cancel(waiting.key).state == "cancelled"
    jobs.cancel(running.key)
    first.steps.release()
    third.steps.release()
    ended(jobs, last)
    assert [job.state for job in jobs.all()] == ["cancelled", "cancelled", "done"]
    assert running.done == 1
    assert not second.at.acquire(blocking=False)


def test_a_failed_job_says_why_and_the_next_one_runs(jobs, caplog):
    def refuse(job):
        raise InputError("no such token")

    def fail(job):
        raise ZeroDivisionError("by 0")

    refused, failed, good = (
        jobs.start(*x) for x in zip("abc", (refuse, fail, lambda job: {"x": 1}), strict=True)
    )
    ended(jobs, good)
    assert (refused.state, refused.error) == ("failed", "no such token")
    assert (failed.state, failed.error) == ("failed", "ZeroDivisionError: by 0")
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]
    assert good.result == {"x": 1}


def test_too_much_waiting_is_refused_and_old_jobs_are_forgotten(jobs, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    monkeypatch.setattr(module, "MOST_KEPT", 1)
    work = Work(1)
    first = jobs.start("first", work)
    assert work.at.acquire(timeout=SOON)
    waiting = [jobs.start(f"{n}", lambda job: {}) for n in range(2)]
    with pytest.raises(BusyError, match="2 jobs are waiting already"):
        jobs.start("one too many", lambda job: {})
    work.steps.release()
    ended(jobs, waiting[-1])
    new = ended(jobs, jobs.start("new", lambda job: {}))
    assert jobs.all() == [waiting[-1], new]
    with pytest.raises(InputError, match=f"no job '{first.key}'"):
        jobs[first.key]


def test_closing_ends_everything(jobs):
    work = Work()
    running, waiting = jobs.start("a", work), jobs.start("b", lambda job: {})
    assert work.at.acquire(timeout=SOON)
    work.steps.release(3)
    jobs.close()
    assert running.state in ("cancelled", "done")
    assert waiting.state != "done"
