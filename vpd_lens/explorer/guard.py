"""Who may ask the explorer, and what browsers are told about its answers.

The token is in the address that is printed, and from then on in a cookie that no script reads and
no other site sends. A page of another site can neither read answers (its requests carry no cookie),
nor, under a name that it points at this machine, pass for ours (the `Host` is checked), nor change
anything: that takes a request of our own origin.
"""

from __future__ import annotations

import secrets
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "vpd-explorer"
HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
NO_TOKEN = (
    "This explorer needs the token of the address that `vpd-lens explore` printed when it started."
)


class Guard:
    """Refuses requests without the token, and those that another site's page makes."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        # Cookies do not know of ports: each explorer on this machine has one of its own.
        cookie = f"{COOKIE}-{request.url.port or 80}"
        by_address = self._is_token(request.query_params.get("token", ""))

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if by_address:
                    how = "Path=/; HttpOnly; SameSite=Strict"
                    headers.append("set-cookie", f"{cookie}={self.token}; {how}")
            await send(message)

        refusal = None
        if not by_address and not self._is_token(_cookie(request, cookie)):
            refusal = _refusal(request, 401, NO_TOKEN)
        elif _is_foreign(request):
            refusal = _refusal(request, 403, "Another site's page may not ask the explorer.")
        await (refusal or self.app)(scope, receive, hardened)

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


def _cookie(request: Request, name: str) -> str:
    try:
        found = SimpleCookie(request.headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _is_foreign(request: Request) -> bool:
    """Whether a page of another origin asks; following a link to here is no such thing."""
    origin = request.headers.get("origin")
    if origin is not None and origin != f"{request.url.scheme}://{request.headers.get('host')}":
        return True
    site = request.headers.get("sec-fetch-site", "none")
    follows = request.headers.get("sec-fetch-mode") == "navigate" and request.method == "GET"
    return site in ("cross-site", "same-site") and not follows


def _refusal(request: Request, status: int, text: str) -> Response:
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": text}, status)
    return PlainTextResponse(text, status)
