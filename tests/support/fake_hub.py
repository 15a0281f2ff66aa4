"""A hub that serves folders of this machine: what huggingface_hub asks for, over HTTP.

GET  /api/models/<repo>[/revision/<r>]     the commit, and the names of all files
POST /api/models/<repo>/paths-info/<r>     sizes
HEAD, GET /<repo>/resolve/<r>/<file>       a file, or a range of it
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d+)?")


class FakeHub:
    """A running hub; `sent` counts the bytes of each file that were asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root  # <root>/<owner>/<name>/ are the repositories
        self.sent: dict[str, int] = {}
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def commit(self, repository: str) -> str:
        """Another one whenever a file is added or changed."""
        folder = self.root / repository
        state = [(name, _etag(folder / name)) for name in self.files(repository)]
        return hashlib.sha1(json.dumps(state).encode(), usedforsecurity=False).hexdigest()

    def files(self, repository: str) -> list[str]:
        """The names of a repository's files; none where it does not exist."""
        folder = self.root / repository
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """No lines."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"] or 0)).decode()
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/.*", self.path)
        assert match, self.path
        form = self.headers.get("content-type", "").startswith("application/x-www-form")
        paths = parse_qs(body)["paths"] if form else json.loads(body)["paths"]
        folder = self.served.root / match[1]
        found = [folder / path for path in paths if (folder / path).is_file()]
        self._json([self._entry(folder, path) for path in found])

    @staticmethod
    def _entry(folder: Path, path: Path) -> dict[str, Any]:
        name, size = str(path.relative_to(folder)), path.stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": _etag(path)}

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            self._repository(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            folder, names = self.served.root / match[1], self.served.files(match[1])
            if names:
                self._json([self._entry(folder, folder / name) for name in names])
            else:
                self._error("RepoNotFound")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(match[1], match[2])
        else:
            self._error("RepoNotFound")

    def _repository(self, repository: str) -> None:
        files = self.served.files(repository)
        if not files:
            self._error("RepoNotFound")
            return
        names = [{"rfilename": name} for name in files]
        self._json(
            {
                "id": repository,
                "modelId": repository,
                "sha": self.served.commit(repository),
                "siblings": names,
            }
        )

    def _file(self, repository: str, file: str) -> None:
        path, name = self.served.root / repository / file, f"{repository}/{file}"
        if not path.is_file():
            self._error("EntryNotFound")
            return
        data = path.read_bytes()
        first, end, status = 0, len(data), 200
        if match := _RANGE.fullmatch(self.headers.get("range") or ""):
            first, status = int(match[1]), 206
            end = min(end, int(match[2]) + 1) if match[2] else end
        self.send_response(status)
        self.send_header("x-repo-commit", self.served.commit(repository))
        self.send_header("etag", f'"{_etag(path)}"')
        self.send_header("accept-ranges", "bytes")
        if status == 206:
            self.send_header("content-range", f"bytes {first}-{end - 1}/{len(data)}")
        self.send_header("content-length", str(end - first))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first:end])
            self.served.sent[name] = self.served.sent.get(name, 0) + end - first

    def _json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, code: str) -> None:
        self.send_response(404)
        self.send_header("x-error-code", code)
        self.send_header("content-length", "0")
        self.end_headers()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
