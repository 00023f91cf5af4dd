"""A Hub on this machine: the endpoints that huggingface_hub calls, over HTTP, with a log and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def push(self, files: Files, ref: str = "main") -> str:
        """A new commit of these files; returns its hash."""
        seed = repr((sorted(files.items()), len(self.commits))).encode()
        commit = hashlib.sha1(seed, usedforsecurity=False).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit


class HubServer:
    """Use with `with`. `log` holds (method, path, Range header) of every request."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.token: str | None = None
        self.cut: dict[str, int] = {}
        """File name -> bytes after which its next answers break off, that many bytes a time; empty: none do."""
        self.status: int | None = None
        """Answer of every request, instead of what it asks for."""
        self.body: bytes | None = None
        """Answer of every API request with status 200, instead of JSON."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.log if method == "GET" and "/resolve/" in path]

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.log.append((self.command, path, self.headers.get("Range")))
        if hub.status is not None:
            return self._send(hub.status, b"")
        if path.startswith("/api/") and hub.body is not None:
            return self._send(200, hub.body)
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            (r"/api/models/([^/]+/[^/]+)()", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            found = re.fullmatch(pattern, path)
            if found is not None:
                return self._with_access(answer, *found.groups())
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _with_access(self, answer: Any, name: str, revision: str, *rest: str) -> None:
        repository = self.hub.repositories.get(name)
        allowed = self.hub.token is not None and self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repository is None or (repository.private and not allowed):
            # The Hub does not tell a stranger that a private repository exists.
            return self._send(401, b'{"error": "Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
        if repository.gated and not allowed and "/resolve/" in self.path:
            status = 403 if self.headers.get("Authorization") else 401
            return self._send(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        commit = repository.refs.get(revision or "main", revision)
        if commit not in repository.commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return answer(name, commit, repository.commits[commit], *rest)

    def _info(self, name: str, commit: str, files: Files) -> None:
        siblings = [{"rfilename": path} for path in files]
        self._send(200, json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings}).encode())

    def _tree(self, name: str, commit: str, files: Files) -> None:
        entries = [
            {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": hashlib.sha1(data, usedforsecurity=False).hexdigest(),
            }
            for path, data in files.items()
        ]
        self._send(200, json.dumps(entries).encode())

    def _file(self, name: str, commit: str, files: Files, path: str) -> None:
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = files[path]
        headers = {
            "ETag": f'"{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            return self._send(200, data, headers, path)
        start = int(asked[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._send(206, data[start:], headers, path)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, path: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        # One connection a request: none outlives the server.
        self.send_header("Connection", "close")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        most = self.hub.cut.get(path)
        if most is not None and most < len(data):
            self.wfile.write(data[:most])
            return
        self.wfile.write(data)
