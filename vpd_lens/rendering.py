"""What `rich` prints, as text for `str()` and as HTML for notebooks."""

from __future__ import annotations

from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.text import Text

# Colours and font are those of the page around it.
_HTML = "<pre style='line-height:1.2;overflow-x:auto;background:none;color:inherit'>{code}</pre>"


def as_text(renderable: RenderableType, width: int = 100) -> str:
    """As plain text of at most `width` columns."""
    text = StringIO()
    # In a notebook rich would show it there, whatever the file.
    console = Console(width=width, no_color=True, file=text, force_jupyter=False)
    console.print(renderable, highlight=False)
    return text.getvalue().rstrip()


def as_html(renderable: RenderableType, width: int = 100) -> str:
    """As preformatted HTML that needs no style sheet."""
    console = Console(record=True, file=StringIO(), width=width, force_jupyter=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_HTML)


class Shown:
    """What says in `__rich__` how it is shown: alike in terminals, as text and in notebooks."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(self.__rich__())


def titled(title: str, *parts: RenderableType) -> Group:
    """A plain line over something; brackets in it are no markup."""
    return Group(Text(title), *parts)


def unescaped(text: str) -> str:
    r"""What was typed on one line, with `\n` and `\t` as a newline and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
