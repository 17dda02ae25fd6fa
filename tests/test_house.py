"""The rules of the house: imports point one way, files stay small, --help is quick to answer."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each bracket may import only what stands before it; neighbours in a bracket never import each other.
_ORDER = [
    {"errors", "time_left", "version", "methods", "calibration"},
    {"progress"},
    {"ranks"},
    {"checkpoint", "request"},
    {"report"},
    {"sparse", "packed", "recipes"},
    {"model", "preflight"},
    {"engine", "loading", "soup"},
    {"recovery"},
    {"unstructured", "structured", "evaluation", "bench", "hub"},
    {"run", "sweeps", "checks"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
_FLOOR = {room: floor for floor, rooms in enumerate(_ORDER) for room in rooms}
# Only these rooms may name transformers; everything else meets it through them.
_MAY_IMPORT_TRANSFORMERS = {"prune_cli/model", "prune_cli/loading", "prune_cli/bench/whole_model.py"}


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text())))


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, at any depth of the file."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_beyond(folder: str, *allowed: str) -> dict[str, set[str]]:
    """By file, the packages that it imports beside the standard library and those `allowed`."""
    found = {path.name: imported(path) - {*sys.stdlib_module_names, *allowed} for path in sources(folder)}
    assert len(found) > 5
    return {name: packages for name, packages in found.items() if packages}


def test_methods_are_pure_tensor_maths() -> None:
    assert imported_beyond("methods", "torch", "methods") == {}


def test_calibration_knows_no_method_and_no_command_line() -> None:
    assert imported_beyond("calibration", "torch", "numpy", "safetensors", "datasets", "calibration") == {}


@cache
def room(path: Path) -> str:
    """`errors` of prune_cli/errors.py, `engine` of everything below prune_cli/engine/, `methods` of methods/."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "prune_cli" else parts[0]


@cache
def arrows(path: Path) -> set[Path]:
    """The files of this project that a file imports, at any depth of the file."""
    targets: set[Path] = set()
    for node in nodes(path):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: {ast.unparse(node)}: name the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            while parts and parts[0] in ("prune_cli", "methods", "calibration"):
                file = ROOT.joinpath(*parts)
                found = next((f for f in (file.with_suffix(".py"), file / "__init__.py") if f.exists()), None)
                if found:
                    targets.add(found)
                    break
                parts.pop()
    return targets - {path}


def test_imports_point_one_way() -> None:
    uphill = [
        f"{path.relative_to(ROOT)} -> {target.relative_to(ROOT)}"
        for path in sources("prune_cli")
        for target in arrows(path)
        if room(path) != room(target) and _FLOOR[room(target)] >= _FLOOR[room(path)]
    ]
    assert uphill == []


def test_no_circle_of_imports() -> None:
    graph = {path: arrows(path) for folder in ("prune_cli", "methods", "calibration") for path in sources(folder)}
    graph = {path: targets for path, targets in graph.items() if path.name != "__init__.py"}
    circle: list[str] = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = [str(path.relative_to(ROOT)) for path in error.args[1]]
    assert circle == []


def test_only_the_ground_lies_loose() -> None:
    loose = {path.stem for path in (ROOT / "prune_cli").glob("*.py")}
    assert loose == {"__init__", "__main__", "cli", "run", "version", "errors", "progress", "time_left"}


def test_transformers_stays_at_the_border() -> None:
    places = [p.relative_to(ROOT).as_posix() for p in sources("prune_cli") if "transformers" in imported(p)]
    assert places
    assert [place for place in places if not place.startswith(tuple(_MAY_IMPORT_TRANSFORMERS))] == []


@pytest.mark.parametrize("folder", ["prune_cli", "methods", "calibration"])
def test_files_are_one_idea(folder: str) -> None:
    too_long = {path.name: len(path.read_text().splitlines()) for path in sources(folder)}
    assert {name: lines for name, lines in too_long.items() if lines > 350} == {}


def test_help_imports_no_torch() -> None:
    asked = ["--help", "--version", "prune --help", "methods --help", "methods", "push --help", "report --help"]
    code = (
        "import sys; from prune_cli.cli import app\n"
        f"for line in {asked!r}:\n"
        "    try: app(line.split())\n"
        "    except SystemExit as end: assert not end.code, (line, end.code)\n"
        "    else: assert False, line\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def functions(folder: str) -> list[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return [
        (path, node)
        for path in sources(folder)
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [each.arg for each in named if each.arg not in ("self", "cls")]


def test_functions_take_six_parameters_at_most() -> None:
    """Commands, and the functions of the Python API, have one for every option that a user can give."""
    too_many = {
        f"{path.relative_to(ROOT)}: {function.name}": parameters(function)
        for path, function in functions("prune_cli")
        if "commands" not in path.parts and room(path) != "__init__" and len(parameters(function)) > 6
    }
    assert too_many == {}


@pytest.mark.parametrize("folder", ["prune_cli", "methods", "calibration"])
def test_functions_fit_a_screen(folder: str) -> None:
    lengths = sorted((node.end_lineno or node.lineno) - node.lineno + 1 for _, node in functions(folder))
    assert lengths[len(lengths) * 9 // 10] < 25


def test_every_structured_method_has_its_removal() -> None:
    from methods.structured import structured_names
    from prune_cli.structured.method import REMOVALS

    assert sorted(REMOVALS) == list(structured_names())
