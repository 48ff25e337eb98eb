"""What all configurations share: explained errors, dotted overrides, YAML."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpd_lens.errors import ConfigError, did_you_mean

Self = TypeVar("Self", bound="Config")

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class InvalidConfig(ConfigError):
    """A configuration whose fields are unknown, missing or unusable.

    `what` is the name of a class, or a file; `troubles` say what is wrong, by dotted path of the
    field; `""`: with all of them together.
    """

    def __init__(self, what: str, troubles: dict[str, str]) -> None:
        self.troubles = troubles
        lines = [f"{path}: {trouble}" if path else trouble for path, trouble in troubles.items()]
        super().__init__(f"{what} is not valid:\n  " + "\n  ".join(lines))


class Config(BaseModel):
    """A configuration that cannot change and refuses fields that it does not have.

    The text below a field is its help, in the API pages and in `vpd-lens init`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InvalidConfig(type(self).__name__, _troubles(error, type(self), data)) from None

    def replaced(self: Self, changes: Mapping[str, Any]) -> Self:
        """A copy with fields replaced by dotted path, e.g. `{"optimiser.lr": 1e-3}`.

        Raises:
            ConfigError: If a path does not exist or a value does not fit.
        """
        data = self.model_dump()
        for path, value in changes.items():
            set_path(data, path, value)
        return type(self)(**data)

    def merged(self: Self, changes: Mapping[str, Any]) -> Self:
        """Like `replaced`, also in its errors, by nested mappings: `{"optimiser": {"lr": 1e-3}}`.

        Fields of a section that are not named stay as they are.
        """
        return type(self)(**_merged(self, changes))

    def to_yaml(self, path: str | Path) -> None:
        """Write all fields as YAML."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        Path(path).write_text(text, encoding="utf-8")


def set_path(data: dict[str, Any], path: str, value: Any) -> None:
    """Replace one value in nested mappings by its dotted path; missing mappings are made."""
    *parents, last = path.split(".")
    for key in parents:
        child = data.get(key)
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"{path}: {key} is {child!r}, which has no fields.")
        data[key] = dict(child or {})
        data = data[key]
    data[last] = value


def _merged(config: Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    data = dict(config)
    for name, value in changes.items():
        nested = isinstance(data.get(name), Config) and isinstance(value, Mapping)
        data[name] = _merged(data[name], value) if nested else value
    return data


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as in YAML 1.2; PyYAML reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value that a YAML (or JSON) text holds; `where` it is from goes into messages."""
    loader = _Loader(text)
    loader.name = where
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML:\n" + textwrap.indent(str(error), "  ")) from None
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML (or JSON) file holds; empty for an empty file."""
    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict | None):
        raise ConfigError(f"{path}: expected a mapping of fields, got {type(data).__name__}.")
    return data or {}


def _troubles(
    error: ValidationError, model: type[BaseModel], data: Mapping[str, Any]
) -> dict[str, str]:
    """What is wrong by field; what sections found wrong comes with their own paths."""
    found: dict[str, dict[str, None]] = defaultdict(dict)  # a union repeats itself
    for problem in error.errors():
        path = str(problem["loc"][0]) if problem["loc"] else ""
        cause = problem.get("ctx", {}).get("error")
        text = problem["msg"] if cause is None else str(cause)
        if isinstance(cause, InvalidConfig):
            for inner, trouble in cause.troubles.items():
                found[f"{path}.{inner}".rstrip(".")][trouble] = None
            continue
        if problem["type"] == "extra_forbidden":
            # Perhaps a field of a section that was taken for one of the whole.
            deeper = [deep for deep in field_paths(model) if deep.endswith(f".{path}")]
            hint = did_you_mean(path, list(model.model_fields), likely=deeper)
            text = f"there is no such field{hint}"
        elif problem["type"] == "missing":
            text = "missing"
        found[path][text] = None
    got = {path: f" (got {data[path]!r})"[:200] for path in found if path in data}
    return {path: " or ".join(texts) + got.get(path, "") for path, texts in found.items()}


def field_paths(model: type[BaseModel]) -> Iterator[str]:
    """Dotted paths of all fields, those of sections included."""
    for name, field in model.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{inner}" for inner in field_paths(field.annotation))
