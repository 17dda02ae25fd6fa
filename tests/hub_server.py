"""A hub on 127.0.0.1: the parts of its protocol that fetching a checkpoint uses, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Serves `folder` as some-org/tiny (anybody) and as some-org/secret (only with `token`), and notes requests."""

    folder: Path
    token: str = "hf_of_a_test"
    endpoint: str = ""
    fails: bool = False
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def fetched(self) -> set[str]:
        """The files whose content was asked for."""
        return {path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/cdn/" in path}

    @property
    def authorizations(self) -> set[str]:
        return {authorization for _, _, authorization in self.requests}

    def sha256(self, name: str) -> str:
        return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()

    def tree(self) -> list[dict[str, Any]]:
        files = sorted(path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return [
            {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": self.sha256(name)}
            for name in map(str, files)
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _respond(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Authorization", "")))
        if self.hub.fails:
            self._send(500, b"the hub is ill")
            return
        if path.startswith("/cdn/"):
            self._send_file(path.removeprefix("/cdn/"))
            return
        match = re.fullmatch(
            r"(?:/api/models)?/(?P<repo>[\w-]+/[\w-]+)/(?P<what>revision|tree|resolve)/(?P<revision>[^/]+)/?(?P<file>.*)",
            path,
        )
        if match is None or (error := self._error(match["repo"], match["revision"])) == "RepoNotFound":
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif error is not None:
            self._send(403 if error == "GatedRepo" else 404, b"{}", {"X-Error-Code": error, "X-Error-Message": error})
        elif match["what"] == "revision":
            siblings = [{"rfilename": entry["path"]} for entry in self.hub.tree()]
            self._send_json({"id": match["repo"], "sha": COMMIT, "siblings": siblings, "tags": []})
        elif match["what"] == "tree":
            self._send_json(self.hub.tree())
        else:
            self._redirect_to_file(match["file"])

    def _error(self, repo: str, revision: str) -> str | None:
        if repo not in ("some-org/tiny", "some-org/secret"):
            return "RepoNotFound"
        if repo == "some-org/secret" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return "GatedRepo"
        return None if revision in ("main", "v1", COMMIT) else "RevisionNotFound"

    def _redirect_to_file(self, name: str) -> None:
        """Like the real one, which sends large files from another host."""
        content = (self.hub.folder / name).read_bytes()
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{self.hub.sha256(name)}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{name}",
        }
        self._send(302, b"", headers)

    def _send_file(self, name: str) -> None:
        content = (self.hub.folder / name).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        headers = {"ETag": f'"{self.hub.sha256(name)}"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if asked else 200, content[start:], headers)

    def _send_json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer for `hub` until the end of the block; its `endpoint` is what HF_ENDPOINT must be."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
