"""A real browser for tests of pages."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserType, Error, Page, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Opened:
    """An open page and what went wrong or left the machine while it was open."""

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def state(self, name: str):
        """A value of the page's `window.vpdGraph`, after what is waiting was drawn."""
        drawn = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.page.evaluate(drawn)
        return self.page.evaluate(f"window.vpdGraph.{name}")


def launch(chromium: BrowserType) -> Browser:
    """The system's Chromium, or playwright's own; without one the test fails."""
    installed = next(filter(None, map(shutil.which, PROGRAMS)), None)
    try:
        return chromium.launch(executable_path=installed, args=["--no-sandbox", "--disable-gpu"])
    except Error as error:
        pytest.fail(f"no Chromium to run pages in (apt-get install chromium): {error}")


@contextmanager
def running() -> Iterator[Browser]:
    """A browser; only one may be there in a process."""
    with sync_playwright() as playwright:
        launched = launch(playwright.chromium)
        yield launched
        launched.close()


@contextmanager
def opening(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """Opens files; fails at the end if a page had an error or asked for anything else."""
    opened: list[tuple[Opened, str]] = []

    def open_file(path: Path, width: int = 1400, height: int = 900, **options) -> Opened:
        size = {"width": width, "height": height}
        page = browser.new_context(viewport=size, reduced_motion="reduce", **options).new_page()
        seen = Opened(page)
        page.on("pageerror", lambda error: seen.problems.append(str(error)))
        page.on("console", lambda message: seen.problems.append(message.text))
        page.on("request", lambda request: seen.requests.append(request.url))
        opened.append((seen, path.as_uri()))
        page.goto(path.as_uri())
        return seen

    yield open_file
    for seen, address in opened:
        seen.page.context.close()
        assert not seen.problems
        # "data:" is the empty icon, "blob:" a file that the page itself makes.
        left = [url for url in seen.requests if not url.startswith(("data:", "blob:"))]
        assert set(left) == {address}
