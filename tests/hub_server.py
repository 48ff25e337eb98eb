"""A stand-in for the Hugging Face hub: as much of it as `huggingface_hub` asks for, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
WRITER = "hf_writer"  # the token that may write


class Hub(ThreadingHTTPServer):
    """Repositories with branches; every commit is kept under the hash of what it holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.branches: dict[str, dict[str, str]] = {}  # repository: {branch: commit}
        self.commits: dict[str, Files] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []  # method and path of every request
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def create(self, name: str, private: bool = False) -> None:
        self.branches[name], self.private[name] = {}, private
        self.commit(name, "main", {".gitattributes": b""})

    def commit(self, name: str, branch: str, files: Files) -> str:
        content = json.dumps([name, {path: _oid(data) for path, data in sorted(files.items())}])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[name][branch] = commit
        return commit

    def add_folder(self, name: str, folder: Path) -> str:
        """A repository with the files of a folder; its commit."""
        self.create(name)
        return self.commit(name, "main", {p.name: p.read_bytes() for p in folder.iterdir()})

    def files(self, name: str, branch: str = "main") -> Files:
        return self.commits[self.branches[name][branch]]


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_HEAD

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path, query = url.path.strip("/"), parse_qs(url.query)
        self.server.asked.append(f"{self.command} {path}")
        for pattern, action in _ACTIONS:
            if found := re.fullmatch(pattern, path):
                action(self, *map(unquote, found.groups()), body=body, query=query)
                return
        self._fail(404, "EntryNotFound")

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, data: object, status: int = 200) -> None:
        self._send(json.dumps(data).encode(), status, Content_Type="application/json")

    def _fail(self, status: int, code: str, message: str = "refused") -> None:
        self._send(b"{}", status, X_Error_Code=code, X_Error_Message=message)

    def _may(self, name: str, write: bool) -> bool:
        """Whether the request's token may do that; an answer has been sent if not."""
        known = self.headers.get("Authorization") == f"Bearer {WRITER}"
        if name not in self.server.branches or (self.server.private[name] and not known):
            self._fail(404, "RepoNotFound")
        elif write and not known:
            self._fail(403, "", "you may not write here")
        else:
            return True
        return False

    def _commit_of(self, name: str, revision: str) -> str | None:
        commit = self.server.branches[name].get(revision, revision)
        if commit not in self.server.commits:
            self._fail(404, "RevisionNotFound")
            return None
        return commit

    def create(self, *, body: bytes, query: object) -> None:
        if self.headers.get("Authorization") != f"Bearer {WRITER}":
            self._fail(401, "", "Invalid credentials in Authorization header")
            return
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.server.branches else 200
        if status == 200:
            self.server.create(name, asked.get("visibility") == "private")
        self._json({"url": f"{self.server.address}/{name}"}, status)

    def branch(self, name: str, branch: str, *, body: bytes, query: object) -> None:
        if self._may(name, write=True):
            status = 409 if branch in self.server.branches[name] else 200
            if status == 200:
                self.server.commit(name, branch, self.server.files(name))
            self._json({}, status)

    def preupload(self, name: str, _: str, *, body: bytes, query: object) -> None:
        if self._may(name, write=True):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self._json({"files": modes})

    def commit(self, name: str, branch: str, *, body: bytes, query: object) -> None:
        if not self._may(name, write=True):
            return
        files = dict(self.server.files(name, branch))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        commit = self.server.commit(name, branch, files)
        url = f"{self.server.address}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit})

    def info(self, name: str, revision: str = "main", *, body: bytes, query: object) -> None:
        if self._may(name, write=False) and (commit := self._commit_of(name, revision)):
            files = [{"rfilename": path} for path in self.server.commits[commit]]
            self._json({"id": name, "sha": commit, "siblings": files})

    def tree(self, name: str, revision: str, *, body: bytes, query: object) -> None:
        if self._may(name, write=False) and (commit := self._commit_of(name, revision)):
            files = self.server.commits[commit].items()
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
                for path, data in files
            ]
            self._json(entries)

    def resolve(self, name: str, revision: str, path: str, *, body: bytes, query: object) -> None:
        if not self._may(name, write=False):
            return
        if (commit := self._commit_of(name, revision)) is None:
            return
        content = self.server.commits[commit].get(path)
        if content is None:
            self._fail(404, "EntryNotFound")
        else:
            self._send(content, ETag=f'"{_oid(content)}"', X_Repo_Commit=commit)

    def models(self, *, body: bytes, query: dict[str, list[str]]) -> None:
        import yaml

        found = []
        for name in self.server.branches:
            card = self.server.files(name).get("README.md", b"").decode()
            data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
            tags, wanted = data.get("tags", []), query.get("filter", [])
            matches = all(tag in tags for tag in wanted)
            matches &= query.get("search", [""])[0] in name
            matches &= name.startswith(query.get("author", [""])[0])
            if matches and not self.server.private[name]:
                found.append({"id": name, "tags": tags, "cardData": data, "downloads": 3})
        self._json(found)

    def accept(self, *, body: bytes, query: object) -> None:
        self._json({"errors": [], "warnings": []})


_REPO = r"([\w.-]+(?:/[\w.-]+)?)"
_ACTIONS = [
    (r"api/repos/create", _Handler.create),
    (r"api/validate-yaml", _Handler.accept),
    (r"api/models", _Handler.models),
    (rf"api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (rf"api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    (rf"api/models/{_REPO}/revision/(.+)", _Handler.info),
    (rf"api/models/{_REPO}", _Handler.info),
    (rf"{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
