"""Progress on terminals of 80 columns, and in log files."""

from itertools import islice
from types import SimpleNamespace

import pytest

from vpd_lens import progress
from vpd_lens.progress import Progress, watching


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    seconds = iter(float(s) for s in range(0, 1000, 10))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with Progress("Attributing", 20, start=8) as bar:
        for _ in islice(bar.counting(range(20, 40)), 5):
            pass
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "Attributing: 9 of 20, 0:00:10 passed, about 0:01:50 left",
        "Attributing: 12 of 20, 0:00:40 passed, about 0:01:20 left",
    ]


def test_a_narrow_terminal_shows_all_figures(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with Progress("Finding what is alive", 12345) as bar:
        bar.advance(345)
    out = capsys.readouterr().out
    assert "345/12345" in out
    assert "left" in out
    assert "…" not in out


def test_nothing_if_not_asked_for(capsys):
    with Progress("Harvesting", 1, show=False) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")


def test_what_it_costs_is_said_first(capsys):
    with Progress("Harvesting", 1, cost="1 forward of 8 sequences; the tables take 0.1 GiB"):
        pass
    line = "Harvesting: 1 forward of 8 sequences; the tables take 0.1 GiB"
    assert capsys.readouterr().out.splitlines() == [line]


def test_who_watches_sees_every_unit_and_may_end_the_work():
    seen = []

    def watcher(bar):
        seen.append((bar.title, bar.done, bar.total))
        if bar.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watching(watcher), Progress("A", 9, show=False) as bar:
        for _ in bar.counting(range(9)):
            pass
    assert seen == [("A", 0, 9), ("A", 1, 9), ("A", 2, 9)]
    with Progress("B", 1, show=False) as bar:
        bar.advance()
    assert len(seen) == 3
