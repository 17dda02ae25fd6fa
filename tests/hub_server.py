"""A hub on 127.0.0.1: the parts of its protocol that fetching a checkpoint uses, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from tests.conftest import Outcome
from tests.forked import ForkedRun

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Serves `folder` as some-org/tiny (anybody) and as some-org/secret (only with `token`), and notes requests."""

    folder: Path
    token: str = "hf_of_a_test"
    endpoint: str = ""
    fails: bool = False
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def folder_of(self, repo: str, revision: str) -> Path | None:
        """Where the files of a repository lie, None if there is no such repository."""
        return self.folder if repo in ("some-org/tiny", "some-org/secret") else None

    def commit_of(self, repo: str, revision: str) -> str | None:
        """The commit that a branch, tag or commit stands for, None if there is no such revision."""
        return COMMIT if revision in ("main", "v1", COMMIT) else None

    @property
    def fetched(self) -> set[str]:
        """The files whose content was asked for."""
        return {path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/cdn/" in path}

    @property
    def authorizations(self) -> set[str]:
        return {authorization for _, _, authorization in self.requests}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": sha256(path)}
        for path in files
    ]


class Handler(BaseHTTPRequestHandler):
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
            owner, name, revision, file = path.removeprefix("/cdn/").split("/", 3)
            self._send_file(self._folder(f"{owner}/{name}", unquote(revision)) / file)
            return
        match = re.fullmatch(
            r"(?:/api/models)?/(?P<repo>[\w.-]+/[\w.-]+)/(?P<what>revision|tree|resolve)/(?P<revision>[^/]+)/?(?P<file>.*)",
            path,
        )
        revision = unquote(match["revision"]) if match else ""
        if match is None or (error := self._error(match["repo"], revision)) == "RepoNotFound":
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif error is not None:
            self._send(403 if error == "GatedRepo" else 404, b"{}", {"X-Error-Code": error, "X-Error-Message": error})
        elif match["what"] == "revision":
            siblings = [{"rfilename": entry["path"]} for entry in tree(self._folder(match["repo"], revision))]
            commit = self.hub.commit_of(match["repo"], revision)
            self._send_json({"id": match["repo"], "sha": commit, "siblings": siblings, "tags": []})
        elif match["what"] == "tree":
            self._send_json(tree(self._folder(match["repo"], revision)))
        else:
            self._redirect_to_file(match["repo"], revision, match["file"])

    def _folder(self, repo: str, revision: str) -> Path:
        folder = self.hub.folder_of(repo, revision)
        assert folder is not None
        return folder

    def _error(self, repo: str, revision: str) -> str | None:
        if repo == "some-org/secret" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return "GatedRepo"
        if self.hub.commit_of(repo, revision) is None:
            return "RevisionNotFound" if self.hub.folder_of(repo, "main") is not None else "RepoNotFound"
        return None if self.hub.folder_of(repo, revision) is not None else "RepoNotFound"

    def _redirect_to_file(self, repo: str, revision: str, name: str) -> None:
        """Like the real one, which sends large files from another host."""
        path = self._folder(repo, revision) / name
        if not path.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
        headers = {
            "X-Repo-Commit": str(self.hub.commit_of(repo, revision)),
            "X-Linked-Etag": f'"{sha256(path)}"',
            "X-Linked-Size": str(path.stat().st_size),
            "Location": f"{elsewhere}/cdn/{repo}/{quote(revision, safe='')}/{name}",
        }
        self._send(302, b"", headers)

    def _send_file(self, path: Path) -> None:
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        headers = {"ETag": f'"{sha256(path)}"', "Accept-Ranges": "bytes"}
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
        if self.command != "HEAD":
            self.wfile.write(content)


AnyHub = TypeVar("AnyHub", bound=Hub)


@contextmanager
def serve(hub: AnyHub, answers: type[Handler] = Handler) -> Iterator[AnyHub]:
    """Answer for `hub` until the end of the block; its `endpoint` is what HF_ENDPOINT must be."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfHub", (answers,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Machine:
    """A user's machine: a cache of its own, and the hub that it is pointed at."""

    home: Path
    hub: Hub

    def start(self, *arguments: object, **settings: str) -> ForkedRun:
        """Start `prune-cli` as a process that knows nothing of this machine's own hub settings."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home), **settings}
        return ForkedRun(*arguments, env={**clean, **settings}, cwd=self.home.parent)

    def run(self, *arguments: object, **settings: str) -> Outcome:
        process = self.start(*arguments, **settings)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode is not None
        return Outcome(process.returncode, stdout, stderr)

    def refused(self, model: str, *arguments: str, code: int = 2, **settings: str) -> str:
        """Ask for what must be refused, of the command that starts fastest; returns the one sentence."""
        outcome = self.run("inspect", model, *arguments, **settings)
        assert outcome.code == code, outcome.stderr
        assert outcome.stdout == ""
        assert outcome.stderr.startswith("Error: ")
        assert outcome.stderr.count("\n") == 1
        assert outcome.stderr.endswith(".\n")
        return outcome.stderr
