"""Self-contained HTML pages: Jinja templates with the package's own style sheet in them."""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup


def asset(name: str, package: str = "vpd_lens.viz") -> Markup:
    """A file of a package, to be put into a page as it is."""
    return Markup(_read(package, name))


def _read(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def render_template(package: str, template: str, **values: Any) -> str:
    """One HTML page that needs no network; light and dark follow the reader's system.

    The package's template puts `{{ style }}` between `<style>` tags; of what it refers to,
    everything but `Markup` is escaped. Templates extend others by their path in `vpd_lens`.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(partial(_read, "vpd_lens")),
    )
    found = environment.from_string(_read(package, template))
    return found.render(style=asset("page.css"), **values)
