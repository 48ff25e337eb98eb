"""The messages of all errors of the package, read off its source, for the page on errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

KINDS = (
    "AttachError",
    "InputError",
    "ConfigError",
    "DataError",
    "ArtefactError",
    "HubError",
    "EndpointError",
    "NonFiniteLossError",
    "OutOfMemoryError",
    "TrainingInterrupted",
    "ProcessError",
    "BusyError",
    "VPDError",
)


def messages(package: Path) -> Iterator[tuple[str, str]]:
    """Kind and text of every error; what is filled in when it is raised is `…`."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                message = text(node.args[0])
                if node.func.id in KINDS and message.strip("… .:"):
                    yield node.func.id, message


def text(node: ast.expr) -> str:
    """The text of a string expression, with `…` for whatever is not known before it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left) + text(node.right)
    return "…"
