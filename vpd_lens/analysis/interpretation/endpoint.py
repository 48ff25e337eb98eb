"""Questions to a language model behind any OpenAI-compatible address, within a budget.

`ask` is one loop: start a request when the rate, the number at once and the budget allow it, else
wait for an answer. The client repeats what failed for a moment, with growing pauses; what still
fails or answers nonsense is a `Reply` with a reason, and many of those in a row end the loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpd_lens.errors import EndpointError, InputError, first_line

_CHARACTERS = 3  # of a token at least, in the mean over English and code

A = TypeVar("A", bound=BaseModel)


class Prompt(NamedTuple):
    """What a model is asked: how to answer, and about what."""

    system: str
    user: str

    @property
    def tokens(self) -> int:
        """How many it is at most, about; each model counts otherwise."""
        return (len(self.system) + len(self.user)) // _CHARACTERS + 20


class Endpoint(BaseModel):
    """A language model, and how much it may be asked.

    The key is read from the environment when it is needed, and never stored, shown or logged.

    Attributes:
        model: Its name there.
        base_url: The address, such as `"http://127.0.0.1:8000/v1"`; `None`: that of the client,
            `OPENAI_BASE_URL` or OpenAI itself.
        key_variable: The environment variable that holds the key. Servers without keys take any.
        requests_per_minute: New requests are not started faster.
        concurrency: Requests at once.
        timeout: Seconds to wait for an answer.
        retries: How often a request is repeated, with growing pauses, if the server is busy, too
            slow or cannot be reached.
        max_answer_tokens: Of one answer, its reasoning included.
        prices: US dollars for a million tokens of input, and of output.
        max_requests: Of one call of `label` or `intruder`; `None`: any number.
        max_tokens: Of one call, input and output together.
        max_cost: Of one call, in US dollars; needs `prices`.
        give_up_after: Failures in a row that end a call.

    Raises:
        InputError: If a value is out of range.

    Examples:
        >>> Endpoint(model="qwen3", base_url="http://127.0.0.1:8000/v1").concurrency
        8
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    requests_per_minute: float = Field(60.0, gt=0)
    concurrency: int = Field(8, ge=1)
    timeout: float = Field(60.0, gt=0)
    retries: int = Field(4, ge=0)
    max_answer_tokens: int = Field(2000, ge=1)
    prices: tuple[float, float] = (0.0, 0.0)
    max_requests: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=0)
    max_cost: float | None = Field(None, ge=0)
    give_up_after: int = Field(5, ge=1)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            first = error.errors()[0]
            text = f"{first['loc'][0]} is {first['input']!r}: {first['msg'].lower()}."
            raise InputError(text) from None
        if self.max_cost is not None and not any(self.prices):
            raise InputError(
                "max_cost needs prices=(input, output), in US dollars for a million tokens."
            )

    def client(self) -> Any:
        """An `openai.OpenAI`; an `InputError` without that package or without a key."""
        try:
            import openai
        except ImportError:
            raise InputError(
                "asking a language model needs the package openai: pip install 'vpd-lens[label]'."
            ) from None
        if not (key := os.environ.get(self.key_variable)):
            raise InputError(
                f"the environment variable {self.key_variable} is not set; it must hold the key of "
                "the endpoint. Servers without keys take any, such as 'none'."
            )
        how = {"timeout": self.timeout, "max_retries": self.retries}
        return openai.OpenAI(api_key=key, base_url=self.base_url, **how)

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """In US dollars, by `prices`."""
        return (input_tokens * self.prices[0] + output_tokens * self.prices[1]) / 1e6


@dataclass
class Spent:
    """What was asked, and what is still on its way at most: requests, tokens, US dollars."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    def add(self, endpoint: Endpoint, input_tokens: int, output_tokens: int, requests: int) -> None:
        """Count requests; negative numbers give back what was set aside for one."""
        self.requests += requests
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        self.cost += endpoint.cost(input_tokens, output_tokens)

    def allows(self, endpoint: Endpoint, prompt: Prompt) -> bool:
        """Whether one more request stays within the endpoint's budget, however long its answer."""
        size = prompt.tokens + endpoint.max_answer_tokens
        cost = endpoint.cost(prompt.tokens, endpoint.max_answer_tokens)
        tokens = self.input_tokens + self.output_tokens
        wanted = (self.requests + 1, tokens + size, self.cost + cost)
        limits = (endpoint.max_requests, endpoint.max_tokens, endpoint.max_cost)
        return all(
            limit is None or want <= limit + 1e-12
            for want, limit in zip(wanted, limits, strict=True)
        )


