"""`explore`: listen on this machine until interrupted."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from torch import nn

from vpd_lens.analysis.harvest import Harvest
from vpd_lens.errors import ConfigError
from vpd_lens.explorer.app import build_app
from vpd_lens.explorer.workbench import Workbench


def explore(
    model: nn.Module,
    harvest: Harvest | None = None,
    *,
    data: Any = None,
    folder: str | Path = "explored",
    labels: str | Path | None = None,
    title: str = "",
    texts: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 0,
    open_browser: bool = False,
) -> None:
    """Serve the explorer of a decomposed model until Ctrl-C; print its address first.

    The address has a token, without which nothing is answered.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge with a tokenizer.
        harvest: What its subcomponents respond to; without it, cards say what the weights say.
        data: What a harvest can be gathered from when a page asks for it, as for
            `vpd_lens.harvest`.
        folder: Where graphs are saved; made when something is.
        labels: The file that labels are written to, or the folder of the saved decomposition;
            `None`: `labels.json` in `folder`, which is read if it is there.
        title: What the pages call the model.
        texts: To offer on the first page.
        host: Where to listen. Anything but this machine itself makes the explorer reachable from
            others, over a connection that is not encrypted.
        port: 0: any that is free.
        open_browser: Whether to open the page in the default browser.

    Raises:
        ArtefactError: If the harvest, or the labels, are of another decomposition.
        AttachError: If the model carries no decomposition.
        ConfigError: If the port is in use or the host is none of this machine.
        InputError: If the model has no tokenizer, or no known residual stream.

    Examples:
        >>> import vpd_lens
        >>> from vpd_lens.explorer import explore
        >>> explore(vpd_lens.load_example())  # doctest: +SKIP
    """
    listening = _listening(host, port)
    token = secrets.token_urlsafe(24)
    with listening:
        place = None if labels is None else Path(labels)
        how: Any = {"data": data, "labels": place, "title": title, "texts": texts}
        bench = Workbench(model, harvest, Path(folder), **how)
        server = server_of(build_app(bench, token, _names(host)))
        shown = host if _is_loopback(host) else socket.gethostname()
        address = f"http://{shown}:{listening.getsockname()[1]}/?token={token}"
        print(f"Explorer: {address}\nCtrl-C ends it.", flush=True)
        if open_browser:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):  # raised again after a graceful end
            server.run(sockets=[listening])
        print("The explorer has ended.")


def server_of(app: Starlette) -> uvicorn.Server:
    """What answers requests; `run` takes the sockets to listen on."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # the address has the token in it
            http="h11",
            h11_max_incomplete_event_size=1 << 20,  # prompts are part of addresses
            ws="none",
            server_header=False,
            proxy_headers=False,
        )
    )


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Give another --port, or 0 "
            "for any that is free."
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _names(host: str) -> list[str]:
    """What this machine may be called in requests; behind a public address, anything."""
    return ["127.0.0.1", "localhost"] if _is_loopback(host) else ["*"]
