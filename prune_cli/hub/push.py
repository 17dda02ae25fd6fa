"""From a pruned folder to a repository of the hub: checked against its own report, then uploaded in one commit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from prune_cli.checkpoint.file_names import CARD, JOURNAL, OTHER_WEIGHTS, SOURCE_CARD, partial_folder
from prune_cli.checkpoint.reader import INDEX_FILE
from prune_cli.errors import RequestError
from prune_cli.hub.errors import hub_failures
from prune_cli.hub.finished import Finished, read_finished
from prune_cli.hub.public_texts import public_texts
from prune_cli.progress import Progress, Silent
from prune_cli.report.card import read_card, warnings_of
from prune_cli.report.types import PrunedModel
from prune_cli.sparse.bit_patterns import StoredTensors

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class PushRequest:
    """What `prune-cli push` was asked for; see its --help."""

    out: Path
    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class PushedFile:
    path: str
    bytes: int


@dataclass(frozen=True)
class Push:
    """What went, or would go, to the hub. `removed` are weights there that the output does not have."""

    repo: str
    url: str
    revision: str
    message: str
    files: Sequence[PushedFile]
    bytes: int
    dry_run: bool
    removed: Sequence[str] = ()
    commit: str | None = None
    pull_request: str | None = None
    warnings: Sequence[str] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def push(request: PushRequest, progress: Progress | None = None) -> Push:
    """Check OUT, then make the repository where there is none and send everything in one commit.

    Raises RequestError for an output that is incomplete or differs from its report, and where the hub refuses;
    PruneError where the network fails. What was sent before is not sent again when the push is repeated.
    """
    progress = progress or Silent()
    _check_request(request)
    finished = check_output(request.out, progress)
    texts = public_texts(request.out, finished.paths)
    files = [replace(f, bytes=len(texts[f.path])) if f.path in texts else f for f in _files(request.out)]
    planned = _plan(request, finished, files)
    return planned if request.dry_run else _send(request, planned, texts, progress)


def check_output(out: Path, progress: Progress) -> Finished:
    """A finished output whose weights are, byte for byte, those that the report names.

    Raises RequestError that names the file otherwise.
    """
    if not out.is_dir() and partial_folder(out).is_dir():
        raise RequestError(
            f"{out} is not finished: {partial_folder(out)} holds an interrupted run; repeat its command with --resume."
        )
    if (out / JOURNAL).exists():
        raise RequestError(f"{out} is an interrupted run: repeat its command with --resume, then push the result.")
    finished = read_finished(out)
    if not (out / "config.json").is_file():
        raise RequestError(f"{out / 'config.json'} is missing: the output is incomplete; prune again.")
    _check_weights(out, finished.hashes, progress)
    return finished


def _check_weights(out: Path, hashes: Mapping[str, frozenset[str]], progress: Progress) -> None:
    progress.stage(f"Checking {len(hashes)} file(s) against the report", len(hashes))
    unknown = [file.path for file in _files(out) if file.path.endswith(OTHER_WEIGHTS) and file.path not in hashes]
    if unknown:
        raise RequestError(
            f"{out / unknown[0]} holds weights that the report does not know: remove it, or prune again."
        )
    missing = next((name for name in hashes if not (out / name).is_file()), None)
    if missing is not None:
        raise RequestError(f"{out / missing} is missing though the report names it: prune again.")
    stored = StoredTensors(out)
    for name, expected in hashes.items():
        found = stored.sha256(name)
        if found not in expected and name in stored.shards:
            # A sparse file stands for the dense one that the report describes.
            found = stored.dense_sha256(name)
        if found not in expected:
            raise RequestError(
                f"{out / name} is not what the report describes (sha256 {found[:12]}…, the report has "
                f"{'… or '.join(each[:12] for each in sorted(expected))}…): it was changed after pruning; prune again."
            )
        progress.advance()


def _files(out: Path) -> Iterator[PushedFile]:
    """Everything but hidden files and folders."""
    for path in sorted(out.rglob("*")):
        relative = path.relative_to(out)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield PushedFile(relative.as_posix(), path.stat().st_size)


def _check_request(request: PushRequest) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if request.create_pr and request.revision not in (None, "main"):
        raise RequestError("--create-pr and --revision exclude each other: a pull request makes its own branch.")
    if request.message is not None and not request.message.strip():
        raise RequestError("--message is empty: say what the commit is, or leave it out.")
    try:
        validate_repo_id(request.repo)
    except HFValidationError as error:
        raise RequestError(
            f"{request.repo!r} is no name of a repository: give OWNER/NAME, of letters, digits, '-', '_' and '.'."
        ) from error


def _plan(request: PushRequest, finished: Finished, files: Sequence[PushedFile]) -> Push:
    from huggingface_hub import constants

    return Push(
        repo=request.repo,
        url=f"{constants.ENDPOINT}/{request.repo}",
        revision=request.revision or "main",
        message=request.message or finished.message,
        files=files,
        bytes=sum(file.bytes for file in files),
        dry_run=request.dry_run,
        warnings=_warnings(request.out, finished.model),
    )


def _warnings(out: Path, model: PrunedModel) -> list[str]:
    """What a person should know before others see it."""
    if not (out / CARD).is_file():
        return [f"{out} has no {CARD}: the model will have no card."]
    own = read_card(out / CARD).metadata
    warnings = warnings_of(read_card(out / SOURCE_CARD), model.name)
    # A licence that somebody wrote into the card since settles that question.
    return [text for text in warnings if "license" not in own or "licence" not in text]


def _send(request: PushRequest, planned: Push, texts: Mapping[str, bytes], progress: Progress) -> Push:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    _check_token(api)
    additions = [
        CommitOperationAdd(file.path, texts.get(file.path, str(request.out / file.path))) for file in planned.files
    ]
    progress.stage(f"Sending {len(additions)} file(s) to {planned.url}", 1)
    with hub_failures(request.repo, create_pr=request.create_pr):
        repo = request.repo if request.create_pr else _make_repository(api, request)
        removed = _stale_weights(api, repo, planned)
        done = api.create_commit(
            repo,
            [*additions, *(CommitOperationDelete(path) for path in removed)],
            commit_message=planned.message,
            revision=None if request.create_pr else request.revision,
            create_pr=request.create_pr,
        )
    url = f"{api.endpoint}/{repo}" + (f"/tree/{request.revision}" if request.revision else "")
    return replace(planned, repo=repo, url=url, removed=removed, commit=done.oid, pull_request=done.pr_url)


def _check_token(api: HfApi) -> None:
    from huggingface_hub import constants, get_token

    if get_token() is None:
        raise RequestError(
            f"There is no token for {api.endpoint}: log in with `hf auth login`, or set HF_TOKEN to a token that may "
            f"write ({api.endpoint}/settings/tokens)."
        )
    if constants.HF_HUB_OFFLINE:
        raise RequestError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or use --dry-run.")


def _make_repository(api: HfApi, request: PushRequest) -> str:
    """The repository's full name; it and the branch are made where they are missing."""
    repo = api.create_repo(request.repo, private=request.private or None, exist_ok=True).repo_id
    if request.revision not in (None, "main"):
        api.create_branch(repo, branch=request.revision, exist_ok=True)
    return repo


def _stale_weights(api: HfApi, repo: str, planned: Push) -> list[str]:
    """Weights of an earlier upload: transformers would load some of them in place of ours."""
    ours = {file.path for file in planned.files}
    there = api.list_repo_files(repo, revision=planned.revision)
    return [path for path in there if "/" not in path and path not in ours and _is_weights(path)]


def _is_weights(path: str) -> bool:
    return path == INDEX_FILE or path.endswith(".safetensors")