@dataclass(frozen=True)
class Reply(Generic[A]):
    """An answer, or the reason why there is none; and the tokens it took."""

    answer: A | None
    reason: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    hopeless: bool = False  # no other request can succeed either


def ask(
    endpoint: Endpoint, prompts: Mapping[str, Prompt], kind: type[A], spent: Spent
) -> Iterator[tuple[str, Reply[A]]]:
    """Ask all prompts that the budget allows; replies come as they arrive.

    Args:
        endpoint: Whom to ask, and how much.
        prompts: By a name that comes back with the reply.
        kind: What an answer is, as JSON.
        spent: Is added to.

    Raises:
        EndpointError: If the endpoint refuses, or as many requests as it may fail in a row.
        InputError: If there is no key, or no client.
    """
    client = endpoint.client()
    pool = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="vpd-lens")
    waiting, running, failures = list(prompts.items())[::-1], {}, 0
    next_start = time.monotonic()
    try:
        while waiting or running:
            now = time.monotonic()
            affordable = bool(waiting) and spent.allows(endpoint, waiting[-1][1])
            if not affordable and not running:
                return
            if affordable and len(running) < endpoint.concurrency and now >= next_start:
                name, prompt = waiting.pop()
                spent.add(endpoint, prompt.tokens, endpoint.max_answer_tokens, 1)
                running[pool.submit(_reply, client, endpoint, prompt, kind)] = name
                next_start = max(now, next_start) + 60 / endpoint.requests_per_minute
                continue
            free = affordable and len(running) < endpoint.concurrency
            for future in _finished(running, next_start - now if free else None):
                name, reply = running.pop(future), future.result()
                unused = reply.input_tokens - prompts[name].tokens
                spent.add(endpoint, unused, reply.output_tokens - endpoint.max_answer_tokens, 0)
                failures = 0 if reply.answer is not None else failures + 1
                yield name, reply
                _go_on(endpoint, reply, failures)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        client.close()


def _finished(running: Mapping[Future, str], seconds: float | None) -> list[Future]:
    """Those that are done, once one is, or after so many seconds."""
    if running:
        return list(wait(running, seconds, FIRST_COMPLETED).done)
    time.sleep(max(0.0, seconds or 0.0))
    return []


def _go_on(endpoint: Endpoint, reply: Reply, failures: int) -> None:
    if reply.hopeless or failures >= endpoint.give_up_after:
        count = "the endpoint refuses" if reply.hopeless else f"{failures} requests in a row failed"
        raise EndpointError(
            f"{count}, the last with: {reply.reason} What was answered before is kept. Check the "
            f"address ({endpoint.base_url or 'the default one'}), the model {endpoint.model!r} and "
            f"the key in {endpoint.key_variable}; then call again to go on."
        )


def _reply(client: Any, endpoint: Endpoint, prompt: Prompt, kind: type[A]) -> Reply[A]:
    """One request, repeated by the client if that may help."""
    import openai

    shape = {"name": kind.__name__, "schema": kind.model_json_schema(), "strict": True}
    try:
        completion = client.chat.completions.create(
            model=endpoint.model,
            messages=[
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": prompt.user},
            ],
            response_format={"type": "json_schema", "json_schema": shape},
            max_completion_tokens=endpoint.max_answer_tokens,
        )
        usage = getattr(completion, "usage", None)
        counts = [getattr(usage, f"{x}_tokens", None) for x in ("prompt", "completion")]
        text = completion.choices[0].message.content or ""
    except openai.OpenAIError as error:
        refusals = openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError
        return Reply(None, _without_key(endpoint, error), hopeless=isinstance(error, refusals))
    except (AttributeError, IndexError, TypeError, ValueError):
        return Reply(None, "the answer is none of the OpenAI interface.")
    used = (counts[0] or prompt.tokens, counts[1] or len(text) // _CHARACTERS)
    try:
        # Models without a fixed format put words or a fence around it.
        answer = kind.model_validate_json(text[text.find("{") : text.rfind("}") + 1])
    except ValidationError as error:
        what = error.errors()[0]["msg"].lower()
        return Reply(None, f"the answer {text[:80]!r} is not as asked: {what}.", *used)
    return Reply(answer, "", *used)


def _without_key(endpoint: Endpoint, error: Exception) -> str:
    """What an error says; servers may quote the key they were given."""
    key = os.environ.get(endpoint.key_variable, "")
    text = first_line(error).rstrip(".") + "."
    return text.replace(key, "***") if key else text
