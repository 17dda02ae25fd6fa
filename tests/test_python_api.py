"""The functions of `prune_cli`: the options and defaults of the commands, their reports, and no torch before a call."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich import console

import prune_cli
from prune_cli.checks.own_packages import check_own_packages
from prune_cli.commands.convert import convert as convert_command
from prune_cli.commands.evaluate import evaluate as evaluate_command
from prune_cli.commands.inspect import inspect as inspect_command
from prune_cli.commands.prune import prune as prune_command
from prune_cli.commands.recover import recover as recover_command
from prune_cli.commands.sweep import sweep as sweep_command
from prune_cli.commands.verify import verify as verify_command
from prune_cli.evaluation.requests import EvaluationRequest
from prune_cli.progress import Bar, Lines, Silent, progress_from_python
from prune_cli.recovery.request import RecoverRequest
from prune_cli.request.presets import PRESETS
from prune_cli.request.request import PruneRequest
from prune_cli.sparse.convert import ConvertRequest
from prune_cli.sweeps.request import SweepRequest
from tests.conftest import RunCommand

ROOT = Path(__file__).parent.parent
REQUESTS = [
    (prune_cli.prune, prune_command, PruneRequest),
    (prune_cli.recover, recover_command, RecoverRequest),
    (prune_cli.evaluate, evaluate_command, EvaluationRequest),
    (prune_cli.sweep, sweep_command, SweepRequest),
    (prune_cli.convert, convert_command, ConvertRequest),
]
_OF_PRESETS = {name for preset in PRESETS.values() for name in preset}
# What Python takes beside the request's own type.
_PATHS = {"model", "out", "data", "against", "calibration", "eval", "statistics", "save_statistics", "teacher"}
_PATHS |= {"compare_calibration", "store"}
_WIDER = {
    "tuple[str, ...]": "str | Sequence[str]",
    "Mapping[str, Any]": "Mapping[str, Any] | None",
    "Mapping[str, str]": "Mapping[str, str] | None",
}
_LISTS = {
    "method": "str | Sequence[str]",
    "sparsity": "str | float | Sequence[float]",
    "pattern": "str | Sequence[str] | None",
}


def _expected(field: dataclasses.Field[Any], request: type) -> tuple[str, Any]:
    """The type as written and the default that the function of `request` must have for a field of it."""
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    kind = str(field.type)
    if field.default_factory is not dataclasses.MISSING:
        default = None
    if field.name in _PATHS:
        kind = kind.replace("str", "str | Path") if "str" in kind else kind.replace("Path", "str | Path")
    if request is SweepRequest:
        kind = _LISTS.get(field.name, kind)
    if request is PruneRequest and field.name in _OF_PRESETS:
        return kind.removesuffix(" | None") + " | None", None
    return _WIDER.get(kind, kind), default


@pytest.mark.parametrize(("function", "_", "request_type"), REQUESTS, ids=lambda value: getattr(value, "__name__", ""))
def test_functions_take_the_fields_of_their_requests(
    function: Callable[..., Any], _: Callable[..., None], request_type: type
) -> None:
    explicit = {name: (each.annotation, each.default) for name, each in inspect.signature(function).parameters.items()}
    assert explicit.pop("progress") == ("bool | None", None)
    # A config is read by the command line alone.
    fields = [field for field in dataclasses.fields(request_type) if field.name != "config"]
    assert explicit == {field.name: _expected(field, request_type) for field in fields}


@pytest.mark.parametrize(("_", "command", "request_type"), REQUESTS, ids=lambda value: getattr(value, "__name__", ""))
def test_commands_have_the_defaults_of_their_requests(
    _: Callable[..., Any], command: Callable[..., None], request_type: type
) -> None:
    named = {"into": "format", "evaluation": "eval", "option": "options"}
    told = {named.get(name, name): each.default for name, each in inspect.signature(command).parameters.items()}
    fields = {field.name: field.default for field in dataclasses.fields(request_type)}
    # The hashes of a recipe's inputs are typed by nobody.
    assert fields.keys() - {"inputs"} <= told.keys()
    # None on the command line is what was not said, for the request to fill.
    explicit = {name: default for name, default in told.items() if name in fields and default is not None}
    without = inspect.Parameter.empty
    assert explicit == {name: without if fields[name] is dataclasses.MISSING else fields[name] for name in explicit}


@pytest.mark.parametrize(
    ("function", "command"), [(prune_cli.inspect, inspect_command), (prune_cli.verify, verify_command)]
)
def test_functions_without_a_request_take_what_the_command_takes(
    function: Callable[..., Any], command: Callable[..., None]
) -> None:
    of_a_shell = {"as_json", "as_csv", "full", "quiet", "verbose"}
    told = {name: each.default for name, each in inspect.signature(command).parameters.items()}
    explicit = {name: each.default for name, each in inspect.signature(function).parameters.items()}
    assert explicit == {name: default for name, default in told.items() if name not in of_a_shell}


def test_only_the_model_and_folders_go_by_place() -> None:
    for function, _, request in REQUESTS:
        needed = {field.name for field in dataclasses.fields(request) if field.default is field.default_factory}
        by_place = {
            name for name, each in inspect.signature(function).parameters.items() if each.kind is not each.KEYWORD_ONLY
        }
        assert by_place == needed


def test_functions_give_what_the_commands_give(
    llama: Path, tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    out = tmp_path / "out"
    report = prune_cli.prune(
        llama, out, preset="fast", pattern="2:4", calibration=tokens_file, exclude="*.down_proj.*", seed=3
    )
    assert (report.method.name, report.request.exclude, report.request.seed) == ("wanda", ("*.down_proj.*",), 3)
    assert report.totals.sparsity_of_pruned == 0.5

    assert prune_cli.inspect(out).to_json() == command("inspect", out, "--json").stdout
    assert prune_cli.verify(out, against=llama).problems == ()
    result = prune_cli.evaluate(out, tokens_file, against=llama)
    told = command("eval", out, "--data", tokens_file, "--against", llama, "--json").json
    assert told["evaluation"] == dataclasses.asdict(result.evaluation)
    done = prune_cli.convert(out, tmp_path / "sparse")
    assert done.bytes_after < done.bytes_before

    # Calls repeat: no module of ours takes a function's name.
    for folder in ("once", "twice"):
        swept = prune_cli.sweep(
            llama,
            tmp_path / folder,
            tokens_file,
            method=["wanda", "magnitude"],
            sparsity=[0.25, 0.5],
            sensitivity=0,
            calibration=tokens_file,
        )
        assert [(point.method, point.sparsity) for point in swept.points] == [
            (method, sparsity) for method in ("wanda", "magnitude") for sparsity in (0.25, 0.5)
        ]


def test_a_wrong_request_is_told_as_on_the_command_line(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(prune_cli.RequestError, match="--preset is 'bets'"):
        prune_cli.prune(llama, tmp_path / "out", preset="bets")
    with pytest.raises(TypeError, match="sparsty"):
        prune_cli.prune(llama, tmp_path / "out", sparsty=0.5)  # pyright: ignore[reportCallIssue]


def _imported(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """What Python says that starts in `folder`, which comes first on its path, and finds this checkout after it."""
    environment = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_face_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, prune_cli\n"
        "for name in prune_cli.__all__: getattr(prune_cli, name)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'methods', 'calibration'} & set(sys.modules)))"
    )
    assert _imported(tmp_path, code).stdout == "[]\n"


@pytest.mark.parametrize("foreign", ["methods/__init__.py", "calibration/__init__.py", "methods.py"])
def test_another_package_of_our_names_is_told_apart(tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("raise SystemExit('imported')\n")
    done = _imported(tmp_path, "import prune_cli")
    told = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert told.startswith("ImportError: prune-cli brings a package ")
    assert f"{tmp_path / foreign.removesuffix('/__init__.py')}: rename that one" in told


def test_a_folder_without_init_does_no_harm_after_ours(tmp_path: Path) -> None:
    """Python takes a regular package before a bare folder, wherever on the path."""
    (tmp_path / "methods").mkdir()
    assert _imported(tmp_path, "import prune_cli, methods; methods.method_names()").returncode == 0


def test_a_folder_without_init_that_hides_ours_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an editable install, whose finder comes after the path."""
    (tmp_path / "methods").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "methods")
    assert importlib.util.find_spec("methods") is not None
    with pytest.raises(ImportError, match="rename that one") as failure:
        check_own_packages()
    assert failure.value.path == str(tmp_path / "methods")


@pytest.mark.parametrize(
    ("notebook", "widgets", "asked", "kind"),
    [
        (False, True, None, Silent),
        (False, True, True, Lines),
        (True, True, None, Bar),
        (True, False, None, Lines),
        (True, True, False, Silent),
    ],
)
def test_a_notebook_shows_a_bar_and_a_script_only_what_it_asks_for(
    notebook: bool, widgets: bool, asked: bool | None, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_is_jupyter", lambda: notebook)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if widgets else None)
    assert type(progress_from_python(asked)) is kind


def test_a_call_prints_what_it_was_asked_to(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prune_cli.prune(llama, tmp_path / "a", method="magnitude")
    assert capfd.readouterr() == ("", "")
    prune_cli.prune(llama, tmp_path / "b", method="magnitude", progress=True)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["Copying 5 file(s)", "Pruning with magnitude"]
