"""Results in notebooks: shown alike in print, escaped, and the notebooks of the repository run."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jupytext
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from vpd_lens.analysis.circuits import CircuitReport
from vpd_lens.analysis.circuits.intervene import InterventionResult
from vpd_lens.analysis.comparison import compare
from vpd_lens.analysis.dataset_attribution import DatasetAttributions, Settings
from vpd_lens.example import example_harvest, example_report
from vpd_lens.training import TrainingResult
from vpd_lens.training.plan import StepCost

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "examples" / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
HOSTILE = "<script>alert(1)</script>[/b][link=javascript:1]x"


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run this repository's code, on one thread."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def results() -> dict[str, Any]:
    """Results of tokens, texts and paths that nobody would wish for."""
    harvest = example_harvest()
    logits = torch.eye(6)
    model = torch.nn.Identity()
    model.tokenizer, model.to_string = SimpleNamespace(), lambda _: HOSTILE
    p = {"target": (0.9,), "ci": (0.7,)}
    attributions = DatasetAttributions.empty(
        {"blocks.0.mlp.in": torch.tensor([0, 2])},
        torch.zeros(4, 3),
        3,
        places={"blocks.0.mlp.in": ("embed",)},
        settings=Settings(alive_threshold=0.0, absolute=False, frozen=False, targets=("output",)),
        fingerprint="0",
        strings=[HOSTILE] * 3,
    )
    pair = {HOSTILE: (torch.eye(3), torch.eye(3))}
    return {
        "harvest": replace(harvest, strings=[HOSTILE] * len(harvest.strings)),
        "circuit": CircuitReport(
            targets=(HOSTILE,), method="ci", nodes=3, nodes_before=5, nodes_by_site={},
            probability=p, probability_before=p,
        ),
        "intervention": InterventionResult(logits, logits, logits, 0, (1,), model),
        "attributions": attributions,
        "comparison": compare(pair, pair),
        "audit": example_report().audit,
        "training": TrainingResult(Path(HOSTILE), 3, 1.0, {"l0": 2.0}),
        "plan": StepCost({"target": 10}, 20, 30, "target"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    return results()


def test_results_are_shown_alike_and_as_text(shown):
    for name, result in shown.items():
        page = result._repr_html_()
        assert "<script" not in page, name
        assert "href" not in page, name
        assert html.unescape(re.sub("<[^>]*>", "", page)).split() == str(result).split(), name


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebooks_are_those_of_their_sources(source):
    """`make notebooks` writes them."""
    expected = jupytext.read(source)
    written = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    cells = [[(c.cell_type, c.source) for c in notebook.cells] for notebook in (expected, written)]
    assert cells[1] == cells[0]
    assert not any(cell.get("outputs") for cell in written.cells)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebooks_run(source, tmp_path):
    """Nothing is printed to stderr, as what is missing for widgets would be."""
    notebook = jupytext.read(source)
    notebook.cells = [c for c in notebook.cells if "install" not in c.metadata.get("tags", [])]
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    pages = "".join(o.data.get("text/html", "") for o in outputs if "data" in o)
    assert "<svg" in pages or "srcdoc" in pages


@pytest.mark.slow
def test_a_bar_in_a_notebook_is_one_output_that_is_replaced(tmp_path):
    code = """
from vpd_lens.progress import Progress
with Progress("Harvesting", 3) as bar:
    for _ in bar.counting(range(3)):
        bar._bar.draw(pause=0.0)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert "3/3" in output.data["text/plain"]
    assert "3/3" in output.data["text/html"]
