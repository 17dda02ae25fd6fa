"""The command in a report asks for the same run again."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from prune_cli.cli import app
from prune_cli.preflight import requests
from prune_cli.request.command_line import command_of
from prune_cli.request.presets import PRESETS, with_preset
from prune_cli.request.request import PruneRequest
from tests.conftest import RunCommand, folder_bytes

# Words that shells, option parsers and globs would take apart.
_WORDS = st.sampled_from(
    ["a", "-x", "--json", "a b", "it's", "$HOME", "*.q_proj.*", "é", "a=b", "#", "`id`", "\\", "\n"]
)


def parsed(command: str) -> PruneRequest:
    """What the real command line makes of `command`."""
    words = shlex.split(command)
    assert words[:2] == ["prune-cli", "prune"]
    seen: list[PruneRequest] = []

    def note(request: PruneRequest, *, writes: bool) -> None:
        seen.append(request)
        raise typer.Exit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "check_prune", note)
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert len(seen) == 1, result.output
    return seen[0]


_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model": _WORDS,
    "out": _WORDS.map(Path),
    "preset": st.sampled_from([None, *PRESETS]),
    "method": st.sampled_from(["wanda", "admm"]),
    "sparsity": st.none() | st.floats(0, 1, exclude_max=True),
    "refine": st.none(),
    "reconstruct": st.booleans(),
    "match_blocks": st.booleans(),
    "allocate": st.sampled_from(["uniform", "erk"]),
    "options": st.just({}),
    "calibration": st.none() | _WORDS,
    "samples": st.none() | st.integers(1, 999),
    "seq_len": st.none() | st.integers(2, 999),
    "seed": st.integers(0, 2**63 - 1),
    "device": st.sampled_from(["auto", "cpu", "cuda:1"]),
    "dtype": st.sampled_from(["auto", "bfloat16"]),
    "batch_size": st.just("auto") | st.integers(1, 99),
    "limit_memory": st.sampled_from([None, "20GB", "900 MiB"]),
    "include": st.lists(_WORDS, max_size=3).map(tuple),
    "exclude": st.lists(_WORDS, max_size=3).map(tuple),
    "calibrate_by": st.just("sublayer"),
    "target": st.sampled_from(["pruned", "dense"]),
    "self_calibration": st.just("auto") | st.integers(0, 64),
    "eval": st.none() | _WORDS,
    "generate": st.none() | st.integers(1, 99),
    "eval_windows": st.sampled_from([None, 3, "all"]),
    "format": st.sampled_from(["dense", "sparse"]),
    "resume": st.booleans(),
    "overwrite": st.booleans(),
    "allow_unsupported": st.booleans(),
    "trust_remote_code": st.booleans(),
    "allow_changed_inputs": st.booleans(),
    "revision": st.none() | _WORDS,
}


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_the_command_of_a_request_parses_back_to_it(data: st.DataObject) -> None:
    values = {name: data.draw(strategy, label=name) for name, strategy in _VALUES.items()}
    if values["method"] == "wanda":
        values["target"] = "pruned" if not values["reconstruct"] else values["target"]
    if values["eval"] is None:
        values["eval_windows"] = None
    if values["allocate"] == "erk" and values["sparsity"] == 0:
        values["sparsity"] = 0.5
    request = PruneRequest(**with_preset({key: value for key, value in values.items() if value is not None}))
    assert parsed(command_of(request)) == request


SPECIAL = [
    PruneRequest("m", Path("o"), pattern="2:4", refine="swaps", options={"swaps.rounds": "8"}),
    PruneRequest("m", Path("o"), method="sparsegpt", options={"damping": "0.02"}, calibrate_by="block"),
    PruneRequest("m", Path("o"), method="wanda", preset="best", target="pruned"),
    PruneRequest("m", Path("o"), method="depth", statistics="a b.safetensors", save_statistics="-c"),
    PruneRequest("m", Path("o"), format="sparse", self_contained=True),
    PruneRequest("m", Path("o"), method="depth", drop_extra_heads=True),
    PruneRequest("m", Path("o"), text_only=True),
    PruneRequest("m", Path("o"), method="experts", compare_calibration="images"),
    PruneRequest("m", Path("o"), packed="bf16"),
]


@pytest.mark.parametrize(
    "request_",
    SPECIAL,
    ids=["swaps", "sparsegpt", "preset", "depth", "self-contained", "heads", "text-only", "compared", "packed"],
)
def test_options_and_what_overrides_a_preset_come_back(request_: PruneRequest) -> None:
    assert parsed(command_of(request_)) == request_


def test_no_field_of_the_request_is_forgotten() -> None:
    fields = {item.name for item in dataclasses.fields(PruneRequest)}
    covered = set(_VALUES) | {item.name for item in fields_set_in(SPECIAL)}
    # The hashes of a recipe's inputs have no option; what a config said stands in other fields.
    assert fields - covered == {"inputs", "config"}


def fields_set_in(requests: list[PruneRequest]) -> set[dataclasses.Field[Any]]:
    return {
        item
        for request in requests
        for item in dataclasses.fields(request)
        if item.default is not dataclasses.MISSING and getattr(request, item.name) != item.default
    }


def test_values_of_the_python_interface_become_words() -> None:
    command = command_of({"model": "m", "out": "o", "options": {"released": True, "a": None, "spread": 0.1}})
    assert command == "prune-cli prune m o -o released=true -o a=none -o spread=0.1"


def test_the_command_of_a_report_gives_the_same_bytes(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    first = tmp_path / "first"
    assert command("prune", llama, first, "-m", "magnitude", "-s", 0.3, "--exclude", "*.q_proj.*", "-q").code == 0
    report = json.loads((first / "prune_report.json").read_text())
    words = shlex.split(command_of({**report["request"], "out": str(tmp_path / "second")}))
    assert command(*words[1:], "-q").code == 0
    assert folder_bytes(tmp_path / "second") == folder_bytes(first)
