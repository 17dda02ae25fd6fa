"""`prune-cli push` to a hub of our own, over huggingface_hub's real protocol; every command is a process of its own."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from prune_cli.checkpoint.file_names import JOURNAL, partial_folder
from prune_cli.hub.finished import read_finished
from prune_cli.hub.public_texts import public_texts
from tests.conftest import Outcome, RunCommand
from tests.forked import ForkedRun
from tests.hub_server import Machine, serve
from tests.hub_uploads import READER, WRITER, UploadHandler, UploadHub, point_at

SHARDS = 5
# httpx says this to huggingface_hub; a process of its own does not show it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Publisher(Machine):
    """A machine with a token that may write; the xet protocol is off, as the server speaks LFS."""

    hub: UploadHub  # pyright: ignore[reportIncompatibleVariableOverride]

    def start(self, *arguments: object, **settings: str) -> ForkedRun:
        return super().start(
            *arguments, **{"HF_TOKEN": WRITER, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), **settings}
        )


ROOT = Path(__file__).parent.parent


@dataclass
class Here:
    """The same machine within this process: each command as quick as huggingface_hub is."""

    hub: UploadHub
    command: RunCommand
    patch: pytest.MonkeyPatch

    def push(self, *arguments: object, endpoint: str | None = None, token: str = WRITER) -> Outcome:
        point_at(self.hub, self.patch, token)
        if endpoint is not None:
            self.patch.setattr(constants, "ENDPOINT", endpoint)
        return self.command("push", *arguments)

    def told(self, *arguments: object, code: int = 2, **settings: str) -> str:
        """Push what must be refused; returns the one sentence."""
        outcome = self.push(*arguments, "-q", **settings)
        assert outcome.code == code, outcome.stdout + outcome.stderr
        assert outcome.stdout == ""
        assert outcome.stderr.startswith("Error: ")
        assert outcome.stderr.count("\n") == 1, outcome.stderr
        return outcome.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    import prune_cli

    out = tmp_path_factory.mktemp("finished") / "out"
    prune_cli.prune(llama, out, method="magnitude")
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    with serve(UploadHub(tmp_path / "hub"), UploadHandler) as hub:
        yield Publisher(tmp_path / "home", hub)


@pytest.fixture
def here(tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    with serve(UploadHub(tmp_path / "hub"), UploadHandler) as hub:
        yield Here(hub, command, monkeypatch)


def visible(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def as_sent(out: Path) -> dict[str, bytes]:
    return {**visible(out), **public_texts(out, read_finished(out).paths)}


def test_a_push_makes_the_repository_and_one_commit_and_can_be_loaded_again(
    publisher: Publisher, finished: Path, out: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out / ".cache").mkdir()
    (out / ".cache" / "secret").write_text("hidden files stay here")
    pushed = publisher.run("push", out, "me/tiny-half", "--private", "--json")
    assert pushed.code == 0, pushed.stderr
    assert pushed.json["url"] == f"{publisher.hub.endpoint}/me/tiny-half"
    assert pushed.json["commit"] == publisher.hub.commits[0]["oid"]
    assert len(publisher.hub.commits) == 1
    assert "pruned with magnitude, 50 % of the pruned tensors are zero" in publisher.hub.commits[0]["summary"]
    there, reports = publisher.hub.files("me/tiny-half"), {"prune_report.json", "prune_report.md", "prune_report.html"}
    assert there.keys() == visible(finished).keys()
    assert {name for name, content in visible(finished).items() if there[name] != content} == reports
    assert not [name for name, content in there.items() if str(finished.parent).encode() in content]
    assert json.loads(there["prune_report.json"])["request"]["out"] == "out"
    assert publisher.hub.private == {"me/tiny-half"}
    assert len(publisher.hub.stored) == SHARDS
    assert WRITER not in pushed.stdout + pushed.stderr

    point_at(publisher.hub, monkeypatch)
    inspected = command("inspect", "me/tiny-half", "--json")
    assert inspected.code == 0, inspected.stderr
    assert inspected.json["revision"] == pushed.json["commit"]

    again = command("push", out, "me/tiny-half")
    assert again.code == 0, again.stderr
    assert f"Pushed to {publisher.hub.endpoint}/me/tiny-half" in " ".join(again.stdout.split())
    assert len(publisher.hub.commits) == 1
    assert len(publisher.hub.stored) == SHARDS


def test_a_recovered_model_goes_too(
    here: Here, llama: Path, finished: Path, tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    out, texts = tmp_path / "won back", ("--calibration", tokens_file, "--eval", tokens_file)
    assert command("recover", finished, out, "--teacher", llama, *texts, "--epochs", 1, "-q").code == 0
    assert here.push(out, "me/tiny", "-q").code == 0
    summary = here.hub.commits[0]["summary"]
    assert "recovered block by block, " in summary
    assert "% of the loss's increase is gone" in summary
    there = here.hub.files("me/tiny")
    assert there.keys() == visible(out).keys()
    assert not [name for name, content in there.items() if str(tmp_path).encode() in content]
    assert json.loads(there["recover_report.json"])["teacher"]["given"] == llama.name
    shard = next(out.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is not what the report describes" in here.told(out, "me/tiny")


def test_a_dry_run_lists_the_files_and_needs_no_network_and_no_token(publisher: Publisher, out: Path) -> None:
    outcome = publisher.run("push", out, "me/tiny", "--dry-run", "--json", HF_TOKEN="", HF_HUB_OFFLINE="1")
    assert outcome.code == 0, outcome.stderr
    sizes = {name: len(content) for name, content in visible(out).items()}
    assert {file["path"]: file["bytes"] for file in outcome.json["files"] if "report" not in file["path"]} == {
        name: size for name, size in sizes.items() if "report" not in name
    }
    assert {file["path"] for file in outcome.json["files"]} == sizes.keys()
    assert outcome.json["dry_run"] is True
    assert outcome.json["commit"] is None
    assert publisher.hub.requests == []


def test_an_upload_cut_short_continues_with_what_is_missing(here: Here, out: Path) -> None:
    def fail(number: int) -> None:
        if number >= 2:
            raise ConnectionError("the link expired")

    here.hub.on_upload = fail
    message = here.told(out, "me/tiny", code=1)
    assert "was cut short" in message
    assert "run the same command again" in message
    assert here.hub.commits == []
    assert here.hub.files("me/tiny") == {}
    arrived = list(here.hub.stored)
    assert 0 < len(arrived) < SHARDS

    here.hub.on_upload = lambda number: None
    assert here.push(out, "me/tiny", "-q").code == 0
    assert len(here.hub.stored) == len(set(here.hub.stored)) == SHARDS
    assert here.hub.stored[: len(arrived)] == arrived
    assert here.hub.files("me/tiny") == as_sent(out)


def test_an_interrupt_leaves_the_repository_as_it_was(publisher: Publisher, out: Path) -> None:
    sending, go_on = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        sending.set()
        go_on.wait(20)

    publisher.hub.on_upload = hold
    process = publisher.start("push", out, "me/tiny")
    assert sending.wait(30)
    process.send_signal(signal.SIGINT)
    go_on.set()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    assert publisher.hub.files("me/tiny") == {}


def test_tokens(here: Here, out: Path) -> None:
    assert "There is no token" in here.told(out, "me/tiny", token="")
    refused = here.told(out, "me/tiny", token="hf_of_yesterday")
    assert "refuses the token: make one that may write" in refused
    assert "hf_of_yesterday" not in refused
    assert "This token may not write to me/tiny" in here.told(out, "me/tiny", token=READER)
    assert "This token may not write to others/tiny" in here.told(out, "others/tiny")
    assert here.hub.commits == []


def test_a_branch_and_a_pull_request(here: Here, out: Path) -> None:
    assert "no model me/tiny" in here.told(out, "me/tiny", "--create-pr")
    branch = here.push(out, "me/tiny", "--revision", "v2", "--message", "second try", "--json")
    assert branch.code == 0, branch.stderr
    assert branch.json["url"].endswith("/me/tiny/tree/v2")
    assert here.hub.commits[-1]["summary"] == "second try"
    assert here.hub.files("me/tiny", "v2") == as_sent(out)
    assert here.hub.files("me/tiny") == {}

    others = here.hub.branch("others/theirs", "main")
    others.mkdir(parents=True)
    proposed = here.push(out, "others/theirs", "--create-pr", "--json")
    assert proposed.code == 0, proposed.stderr
    assert proposed.json["pull_request"].endswith("/others/theirs/discussions/1")
    assert here.hub.files("others/theirs") == {}
    assert here.hub.files("others/theirs", "refs/pr/1") == as_sent(out)


def test_weights_of_an_earlier_upload_go(here: Here, out: Path) -> None:
    there = here.hub.branch("me/tiny", "main")
    there.mkdir(parents=True)
    for name in ("model.safetensors", "notes.txt"):
        (there / name).write_text("older")
    pushed = here.push(out, "me/tiny", "--json")
    assert pushed.code == 0, pushed.stderr
    assert pushed.json["removed"] == ["model.safetensors"]
    assert here.hub.files("me/tiny").keys() == {*visible(out), "notes.txt"}


def test_metadata_that_the_hub_refuses_is_told_before_anything_is_sent(here: Here, out: Path) -> None:
    (out / "README.md").write_text("---\nbase_model_relation: pruned\n---\n# mine\n")
    message = here.told(out, "me/tiny")
    assert "The hub refuses the metadata of README.md" in message
    assert "adapter, finetune, merge, quantized" in message
    assert here.hub.stored == []


def test_a_hub_that_cannot_be_reached(here: Here, out: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        message = here.told(out, "me/tiny", code=1, endpoint=nowhere)
    assert f"Sending to {nowhere} was cut short" in message


def refused(command: RunCommand, *arguments: object) -> str:
    outcome = command("push", *arguments, "--dry-run", "-q")
    assert outcome.code == 2
    assert outcome.stderr.startswith("Error: ")
    assert outcome.stderr.count("\n") == 1
    return outcome.stderr


def test_what_is_not_finished_or_not_what_the_report_says_is_refused(out: Path, command: RunCommand) -> None:
    shards = sorted(out.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{shards[1]} is not what the report describes" in refused(command, out, "me/tiny")
    shards[1].unlink()
    assert f"{shards[1]} is missing though the report names it" in refused(command, out, "me/tiny")
    shards[1].write_bytes(whole)

    (out / "extra.safetensors").write_bytes(whole)
    assert "extra.safetensors holds weights that the report does not know" in refused(command, out, "me/tiny")
    (out / "extra.safetensors").unlink()
    (out / JOURNAL).write_text("{}")
    assert "is an interrupted run: repeat its command with --resume" in refused(command, out, "me/tiny")
    (out / JOURNAL).unlink()
    assert command("push", out, "me/tiny", "--dry-run", "-q").code == 0

    (out / "config.json").unlink()
    assert "config.json is missing" in refused(command, out, "me/tiny")
    (out / "prune_report.json").unlink()
    assert "has no prune_report.json" in refused(command, out, "me/tiny")
    out.rename(partial_folder(out))
    assert f"{out} is not finished: {partial_folder(out)}" in refused(command, out, "me/tiny")


def test_sparse_files_go_where_they_stand_for_what_was_reported(out: Path, tmp_path: Path, command: RunCommand) -> None:
    sparse = tmp_path / "sparse"
    assert command("convert", out, sparse, "-q").code == 0
    assert command("push", sparse, "me/tiny", "--dry-run", "-q").code == 0
    shard = sorted(sparse.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    outcome = command("push", sparse, "me/tiny", "--dry-run", "-q")
    assert outcome.code != 0
    assert outcome.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a/b/c"], "is no name of a repository"),
        (["me/tiny", "--message", " "], "--message is empty"),
        (["me/tiny", "--create-pr", "--revision", "v2"], "exclude each other"),
    ],
)
def test_wrong_requests(arguments: list[str], says: str, finished: Path, command: RunCommand) -> None:
    assert says in refused(command, finished, *arguments)


def test_the_table_of_a_dry_run(finished: Path, command: RunCommand) -> None:
    outcome = command("push", finished, "me/tiny", "--dry-run")
    assert outcome.code == 0
    assert "model.safetensors.index.json" in outcome.stdout
    assert "Nothing was sent" in outcome.stdout
    report = json.loads((finished / "prune_report.json").read_text())
    assert report["output"]["files"].keys() <= set(outcome.stdout.split())
