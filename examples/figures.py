"""Draw the figures of the README and the documentation from what ships and what was recorded.

    python examples/figures.py          # needs playwright (pip install --group test) and Chromium

For each, `docs/assets/<name>_light` and `_dark`: those of the plots' page, the pages of what a
prompt needs and of its circuit, and the explorer. Those of attention are `examples/attention.py`'s.
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
from playwright.sync_api import Page, sync_playwright

import vpd_lens
from quickstart import PROMPT, TARGET
from recorded.record import RunRecord
from themed import save
from vpd_lens import plots
from vpd_lens.analysis.attention import head_loadings
from vpd_lens.evaluation import EvalReport
from vpd_lens.example import example_harvest, example_report
from vpd_lens.explorer.app import build_app
from vpd_lens.explorer.server import server_of
from vpd_lens.explorer.workbench import Workbench
from vpd_lens.plots.style import THEMES

ROOT = Path(__file__).resolve().parents[1]
CONTROL = ROOT / "docs" / "results" / "example" / "without_adversary.json"
RECORDS = ROOT / "docs" / "results" / "reproduce" / "records"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "assets")
    output = parser.parse_args().output
    model = vpd_lens.load_example()
    figures(model, output)
    pages(model, output)
    explorer(model, output)


def figures(model: torch.nn.Module, folder: Path) -> None:
    """What `vpd_lens.plots` draws of the example, beside the run without an adversary."""
    report, control = example_report(), EvalReport.from_json(CONTROL)
    both = {"VPD": report, "without the adversary": control}
    found = vpd_lens.explain(model, PROMPT, TARGET, harvest=example_harvest(model.vpd))
    card = found.cards["blocks.3.mlp.out:60"]
    drawn = {
        "example_resistance": plots.resistance(both),
        "example_needs": plots.needs(found),
        "plots_importances": plots.importances(found),
        "plots_logit_effects": plots.logit_effects(card),
        "plots_l0": plots.l0(both),
        "plots_alive": plots.alive(both),
        "plots_layers": plots.layers(both),
        "plots_pareto": plots.pareto(
            coefficients("vpd"), coefficients("spd"), names=["VPD", "SPD"]
        ),
    }
    for name, figure in drawn.items():
        save(folder, name, figure)


def coefficients(method: str) -> dict[str, EvalReport]:
    """The recorded reproduction's reports by importance coefficient."""
    paths = sorted(RECORDS.glob(f"{method},coefficient=*.json"))
    found = {path.stem.partition("=")[2]: RunRecord.read(path).report for path in paths}
    if method == "vpd":
        found["0.0005"] = RunRecord.read(RECORDS / "vpd.json").report
    return found


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
        for theme in THEMES:
            shown = browser.new_page(viewport={"width": 1280, "height": 720}, color_scheme=theme)
            shown.goto(address)
            if first is not None:
                first(shown)
            shown.wait_for_timeout(1000)
            shown.screenshot(path=folder / f"{name}_{theme}.png")
        browser.close()


if __name__ == "__main__":
    main()
