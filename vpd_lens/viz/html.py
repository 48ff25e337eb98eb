"""Self-contained HTML pages: Jinja templates with the package's own style sheet in them."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def asset(name: str) -> Markup:
    """A file of this package, to be put into a page as it is."""
    return Markup(files("vpd_lens.viz").joinpath(name).read_text(encoding="utf-8"))


def render_template(package: str, template: str, **values: Any) -> str:
    """One HTML page that needs no network; light and dark follow the reader's system.

    The package's template puts `{{ style }}` between `<style>` tags; of what it refers to,
    everything but `Markup` is escaped.
    """
    source = files(package).joinpath(template).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(style=asset("page.css"), **values)
