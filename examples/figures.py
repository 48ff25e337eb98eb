"""Draw the figures of the README and the documentation from what ships and what was recorded.

    python examples/figures.py          # needs playwright (pip install --group test) and Chromium

For each, `docs/assets/<name>_light` and `_dark`: the example's resistance (beside that of the run
without an adversary, if its report is there), what a prompt needs, as a figure and as a page, its
circuit, and the explorer.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from socket import create_server
from tempfile import TemporaryDirectory
from threading import Thread
from urllib.parse import urlencode

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from playwright.sync_api import Page, sync_playwright

import vpd_lens
from quickstart import PROMPT, TARGET
from themed import COLOURS, save
from vpd_lens.analysis.attention import head_loadings
from vpd_lens.evaluation import EvalReport
from vpd_lens.evaluation.plots import BESIDE, MAIN, line
from vpd_lens.example import example_harvest, example_report
from vpd_lens.explorer.app import build_app
from vpd_lens.explorer.server import server_of
from vpd_lens.explorer.workbench import Workbench
from vpd_lens.viz.svg import INK, MUTED, legend_above

ROOT = Path(__file__).resolve().parents[1]
CONTROL = ROOT / "docs" / "results" / "example" / "without_adversary.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "assets")
    output = parser.parse_args().output
    reports = {"VPD": example_report()}
    if CONTROL.exists():
        reports["without the adversary"] = EvalReport.from_json(CONTROL)
    save(output, "example_resistance", (9, 2.9), lambda figure: resistance(figure, reports))
    model = vpd_lens.load_example()
    save(output, "example_needs", (9, 4.6), lambda figure: needs(figure, model, PROMPT))
    pages(model, output)
    explorer(model, output)


def resistance(figure: Figure, reports: dict[str, EvalReport]) -> None:
    """Left, the adversary by its steps; right, what other tokens need switched on, by their number.

    The band goes up to the worst attack, or two standard errors to either side.
    """
    left, right = figure.subplots(1, 2)
    for (name, report), colour in zip(reports.items(), (MAIN, BESIDE), strict=False):
        steps = [int(step) for step in report.pgd]
        mean, largest = ([found[of] for found in report.pgd.values()] for of in ("mean", "max"))
        left.fill_between(steps, mean, largest, color=colour, alpha=0.18, linewidth=0)
        left.plot(steps, mean, "o-", color=colour, markersize=3.5, label=name)
        donors = report.audit.aggregation["donors"]
        x, means = [int(k) for k in donors], [at.mean for at in donors.values()]
        spread = [2 * at.error for at in donors.values()]
        low, high = ([m + s * e for m, e in zip(means, spread, strict=True)] for s in (-1, 1))
        right.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        right.plot(x, means, "o-", color=colour, markersize=3.5, label=name)
    left.set(xscale="log", yscale="log", xlabel="steps of the adversary", ylabel="KL, nats")
    right.set(xscale="log", xlabel="other tokens whose needs are switched on", ylabel="KL, nats")
    right.set_ylim(0, 1.08 * right.get_ylim()[1])
    for axes, ticks in ((left, steps), (right, x)):
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        legend_above(axes)
    line(left, reports["VPD"].worst, "knowing nothing of the input")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter("{x:g}")


@torch.no_grad()
def needs(figure: Figure, model: torch.nn.Module, prompt: str) -> None:
    """How many subcomponents of every matrix each token needs; larger dots for more."""
    vpd, tokens = model.vpd, model.to_tokens(prompt)
    importance = vpd.causal_importance(tokens)[0]  # [pos, C_total]
    names = vpd.layout.names
    counts = torch.stack([(g > 0.1).sum(-1) for g in vpd.layout.split(importance)])  # [site, pos]
    axes = figure.subplots()
    x = torch.arange(counts.shape[1]).repeat(len(names))
    y = torch.arange(len(names)).repeat_interleave(counts.shape[1])
    flat = counts.flatten().float()
    axes.scatter(x, y, s=90 * flat / flat.max(), color=MAIN, linewidths=0)
    strings = [model.to_string([token]).replace("\n", "⏎") for token in tokens[0].tolist()]
    axes.set_xticks(range(len(strings)), strings, family="monospace", fontsize=8)
    axes.set_yticks(range(len(names)), [n.removeprefix("blocks.") for n in names], fontsize=6.5)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_title(
        f"subcomponents in use: {int(flat.min())} to {int(flat.max())} of a matrix at a token",
        loc="left", color=MUTED,
    )  # fmt: skip
    for layer in range(1, 4):
        axes.axhline(7 * layer - 0.5, color=MUTED, linewidth=0.5)


def pages(model: torch.nn.Module, folder: Path) -> None:
    """The pages of what a prompt needs and of its circuit, as a browser shows them."""
    cards = vpd_lens.Cards(model, harvest := example_harvest(model.vpd))
    with TemporaryDirectory() as place:
        found = vpd_lens.explain(model, PROMPT, TARGET, harvest=harvest)
        page = found.to_html(Path(place) / "explained.html")
        photograph(page.as_uri(), folder, "explain")
        graph = vpd_lens.attribute(model, PROMPT, TARGET, prune="adversarial")
        path = graph.to_html(
            Path(place) / "circuit.html", cards=cards, loadings=head_loadings(model, graph)
        )
        photograph(path.as_uri(), folder, "example_circuit")


def explorer(model: torch.nn.Module, folder: Path) -> None:
    """The explorer with a prompt, the card of what matters most, and what is predicted without."""
    with TemporaryDirectory() as place, create_server(("127.0.0.1", 0)) as listening:
        bench = Workbench(model, example_harvest(model.vpd), Path(place), title="example")
        server = server_of(build_app(bench, token := "figures", ["127.0.0.1"]))
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        asked = urlencode({"text": PROMPT, "target": TARGET, "token": token})
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/?{asked}"
        photograph(address, folder, "explorer", look_at_the_first)
        server.should_exit = True
        thread.join()


def look_at_the_first(page: Page) -> None:
    """Open the card of the first need, and ablate it."""
    page.locator("#panel .need").first.click()
    page.get_by_role("button", name="Ablate here").click()
    page.locator("#edit-result .writing").wait_for()


def photograph(
    address: str, folder: Path, name: str, first: Callable[[Page], None] | None = None
) -> None:
    """A page in light and in dark, after something was done on it."""
    with sync_playwright() as playwright:
        program = shutil.which("chromium")  # the system's, or else playwright's own
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        for theme in COLOURS:
            shown = browser.new_page(viewport={"width": 1280, "height": 720}, color_scheme=theme)
            shown.goto(address)
            if first is not None:
                first(shown)
            shown.wait_for_timeout(1000)
            shown.screenshot(path=folder / f"{name}_{theme}.png")
        browser.close()


if __name__ == "__main__":
    main()
