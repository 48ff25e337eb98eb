"""Judges of intruder detection: which of some passages is unlike the others?

A judge is anything with a `name` and a `choose`. The offline ones give every passage a vector and
choose that of the smallest mean cosine with the others; among equals by chance, so that a judge who
sees nothing scores chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict

from vpd_lens.analysis.interpretation.endpoint import Endpoint, Prompt, Spent, ask
from vpd_lens.analysis.interpretation.passages import Passage
from vpd_lens.errors import InputError
from vpd_lens.progress import Progress

Question = tuple[Passage, ...]
Embed = Callable[[list[str]], Any]


@runtime_checkable
class Judge(Protocol):
    """Chooses the passage of each question that does not belong."""

    name: str

    def choose(self, questions: Sequence[Question]) -> list[int | None]:
        """The place of one passage of every question; `None` if there is no answer."""
        ...


class TokenJudge:
    """Compares tokens: at the firing, just before and after it, and around it.

    A passage is a bag of such facts, each weighted by how rare it is in all passages of the
    questions. A tokens' case and the space in front of it count half.

    Args:
        context: Tokens around the firing, on either side.
        seed: Of choices among equals.
    """

    name = "tokens"

    def __init__(self, context: int = 5, seed: int = 0) -> None:
        if context < 0:
            raise InputError(f"context={context}; expected at least 0.")
        self.context, self.seed = context, seed

    def choose(self, questions: Sequence[Question]) -> list[int | None]:
        """The passage of every question that shares least with the others."""
        bags = [[self._facts(passage) for passage in question] for question in questions]
        everywhere = Counter(fact for bag in bags for facts in bag for fact in facts)
        n = sum(len(bag) for bag in bags)
        rng = np.random.default_rng(self.seed)
        chosen: list[int | None] = []
        for bag in bags:
            columns = {fact: i for i, fact in enumerate({f: 0 for facts in bag for f in facts})}
            vectors = np.zeros((len(bag), len(columns)))
            for row, facts in enumerate(bag):
                for fact, weight in facts.items():
                    vectors[row, columns[fact]] = weight * math.log(1 + n / everywhere[fact])
            chosen.append(odd_one_out(vectors, rng))
        return chosen

    def _facts(self, passage: Passage) -> dict[tuple[str, str], float]:
        facts: dict[tuple[str, str], float] = {}
        focus, tokens = passage.focus, passage.tokens
        for place in range(focus - self.context, focus + self.context + 1):
            if not 0 <= place < len(tokens):
                continue
            exact = {0: "at", -1: "before", 1: "after"}.get(place - focus)
            token, weight = tokens[place], 0.2 if exact is None else 1.0 if exact == "at" else 0.5
            for word, share in ((token, 0.5), (token.strip().casefold(), 0.5)):
                facts[(exact or "near", word)] = weight * share
        return facts


class EmbeddingJudge:
    """Compares what an embedding model makes of the text around the firing.

    A passage is the sum of two unit vectors: of the token at the firing, and of the text around it.

    Args:
        embed: Vectors of texts, `[n, d]`, such as `static_embeddings()` or the `encode` of a
            SentenceTransformer.
        name: Of the model, for reports.
        context: Tokens around the firing, on either side.
        seed: Of choices among equals.
    """

    def __init__(
        self, embed: Embed, name: str = "embeddings", context: int = 8, seed: int = 0
    ) -> None:
        if context < 0:
            raise InputError(f"context={context}; expected at least 0.")
        self.embed, self.name, self.context, self.seed = embed, name, context, seed

    def choose(self, questions: Sequence[Question]) -> list[int | None]:
        """The passage of every question whose text is least like the others'."""
        passages = [passage for question in questions for passage in question]
        if not passages:
            return []
        around = self.context, self.context
        texts = [p.near(0, 0) for p in passages], [p.near(*around) for p in passages]
        vectors = sum(_unit(np.asarray(self.embed(part), dtype=float)) for part in texts)
        bounds = np.cumsum([len(question) for question in questions])[:-1]
        rng = np.random.default_rng(self.seed)
        return [odd_one_out(part, rng) for part in np.split(np.asarray(vectors), bounds)]


def static_embeddings() -> Embed:
    """The embeddings of `wordllama`, whose 16 MB of weights come with the package; offline.

    A text is the mean of vectors of its tokens, whatever their order.

    Raises:
        InputError: If the package is not installed.
    """
    try:
        import wordllama
    except ImportError:
        raise InputError(
            "static_embeddings needs the package wordllama: pip install 'vpd-lens[judge]'. Any "
            "other function from texts to vectors does as well: EmbeddingJudge(embed)."
        ) from None
    # Its own search for the tokenizer misses the folder it comes in, and would download it.
    folder = Path(wordllama.__file__).parent
    return wordllama.WordLlama.load(cache_dir=folder, disable_download=True).embed


class Choice(BaseModel):
    """What a language model answers."""

    model_config = ConfigDict(extra="forbid")

    reasoning: str
    intruder: int


class EndpointJudge:
    """Asks a language model behind an `Endpoint`.

    Args:
        endpoint: Whom to ask, and how much; a text is the name of a model, with default limits.
        progress: Show how far it is and how long it will still take.

    Attributes:
        spent: What was asked and answered so far.
        failed: Why questions have no answer, in the order of the replies.
    """

    def __init__(self, endpoint: Endpoint | str, progress: bool = True) -> None:
        self.endpoint = Endpoint(model=endpoint) if isinstance(endpoint, str) else endpoint
        self.name, self.progress = self.endpoint.model, progress
        self.spent, self.failed = Spent(), []

    def choose(self, questions: Sequence[Question]) -> list[int | None]:
        """What the model answers; `None` where it failed, or the budget was at its end.

        Raises:
            EndpointError: If the endpoint refuses, or fails many times in a row.
            InputError: If there is no key, or no client.
        """
        prompts = {str(i): _asked(question) for i, question in enumerate(questions)}
        chosen: list[int | None] = [None] * len(questions)
        with Progress("Judging", len(questions), show=self.progress) as bar:
            for name, reply in ask(self.endpoint, prompts, Choice, self.spent):
                bar.advance()
                number = 0 if reply.answer is None else reply.answer.intruder
                if 1 <= number <= len(questions[int(name)]):
                    chosen[int(name)] = number - 1
                else:
                    self.failed.append(reply.reason or f"there is no example {number}.")
        return chosen


def odd_one_out(vectors: Float[np.ndarray, "n d"], rng: np.random.Generator) -> int:
    """The row of the smallest mean cosine with the others; among equals by chance."""
    unit = _unit(vectors)
    closeness = unit @ unit.sum(0) - (unit * unit).sum(1)
    best = np.flatnonzero(closeness <= closeness.min() + 1e-9)
    return int(rng.choice(best))


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _asked(question: Question) -> Prompt:
    system = (
        "You are shown some passages of text. In all but one of them the marked places, like "
        "[[this]], are marked for the same reason: some property of the marked token, of its "
        "surroundings or of what comes next. In one, the intruder, they are marked for another "
        "reason. Find it. Compare the marked tokens and what stands around them; passages may be "
        'cut off, and their subject means little. Answer in JSON: "reasoning", one or two '
        f'sentences, and "intruder", the number of that passage, 1 to {len(question)}.'
    )
    shown = (f"<passage {i + 1}>{p.marked()}</passage {i + 1}>" for i, p in enumerate(question))
    return Prompt(system, "\n".join(shown))
