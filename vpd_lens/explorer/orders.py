"""What a page may ask for; anything else is refused before the model is touched."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from vpd_lens.analysis.circuits.behaviour import Method
from vpd_lens.analysis.circuits.targets import Token
from vpd_lens.rendering import unescaped

MAX_EDITS, MAX_WRITTEN = 200, 200
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class Order(BaseModel):
    """Fields are checked, and none may be unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Question(Order):
    r"""A text, and the token whose prediction is explained; an empty `target` is the likeliest.

    In the target, `\n` and `\t` stand for a newline and a tab.
    """

    text: str
    target: str = ""
    position: int = -1

    @property
    def goal(self) -> Token | None:
        """The target, if one was named."""
        return Token(unescaped(self.target), self.position) if self.target else None


class GraphOrder(Question):
    """A graph of a question: `prune` to what the target needs, `keep` a share of influence."""

    prune: Method | None = None
    frozen: bool = False
    keep: float | None = Field(default=None, gt=0, le=1)


class EditOrder(Order):
    """Multiply the mask of a subcomponent, at one position or, with `None`, at all."""

    name: str
    position: int | None = Field(default=None, ge=0)
    factor: float = Field(default=0.0, ge=-100, le=100)


class EditsOrder(Question):
    """What some edits do to a prediction and to the `n_written` tokens that follow."""

    edits: list[EditOrder] = Field(max_length=MAX_EDITS)
    n_written: int = Field(default=0, ge=0, le=MAX_WRITTEN)


class Group(Order):
    """Nodes of a graph that the reader put together."""

    name: str = Field(max_length=200)
    members: list[str] = Field(min_length=2)


class GroupsOrder(Order):
    """All groups of a graph."""

    groups: list[Group] = Field(max_length=1000)


class SaveOrder(Order):
    """What to call a graph on disk."""

    name: Name


class HarvestOrder(Order):
    """Gather what subcomponents respond to, until so many batches have been read in all."""

    n_batches: int = Field(default=100, ge=1, le=1_000_000)


class LabelOrder(Order):
    """What to call a subcomponent; an empty text takes its label away."""

    text: str
