"""A stand-in for an OpenAI-compatible server: it answers what a function says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# From the request's body and number, an HTTP status and what the model writes, or any other body.
Answer = Callable[[dict[str, Any], int], tuple[int, str | bytes]]


class LanguageModel(ThreadingHTTPServer):
    """Counts requests, their largest number at once, and keeps bodies and keys."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.lock = answer, threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.running = self.most = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: LanguageModel

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.asked)
            server.asked.append(body)
            server.keys.add(self.headers["Authorization"])
            server.running += 1
            server.most = max(server.most, server.running)
        status, text = server.answer(body, number)
        with server.lock:
            server.running -= 1
        if isinstance(text, bytes):
            content = text
        elif status != 200:
            content = json.dumps({"error": {"message": text}}).encode()
        else:
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            content = json.dumps(reply | {"choices": [choice], "usage": usage}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
