"""Reports read back from disk, and the schema that is derived from the request."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from prune_cli.errors import RequestError
from prune_cli.report.read import read_report
from prune_cli.report.schema import report_schema
from prune_cli.request.request import PruneRequest
from prune_cli.request.schema import request_schema
from tests.conftest import RunCommand


@pytest.fixture
def out(llama: Path, tmp_path: Path, command: RunCommand) -> Path:
    folder = tmp_path / "out"
    assert command("prune", llama, folder, "-m", "magnitude", "-q").code == 0
    return folder


def changed(out: Path, change: dict[str, Any]) -> Path:
    document = json.loads((out / "prune_report.json").read_text()) | change
    (out / "prune_report.json").write_text(json.dumps(document))
    return out


def test_a_report_is_read_from_its_folder_or_itself(out: Path) -> None:
    file = out / "prune_report.json"
    assert read_report(out) == read_report(str(file))
    assert read_report(out).report.to_json() == file.read_text()
    assert read_report(out).path == file


def test_what_is_no_report_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere is not there: give a prune_report\.json"):
        read_report(tmp_path / "nowhere")
    with pytest.raises(RequestError, match=r"has no prune_report\.json: give a folder that prune-cli prune wrote"):
        read_report(tmp_path)
    with pytest.raises(RequestError, match=r"config\.json is no report of prune-cli"):
        read_report(out / "config.json")
    (tmp_path / "README").write_text("# no")
    with pytest.raises(RequestError, match=r"README is no JSON \("):
        read_report(tmp_path / "README")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema_version": 99}, "has schema_version 99, but this prune-cli reads 1"),
        ({"seconds": "long"}, "is no valid report: seconds: 'long' is not of type 'number'"),
        ({"seconds": float("nan")}, r"is no JSON \(it holds NaN\)"),
        ({"surprise": 1}, "'surprise' was unexpected"),
        ({"tensors": []}, "tensors: "),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], told: str, out: Path) -> None:
    with pytest.raises(RequestError, match=told):
        read_report(changed(out, change))


def test_every_field_of_a_request_stands_in_the_schema_with_its_type() -> None:
    schema = request_schema()
    assert list(schema["properties"]) == [item.name for item in dataclasses.fields(PruneRequest)]
    assert report_schema()["properties"]["request"] == schema
    assert schema["required"] == ["model", "out"]
    assert schema["properties"]["sparsity"] == {"type": ["number", "null"], "minimum": 0, "exclusiveMaximum": 1}
    assert schema["properties"]["dtype"] == {"enum": ["auto", "float32", "bfloat16", "float16"]}
    assert schema["properties"]["include"] == {"type": "array", "items": {"type": "string"}}
    jsonschema.Draft202012Validator.check_schema(report_schema())
    for wrong in ({"sparsity": 1}, {"samples": 0}, {"include": ["a", 1]}, {"batch_size": "some"}, {"reconstruct": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"model": "m", "out": "o", **wrong}, schema)
    jsonschema.validate({"model": "m", "out": "o", "batch_size": 4, "options": {"a": 1}, "eval": None}, schema)


def test_reading_a_report_imports_no_torch(out: Path) -> None:
    code = f"import sys; from prune_cli.report.read import read_report; read_report({str(out)!r}); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers"} & set(modules)
