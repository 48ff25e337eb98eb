"""What the explorer answers: pages under `/`, and JSON under `/api/`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from vpd_lens.errors import BusyError, InputError, VPDError
from vpd_lens.explorer import pages
from vpd_lens.explorer.guard import Guard
from vpd_lens.explorer.jobs import Job
from vpd_lens.explorer.orders import (
    EditsOrder,
    GraphOrder,
    GroupsOrder,
    HarvestOrder,
    LabelOrder,
    Order,
    Question,
    SaveOrder,
)
from vpd_lens.explorer.workbench import Workbench

MAX_BODY = 4 << 20  # bytes

Asked = TypeVar("Asked", bound=Order)
Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(bench: Workbench, token: str, hosts: list[str]) -> Starlette:
    """The application of one workbench.

    Args:
        bench: The model and what is known of it; closed with the application.
        token: Without it nothing is answered.
        hosts: Names under which it may be asked, against DNS rebinding; `*` stands for any.
    """

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(bench.close)

    return Starlette(
        routes=_routes(bench),
        lifespan=lifespan,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(Guard, token=token),
        ],
        exception_handlers={
            VPDError: partial(_refused, bench),
            HTTPException: partial(_refused, bench),
            Exception: _failed,
        },
    )


def _routes(bench: Workbench) -> list[Route]:
    def start(order: GraphOrder, _: Request) -> JSONResponse:
        return JSONResponse(bench.trace(order).shown(), 202)

    def gather(order: HarvestOrder, _: Request) -> JSONResponse:
        return JSONResponse(bench.gather(order).shown(), 202)

    def edits(order: EditsOrder, _: Request) -> JSONResponse:
        return JSONResponse(bench.intervene(order))

    def group(order: GroupsOrder, request: Request) -> JSONResponse:
        bench.graphs.group(request.path_params["key"], order.groups)
        return JSONResponse({"groups": len(order.groups)})

    def label(order: LabelOrder, request: Request) -> JSONResponse:
        return JSONResponse(bench.label(request.path_params["name"], order.text))

    def save(order: SaveOrder, request: Request) -> JSONResponse:
        kept = bench.graphs.save(request.path_params["key"], order.name)
        return JSONResponse({"name": kept.name, "folder": str(bench.graphs.folder)})

    def one_job(act: Callable[[str], Job], request: Request) -> JSONResponse:
        return JSONResponse(act(request.path_params["key"]).shown())

    def jobs(_: Request) -> JSONResponse:
        return JSONResponse([job.shown() for job in bench.jobs.all()])

    def card(request: Request) -> JSONResponse:
        return JSONResponse(bench.card(request.path_params["name"]))

    def graph(request: Request) -> HTMLResponse:
        return pages.graph(bench, request.path_params["key"])

    def harvest(request: Request) -> HTMLResponse:
        return pages.harvest(bench, request.path_params["page"])

    return [
        Route("/", partial(_front, bench)),
        Route("/graph/{key}", graph),
        Route("/harvest/{page}", harvest),
        Route("/api/cards/{name}", card),
        Route("/api/labels/{name}", _taking(LabelOrder, label), methods=["PUT"]),
        Route("/api/graphs", _taking(GraphOrder, start), methods=["POST"]),
        Route("/api/graphs/{key}/groups", _taking(GroupsOrder, group), methods=["PUT"]),
        Route("/api/graphs/{key}/save", _taking(SaveOrder, save), methods=["POST"]),
        Route("/api/harvest", _taking(HarvestOrder, gather), methods=["POST"]),
        Route("/api/edits", _taking(EditsOrder, edits), methods=["POST"]),
        Route("/api/jobs", jobs),
        Route("/api/jobs/{key}", partial(one_job, bench.jobs.__getitem__)),
        Route("/api/jobs/{key}", partial(one_job, bench.jobs.cancel), methods=["DELETE"]),
    ]


def _front(bench: Workbench, request: Request) -> HTMLResponse:
    """The question of an address, if it has one."""
    if "text" not in request.query_params:
        return pages.home(bench)
    position = request.query_params.get("position", "").strip()
    given = _asked(request.query_params).model_dump()
    return pages.text(bench, _checked(Question, {**given, "position": position or -1}))


def _asked(given: Mapping[str, str]) -> Question:
    """Text and target of an address; forms send newlines as two characters."""
    text, target = (given.get(name, "") for name in ("text", "target"))
    return Question(text=text.replace("\r\n", "\n"), target=target)


def _taking(kind: type[Asked], answer: Callable[[Asked, Request], Response]) -> Endpoint:
    """An endpoint for JSON of one kind, answered in a thread."""

    async def endpoint(request: Request) -> Response:
        # Also what a page of another site cannot send without asking first.
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise HTTPException(415, "the request must be of type application/json.")
        order = _checked(kind, await _body(request))
        return await run_in_threadpool(answer, order, request)

    return endpoint


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the request has more than {MAX_BODY:,} bytes.")
    return body


def _checked(kind: type[Asked], given: bytes | dict[str, Any]) -> Asked:
    try:
        if isinstance(given, bytes):
            return kind.model_validate_json(given)
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{where or 'the request'}: {first['msg']}.") from None


def _refused(bench: Workbench, request: Request, error: Exception) -> Response:
    """What is wrong with a request, as JSON or as a page."""
    status, headers = 400, {}
    if isinstance(error, BusyError):
        status, headers = 503, {"retry-after": "2"}
    elif isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
    text = error.detail if isinstance(error, HTTPException) else str(error)
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": text}, status, headers)
    page = pages.home(bench, _asked(request.query_params), text, status)
    page.headers.update(headers)
    return page


def _failed(request: Request, error: Exception) -> Response:
    text = f"{type(error).__name__}: {error}"  # which the log has with its traceback
    return JSONResponse({"error": text}, 500)
