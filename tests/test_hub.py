"""Models of the hub, fetched with huggingface_hub from a server of our own; every command is a process of its own."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prune_cli.checkpoint.file_names import partial_folder
from tests.conftest import RunCommand, folder_bytes
from tests.hub_server import COMMIT, Hub, Machine, serve
from tests.tiny import save_tiny

_NOT_FETCHED = ("pytorch_model.bin", "model.gguf", "tf_model.h5", "consolidated.00.pth")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("published") / "model", "llama-tied")
    for name in _NOT_FETCHED:
        (folder / name).write_bytes(b"never fetched")
    (folder / "README.md").write_text("# a card\n")
    return folder


@pytest.fixture
def machine(published: Path, tmp_path: Path) -> Iterator[Machine]:
    with serve(Hub(published)) as hub:
        yield Machine(tmp_path / "home", hub)


def test_a_model_is_fetched_once_and_pruned_like_a_local_one(
    machine: Machine, published: Path, tmp_path: Path, command: RunCommand
) -> None:
    first = machine.run("prune", "some-org/tiny", "out", "-m", "magnitude", "--json")
    assert first.code == 0, first.stderr
    assert first.json["model"]["given"] == "some-org/tiny"
    assert first.json["model"]["revision"] == COMMIT
    assert machine.hub.fetched >= {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert machine.hub.fetched >= {path.name for path in published.glob("*.safetensors")}
    assert not machine.hub.fetched & set(_NOT_FETCHED)
    snapshot = next((machine.home / "hub" / "models--some-org--tiny" / "snapshots").iterdir())
    assert snapshot.name == COMMIT
    assert all(path.is_symlink() for path in snapshot.iterdir())

    out = tmp_path / "out"
    assert not any(path.is_symlink() for path in out.rglob("*"))
    local = shutil.copytree(published, tmp_path / "local", ignore=shutil.ignore_patterns(*_NOT_FETCHED))
    assert command("prune", local, tmp_path / "same", "-m", "magnitude", "-q").code == 0
    assert folder_bytes(out) == folder_bytes(tmp_path / "same")

    machine.hub.requests.clear()
    offline = machine.run("prune", "some-org/tiny", "again", "-m", "magnitude", "--json", HF_HUB_OFFLINE="1")
    assert offline.code == 0, offline.stderr
    assert offline.json["model"]["revision"] == COMMIT
    assert machine.hub.requests == []
    assert folder_bytes(tmp_path / "again") == folder_bytes(out)


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_pinned(revision: str, machine: Machine) -> None:
    inspected = machine.run("inspect", "some-org/tiny", "--revision", revision, "--json")
    assert inspected.code == 0, inspected.stderr
    assert inspected.json["revision"] == COMMIT
    assert any(f"/{revision}" in path for _, path, _ in machine.hub.requests)


def test_the_token_of_the_environment_opens_a_gated_model(machine: Machine) -> None:
    message = machine.refused("some-org/secret")
    assert "some-org/secret is gated: accept its conditions" in message
    assert "HF_TOKEN" in message
    opened = machine.run("inspect", "some-org/secret", "--json", HF_TOKEN=machine.hub.token)
    assert opened.code == 0, opened.stderr
    assert f"Bearer {machine.hub.token}" in machine.hub.authorizations
    assert machine.hub.token not in opened.stdout + opened.stderr


def test_a_model_that_the_hub_does_not_have(machine: Machine, tmp_path: Path) -> None:
    outcome = machine.run("prune", "some-org/missing", "out", "-m", "magnitude", "-q")
    assert outcome.code == 2
    assert "some-org/missing is neither a folder here nor a model that this token can see" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not partial_folder(tmp_path / "out").exists()


def test_an_unknown_revision(machine: Machine) -> None:
    assert "some-org/tiny has no revision 'v2'" in machine.refused("some-org/tiny", "--revision", "v2")


def test_offline_without_a_copy(machine: Machine) -> None:
    message = machine.refused("some-org/tiny", HF_HUB_OFFLINE="1")
    assert "not in the hub's cache, and offline mode is on" in message
    assert machine.hub.requests == []


def test_a_hub_that_cannot_be_reached_is_told_quickly(machine: Machine) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        begun = time.monotonic()
        message = machine.refused("some-org/tiny", HF_ENDPOINT=nowhere)
    assert f"{nowhere} cannot be reached" in message
    assert time.monotonic() - begun < 20


def test_a_hub_that_fails(machine: Machine) -> None:
    machine.hub.fails = True
    message = machine.refused("some-org/tiny")
    assert f"{machine.hub.endpoint} cannot be reached" in message


def test_a_model_without_safetensors(machine: Machine, tmp_path: Path) -> None:
    machine.hub.folder = tmp_path / "pickled"
    machine.hub.folder.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (machine.hub.folder / name).write_text("{}")
    message = machine.refused("some-org/tiny")
    assert "some-org/tiny has neither model.safetensors nor model.safetensors.index.json on the hub" in message
    assert "pytorch_model.bin" not in machine.hub.fetched
