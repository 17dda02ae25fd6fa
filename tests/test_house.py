"""The rules of the house: imports point one way, files stay small, --help is quick to answer."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Only these may name transformers; everything else meets it through them.
_MAY_IMPORT_TRANSFORMERS = {
    "architecture.py",
    "model.py",
    "places.py",
    "roles.py",
    "whole_model.py",
    "quantizer.py",
    "converter.py",
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, at any depth of the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("methods"), ids=lambda path: path.name)
def test_methods_are_pure_tensor_maths(path: Path) -> None:
    assert imported(path) <= {*sys.stdlib_module_names, "torch", "methods"}


@pytest.mark.parametrize("path", sources("calibration"), ids=lambda path: path.name)
def test_calibration_knows_no_method_and_no_command_line(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "safetensors", "datasets", "calibration"}
    assert imported(path) <= allowed


@pytest.mark.parametrize("path", sources("prune_cli"), ids=lambda path: path.name)
def test_transformers_stays_at_the_border(path: Path) -> None:
    assert "transformers" not in imported(path) or path.name in _MAY_IMPORT_TRANSFORMERS


@pytest.mark.parametrize("folder", ["prune_cli", "methods", "calibration"])
def test_files_are_one_idea(folder: str) -> None:
    too_long = {path.name: len(path.read_text().splitlines()) for path in sources(folder)}
    assert {name: lines for name, lines in too_long.items() if lines > 350} == {}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["prune", "--help"], ["methods", "--help"], ["push", "--help"], ["report", "--help"]],
)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from prune_cli.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
