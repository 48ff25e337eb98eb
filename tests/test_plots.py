"""Figures have in them what was measured, by name and by value."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

import vpd_lens
from vpd_lens import plots
from vpd_lens.analysis.explain import Explanation
from vpd_lens.analysis.reads_writes import TokenEffect
from vpd_lens.decomposition import Layout
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.example import example_report

CONTROL = Path(__file__).parents[1] / "docs/results/example/without_adversary.json"
HOSTILE = "</svg><script>alert('$x$')</script>\n"


@pytest.fixture(scope="module")
def both() -> dict[str, vpd_lens.EvalReport]:
    return {"VPD": example_report(), "control": vpd_lens.EvalReport.from_json(CONTROL)}


@pytest.fixture
def explanation() -> Explanation:
    """Two tokens, two sites of two and one subcomponents."""
    return Explanation(
        strings=["a", HOSTILE],
        importance=torch.tensor([[1.0, 0.05, 0.5], [1.0, 0.8, 0.0]]),
        activation=torch.ones(2, 3),
        effect=torch.tensor([[0.1, 9.0, 0.2], [0.1, 0.3, 9.0]]),
        target=("b", 1),
        probability=0.5,
        predictions=[[("b", 0.5)], [("b", 0.5)]],
        layout=Layout(("blocks.0.mlp.in", "blocks.1.mlp.in"), (2, 1)),
        cards=object.__new__(vpd_lens.Cards),  # no figure asks them
        threshold=0.1,
    )


def curves(figure: Figure) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}


def tick_labels(figure: Figure, axis: str = "y") -> list[str]:
    return [label.get_text() for label in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def test_several_runs_share_axes(both):
    means = {name: [at["mean"] for at in run.pgd.values()] for name, run in both.items()}
    found = {name: run.audit.aggregation["donors"] for name, run in both.items()}
    left, right = (
        {
            line.get_label(): list(line.get_ydata())
            for line in axes.lines
            if len(line.get_xdata()) > 2
        }
        for axes in plots.resistance(both).axes
    )
    assert means.items() <= left.items()
    assert right == {name: [at.mean for at in row.values()] for name, row in found.items()}
    level = plots.levels(both)
    assert curves(level)["control"] == [at.mean for at in both["control"].audit.levels.values()]
    subsets = both["control"].audit.subsets["ci"]
    assert curves(plots.layers(both))["control"] == [at.mean for at in subsets.values()]


def test_one_report_is_shown_in_detail(both):
    report = both["VPD"]
    kinds = {
        kind: [at.mean for at in row.values()] for kind, row in report.audit.aggregation.items()
    }
    assert kinds.items() <= curves(plots.donors(report)).items()
    parallel = report.audit.parallel["ci"].mean
    assert curves(plots.layers(report))["ci, parallel"] == [parallel]
    assert len(curves(plots.levels(report))) == 1 + len(report.audit.unused)


def test_sites_are_bars_and_further_reports_marks(both):
    report, control = both.values()
    axes = plots.l0(both).axes[0]
    per_site, marks = report.l0["0"], control.l0["0"]
    names = list(report.n_subcomponents)
    assert [bar.get_height() for bar in axes.patches] == [per_site[name] for name in names]
    (drawn,) = axes.collections
    assert [segment[0][1] for segment in drawn.get_segments()] == [marks[name] for name in names]
    assert axes.get_legend().get_texts()[-1].get_text() == "control"
    heights = [bar.get_height() for bar in plots.alive(report).axes[0].patches]
    assert heights == [*report.n_subcomponents.values(), *(report.alive[name] for name in names)]


def test_a_series_goes_through_its_reports_by_l0(both):
    figure = plots.pareto(both, {"again": both["VPD"]}, names=["one", "two"])
    attacked, random = figure.axes
    (x, y), (_, again) = (line.get_data() for line in random.lines)
    order = sorted(both.values(), key=lambda report: report.l0["0"]["total"])
    assert list(x) == [report.l0["0"]["total"] for report in order]
    assert list(y) == [report.modes["stochastic"]["kl"] for report in order]
    assert list(again) == [both["VPD"].modes["stochastic"]["kl"]]
    assert attacked.get_ylabel() == "PGD-20 KL"


def test_training_curves_are_those_of_the_log(tmp_path):
    rows = [{"step": 1, "l0": 9.0, "seconds": 1.0}, {"step": 2, "l0": 4.0, "adversarial": 0.5}]
    log = tmp_path / "metrics.jsonl"
    log.write_text("\n".join([*map(json.dumps, rows), '{"step": 3, "l']))  # interrupted
    figure = plots.training({"a": tmp_path, "b": log})
    adversarial, l0 = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["adversarial", "l0"]
    assert [line.get_xydata().tolist() for line in l0.lines] == [[[1, 9], [2, 4]]] * 2
    assert adversarial.lines[0].get_xydata().tolist() == [[2, 0.5]]
    assert plots.training(log, ["seconds"]).axes[0].get_title() == "seconds"
    with pytest.raises(InputError, match=r"expected some of those logged: .'adversarial', 'l0'"):
        plots.training(log, ["l1"])
    with pytest.raises(ArtefactError, match="no log of a run"):
        plots.training(tmp_path / "nothing")


def test_needs_are_counted_and_importances_of_the_largest_effects_shown(explanation):
    dots = plots.needs(explanation).axes[0].collections[0]
    assert dots.get_offsets().tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    np.testing.assert_allclose(dots.get_sizes(), [45, 90, 45, 0])
    figure = plots.importances(explanation, k=2)  # effects count where something is needed
    assert tick_labels(figure) == ["0.mlp.in:1", "1.mlp.in:0"]
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, [[0.05, 0.8], [0.5, 0.0]], rtol=1e-6)
    chosen = plots.importances(explanation, ["blocks.1.mlp.in:0"])
    np.testing.assert_allclose(chosen.axes[0].images[0].get_array(), [[0.5, 0.0]])
    with pytest.raises(InputError, match=r"no subcomponent .blocks\.1\.mlp\.in:1"):
        plots.importances(explanation, ["blocks.1.mlp.in:1"])


def test_logit_effects_are_ordered_from_promoted_to_suppressed():
    raised = [TokenEffect("up", 2.0), TokenEffect(HOSTILE, 1.0)]
    lowered = [TokenEffect("down", -3.0), TokenEffect("less", -1.0)]
    card = vpd_lens.Card("blocks.0.mlp.out:1", promotes=raised, suppresses=lowered)
    figure = plots.logit_effects(card)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2.0, 1.0, -1.0, -3.0]
    assert tick_labels(figure)[::3] == ["'up'", "'down'"]


def test_notebooks_show_figures_in_their_own_colours_and_tokens_as_text(explanation):
    before = dict(rcParams)
    with plots.theme("dark"):
        figure = plots.needs(explanation)
    page = figure._repr_html_()
    assert "currentColor" in page
    assert "var(--grid)" in page
    assert "#e6edf3" not in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert('$x$')" in page
    assert "#e6edf3" in plots.as_svg(figure, "dark")
    assert dict(rcParams) == before
    with pytest.raises(InputError, match="expected one of light, dark"), plots.theme("sepia"):
        pass


def test_axes_of_the_user_are_drawn_into(both, explanation):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plots.adversary(both, ax=left) is figure
    assert plots.needs(explanation, ax=right) is figure
    assert "VPD" in curves(figure)


def test_what_cannot_be_drawn_is_said(both):
    with pytest.raises(InputError, match="reports is empty"):
        plots.l0({})
    without = both["VPD"].model_copy(update={"audit": None})
    with pytest.raises(InputError, match="has no audit"):
        plots.donors({"a": without, "b": both["VPD"]})
