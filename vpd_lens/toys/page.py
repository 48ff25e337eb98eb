"""The runs of a toy as one self-contained HTML page: importances and vectors, found and true."""

from __future__ import annotations

from html import escape

import numpy as np
from matplotlib.figure import Figure

from vpd_lens.evaluation.svg import MUTED, draw
from vpd_lens.toys.experiment import ToyRecord
from vpd_lens.toys.measure import SiteFigures
from vpd_lens.toys.presets import METHODS

TRUE, FOUND = "#d98a2b", "#3f87d6"
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ --muted: #667085; --grid: #dfe3ea; color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ :root {{ --muted: #98a3b3; --grid: #303947; }} }}
body {{ max-width: 1000px; margin: 32px auto; padding: 0 20px;
  font: 15px/1.55 system-ui, sans-serif; }}
figure {{ margin: 12px 0 28px; }}
figcaption, .muted {{ color: var(--muted); font-size: 13.5px; }}
svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
<p class="muted">{about} Left: causal importances on inputs with a single feature at 0.75, a row
per feature, a column per subcomponent, put into the order that shows the structure; columns to the
right of the line should be empty. Right: the true vector of every feature in orange and that of
the subcomponent found for it in blue, or both as images where there are more than two
dimensions.</p>
"""


def render(records: list[ToyRecord]) -> str:
    """One page for the seeds of one toy under one method.

    Args:
        records: At least one record.

    Returns:
        HTML that needs no network.
    """
    first = records[0]
    title = f"{first.toy} decomposed by {first.method}"
    parts = [_HEAD.format(title=escape(title), about=escape(METHODS[first.method] + "."))]
    for record in records:
        parts.append(
            f"<h2>Seed {record.seed}</h2><p class='muted'>{len(record.represented)} features "
            f"represented by the target; decomposed in {record.seconds:.0f} s.</p>"
        )
        for name, site in record.sites.items():
            parts.append(_figure(f"seed-{record.seed}-{name}", name, site))
    return "\n".join([*parts, "</body></html>\n"])


def _figure(identifier: str, name: str, site: SiteFigures) -> str:
    caption = f"<b>{escape(name)}</b>: {site.alive} alive, {site.expected} expected"
    if site.mmcs is not None:
        caption += f"; MMCS {site.mmcs:.4f}, L2 ratio {site.l2_ratio:.3f}"
    caption += f"; CI error {site.error_01} at tolerance 0.1, {site.error_02} at 0.2."
    svg = draw(identifier, f"{name}: importances and vectors", (9.0, 3.2), lambda f: _plot(f, site))
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _plot(figure: Figure, site: SiteFigures) -> None:
    true, found = np.array(site.true), np.array(site.found)
    flat = true.ndim == 2 and true.shape[1] == 2
    left, *right = figure.subplots(1, 2 if flat or not true.size else 3)
    left.imshow(
        np.array(site.importance), vmin=0, vmax=1, cmap="Blues", aspect="auto", rasterized=True
    )
    left.axvline(site.expected - 0.5, color=MUTED, linewidth=0.8)
    left.set(title="causal importance", xlabel="subcomponent", ylabel="feature")
    left.grid(False)
    if not true.size:
        right[0].set_axis_off()
    elif flat:
        _arrows(right[0], true, found)
    else:
        limit = float(np.abs(true).max())
        for axes, vectors, title in zip(right, (true, found), ("true", "found"), strict=True):
            if vectors.size:
                axes.imshow(vectors, vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto")
            axes.set(title=title, xlabel="hidden dimension")
            axes.grid(False)


def _arrows(axes: object, true: np.ndarray, found: np.ndarray) -> None:
    for vectors, colour, width in ((true, TRUE, 5.0), (found, FOUND, 1.4)):
        for x, y in vectors:
            axes.plot([0, x], [0, y], color=colour, linewidth=width, solid_capstyle="round")
    axes.set(title="true and found", aspect="equal", xticks=[], yticks=[])
    axes.grid(False)
