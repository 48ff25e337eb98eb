"""Self-contained HTML pages: Jinja templates with the package's own style sheet in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
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


def render_data(
    own: str,
    own_styles: Sequence[str],
    own_scripts: Sequence[str],
    data: dict[str, Any],
    title: str,
    template: tuple[str, str] | None = None,
    styles: Sequence[Markup] = (),
    scripts: Sequence[Markup] = (),
    **values: Any,
) -> str:
    """A page whose scripts draw `data`; a template that extends its own may have more of them."""
    return render_template(
        *(template or ("vpd_lens.viz", own)),
        title=title,
        data=htmlsafe_json_dumps(data, separators=(",", ":"), allow_nan=False),
        styles=[*(asset(f"assets/{name}") for name in own_styles), *styles],
        scripts=[*(asset(f"assets/{name}.js") for name in own_scripts), *scripts],
        **values,
    )
