"""A hub on 127.0.0.1 that takes uploads over real HTTP: repositories, branches, pull requests, LFS objects, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

from tests.hub_server import Handler, Hub, sha256

WRITER, READER = "hf_may_write", "hf_may_only_read"
# What the hub knows: https://huggingface.co/docs/hub/model-cards#specifying-a-base-model
_RELATIONS = {"adapter", "merge", "quantized", "finetune"}


@dataclass
class UploadHub(Hub):
    """Keeps what user `me` (and nobody else) pushes under `folder`; a push can be stopped in its middle.

    `on_upload` is called with the number of the object that is about to be stored, and may raise ConnectionError.
    """

    user: str = "me"
    organizations: tuple[str, ...] = ("my-team",)
    private: set[str] = field(default_factory=set)
    stored: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    on_upload: Callable[[int], None] = lambda number: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def branch(self, repo: str, name: str) -> Path:
        return self.folder / "repositories" / repo / quote(name, safe="")

    def object(self, oid: str) -> Path:
        return self.folder / "objects" / oid

    def folder_of(self, repo: str, revision: str) -> Path | None:
        branch = next((each["branch"] for each in self.commits if each["oid"] == revision), revision)
        return folder if (folder := self.branch(repo, branch)).is_dir() else None

    def commit_of(self, repo: str, revision: str) -> str | None:
        if self.folder_of(repo, revision) is None:
            return None
        own = [
            each["oid"] for each in self.commits if each["repo"] == repo and revision in (each["branch"], each["oid"])
        ]
        return own[-1] if own else "0" * 40

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        folder = self.branch(repo, revision)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class UploadHandler(Handler):
    """What huggingface_hub calls for create_repo, create_branch and create_commit, and downloads of the result."""

    hub: UploadHub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:  # noqa: N802
        self._answer(
            {
                r"/api/repos/create": self._create,
                r"/api/validate-yaml": self._validate,
                r"/api/models/(.+/.+)/branch/(.+)": self._create_branch,
                r"/api/models/(.+/.+)/preupload/(.+)": self._preupload,
                r"/api/models/(.+/.+)/commit/(.+)": self._commit,
                r"/(.+/.+)\.git/info/lfs/objects/batch": self._batch,
                r"/(.+/.+)\.git/info/lfs/verify": self._verify,
            }
        )

    def do_PUT(self) -> None:  # noqa: N802
        self._answer({r"/lfs/([0-9a-f]{64})": self._store})

    def do_GET(self) -> None:  # noqa: N802
        if re.fullmatch(r"/api/models/[^/]+/[^/]+", self.path):
            self.path += "/revision/main"
        super().do_GET()

    def _error(self, repo: str, revision: str) -> str | None:
        known = self.headers.get("Authorization", "").removeprefix("Bearer ") in (WRITER, READER)
        return "RepoNotFound" if repo in self.hub.private and not known else super()._error(repo, revision)

    def _answer(self, routes: dict[str, Callable[..., None]]) -> None:
        path = urlsplit(self.path).path
        self.body = self._read_body()
        self.hub.requests.append((self.command, path, self.headers.get("Authorization", "")))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.command == "POST" and not path.endswith("/verify") and token not in (WRITER, READER):
            self._refuse(401, "Invalid credentials in Authorization header")
            return
        self.may_write = token == WRITER
        for route, answer in routes.items():
            if match := re.fullmatch(route, path):
                answer(*map(unquote, match.groups()))
                return
        self._refuse(404, f"no such call: {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        self._send(status, json.dumps({"error": message}).encode(), headers | ({"X-Error-Code": code} if code else {}))

    def _owned(self, repo: str) -> bool:
        """Whether the caller may write to an existing `repo`; answers where not."""
        if not self.hub.branch(repo, "main").is_dir():
            self._refuse(404, "Repository not found", "RepoNotFound")
        elif not self.may_write or repo.split("/")[0] not in (self.hub.user, *self.hub.organizations):
            self._refuse(403, "you need write access to this repository")
        else:
            return True
        return False

    # --- repositories -------------------------------------------------------------------------------------------

    def _create(self) -> None:
        asked = json.loads(self.body)
        owner = asked["organization"] or self.hub.user
        repo = f"{owner}/{asked['name']}"
        if not self.may_write or owner not in (self.hub.user, *self.hub.organizations):
            self._refuse(403, f"you may not create a model under {owner}")
            return
        exists = self.hub.branch(repo, "main").is_dir()
        if not exists:
            self.hub.branch(repo, "main").mkdir(parents=True)
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.add(repo)
        answer = {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}
        self._send(409 if exists else 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _create_branch(self, repo: str, name: str) -> None:
        if self._owned(repo):
            if self.hub.branch(repo, name).is_dir():
                self._refuse(409, "the branch exists already")
            else:
                shutil.copytree(self.hub.branch(repo, "main"), self.hub.branch(repo, name))
                self._send_json({})

    def _validate(self) -> None:
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        errors = []
        if data.get("base_model_relation", "finetune") not in _RELATIONS:
            errors.append({"message": '"base_model_relation" must be one of ' + ", ".join(sorted(_RELATIONS))})
        answer = json.dumps({"errors": errors, "warnings": []}).encode()
        self._send(400 if errors else 200, answer, {"Content-Type": "application/json"})

    # --- content ------------------------------------------------------------------------------------------------

    def _preupload(self, repo: str, revision: str) -> None:
        asks_for_request = "create_pr" in parse_qs(urlsplit(self.path).query)
        if not asks_for_request and not self._owned(repo):
            return
        present = self.hub.branch(repo, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": (mode := "lfs" if file["path"].endswith(".safetensors") else "regular"),
                "shouldIgnore": False,
                "oid": _oid(present / file["path"], mode),
            }
            for file in json.loads(self.body)["files"]
        ]
        self._send_json({"files": files})

    def _batch(self, repo: str) -> None:
        objects: list[dict[str, Any]] = []
        for item in json.loads(self.body)["objects"]:
            objects.append(dict(item))
            if not self.hub.object(item["oid"]).is_file():
                verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"}
                objects[-1]["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"},
                    "verify": verify,
                }
        self._send_json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        with self.hub.lock:
            try:
                self.hub.on_upload(len(self.hub.stored))
            except ConnectionError as error:
                # What a storage behind signed links says; the client does not try again.
                self._refuse(403, str(error))
                return
            if hashlib.sha256(self.body).hexdigest() != oid:
                self._refuse(400, "the content has another sha256")
                return
            self.hub.object(oid).parent.mkdir(parents=True, exist_ok=True)
            self.hub.object(oid).write_bytes(self.body)
            self.hub.stored.append(oid)
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def _verify(self, repo: str) -> None:
        asked = json.loads(self.body)
        held = self.hub.object(asked["oid"])
        if held.is_file() and held.stat().st_size == asked["size"]:
            self._send_json({})
        else:
            self._refuse(422, "the object is not here")

    def _commit(self, repo: str, revision: str) -> None:
        proposes = "create_pr" in parse_qs(urlsplit(self.path).query)
        if not proposes and not self._owned(repo):
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        branch = revision
        if proposes:
            branch = f"refs/pr/{1 + sum(each['branch'].startswith('refs/pr/') for each in self.hub.commits)}"
            shutil.copytree(self.hub.branch(repo, revision), self.hub.branch(repo, branch))
        for line in lines:
            self._apply(line["key"], line["value"], self.hub.branch(repo, branch))
        oid = hashlib.sha1(self.body).hexdigest()
        summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.hub.commits.append({"repo": repo, "branch": branch, "oid": oid, "summary": summary})
        answer = {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid}
        if proposes:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{branch.rpartition('/')[2]}"
        self._send_json(answer)

    def _apply(self, key: str, value: dict[str, Any], folder: Path) -> None:
        if key == "header":
            return
        path = folder / value["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if key == "file":
            path.write_bytes(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            shutil.copyfile(self.hub.object(value["oid"]), path)
        elif key == "deletedFile":
            path.unlink()


def point_at(hub: UploadHub, patch: pytest.MonkeyPatch, token: str = WRITER) -> dict[str, str]:
    """Make `hub` the hub of this process; returns the environment that does so for another one."""
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(hub.folder / "cache"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(hub.folder / "no token"))
    # The server speaks LFS.
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", token)
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(hub.folder / "home"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
    }


def _oid(path: Path, mode: str) -> str | None:
    """How the hub names a file it has: the sha256 of an LFS object, else git's own hash of a blob."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    return sha256(path) if mode == "lfs" else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
