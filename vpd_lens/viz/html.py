"""Self-contained HTML pages: Jinja templates with the package's own style sheet in them."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def render_template(package: str, template: str, **values: Any) -> str:
    """One HTML page that needs no network; light and dark follow the reader's system.

    Args:
        package: The package that holds the template.
        template: Its file name. It puts `{{ style }}` between `<style>` tags.
        **values: What the template refers to; everything but `Markup` is escaped.
    """
    style = files("vpd_lens.viz").joinpath("page.css").read_text(encoding="utf-8")
    source = files(package).joinpath(template).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(style=Markup(style), **values)
