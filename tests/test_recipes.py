"""Recipes: read with places, written back to the same request, and repeated to the same bytes."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.commands.merge_options import _FIELDS, merged
from prune_cli.commands.prune import prune
from prune_cli.errors import RequestError
from prune_cli.recipes.reading import read_recipe
from prune_cli.recipes.writing import recipe_text
from prune_cli.request.request import PruneRequest
from prune_cli.request.schema import request_schema
from tests.conftest import RunCommand, folder_bytes
from tests.forked import ForkedRun

_WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "2:4",
        "0o17",
        "1e-3",
        "1_000",
        "yes",
        "null",
        "~",
        "",
        "0123",
        ".inf",
        "2026-01-01",
        "=",
        "<<",
        "- a",
        "# b",
        "é: 'x'",
    ]
)
_VALUES = _WORDS | st.booleans() | st.integers() | st.floats(allow_nan=False)


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Anything of the type that the request's schema asks for, whatever its limits."""
    if "anyOf" in schema:
        return st.one_of([values_of(option) for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    by_type = {
        "string": _WORDS,
        "integer": st.integers(),
        "number": st.floats(allow_nan=False),
        "boolean": st.booleans(),
        "null": st.none(),
        "array": st.lists(_WORDS, max_size=3).map(tuple),
        "object": st.dictionaries(
            _WORDS,
            values_of(schema["additionalProperties"]) if "additionalProperties" in schema else _VALUES,
            max_size=3,
        ),
    }
    return st.one_of([by_type[name] for name in types])


def request_of(values: dict[str, Any]) -> PruneRequest:
    return PruneRequest(**{**values, "out": Path(values["out"])})


requests = st.fixed_dictionaries(
    {name: values_of(schema) for name, schema in request_schema()["properties"].items()}
).map(request_of)


@settings(max_examples=40, deadline=None)
@given(requests, st.sets(st.sampled_from([item.name for item in dataclasses.fields(PruneRequest)])))
def test_a_request_comes_back_from_its_recipe(
    tmp_path_factory: pytest.TempPathFactory, request_made: PruneRequest, explicit: set[str]
) -> None:
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_text(recipe_text(request_made, explicit), encoding="utf-8")
    read = read_recipe(file).values
    assert request_of({"model": request_made.model, "out": request_made.out, **read}) == request_made
    assert all(name in read for name in explicit if getattr(request_made, name) is not None)


def test_every_parameter_of_prune_is_a_field_or_about_this_call() -> None:
    parameters = {_FIELDS.get(name, name) for name in inspect.signature(prune).parameters}
    fields = {item.name for item in dataclasses.fields(PruneRequest)}
    about_the_call = {"context", "recipe", "save_recipe", "dry_run", "keep_list_only", "log_file"}
    about_the_call |= {"as_json", "quiet", "verbose", "devices", "rank_timeout"}
    # The hashes of inputs come from reports and recipes, nobody types them.
    assert parameters - about_the_call == fields - {"inputs"}


WRONG = [
    ("sparsty: 0.5", "line 1, column 1: there is no option 'sparsty': did you mean sparsity?"),
    ("zzz: 0.5", "line 1, column 1: there is no option 'zzz': there are model, out,"),
    ("seed: 1\nsamples: many", "line 2, column 10: samples is 'many', but must be a whole number."),
    ("seq-len: 4\nseq_len: 5", "line 2, column 1: seq_len is said twice, first in line 1."),
    ("options:\n  per: row\n  per: tensor", "line 3, column 3: options.per is said twice, first in line 2."),
    ("reconstruct: yes", "line 1, column 14: reconstruct is 'yes', but must be true or false."),
    ("dtype: int8", "line 1, column 8: dtype is 'int8', but must be one of auto, float32, bfloat16, float16."),
    ("batch_size: 1.5", "line 1, column 13: batch_size is '1.5', but must be a whole number or auto."),
    ("include: '*mlp*'", "line 1, column 10: include is '*mlp*', but must be a list of texts."),
    ("include: [[a]]", "line 1, column 10: include is a sequence, but must be a list of texts."),
    ("method: [wanda]", "line 1, column 9: method is a sequence, but must be text."),
    ("method: null", "line 1, column 9: method is 'null', but must be text."),
    ("sparsity: half", "line 1, column 11: sparsity is 'half', but must be a number."),
    ("seed: " + "9" * 5000, "line 1, column 7: seed is "),
    ("options: per=row", "line 1, column 10: options is 'per=row', but must be a table of KEY: VALUE."),
    ("dry-run: true", "line 1, column 1: dry-run is for the command line alone, not for a recipe."),
    ("sparsity: 0.5\n  bad: [", "line 2, column 6: this is no YAML ("),
    ("seed: !!python/object:os.system 1", "line 1, column 7: seed is '1', but must be a whole number."),
    ("", "is no recipe: it must hold OPTION: VALUE"),
    ("- a\n- b", "is no recipe: it must hold OPTION: VALUE"),
    ("a: 1\n---\nb: 2", "line 2, column 1: this is no YAML ("),
    ("a\0b: 1", "is no YAML ("),
    ("[" * 1200, "no YAML ("),
    # Values that make no sense are told by the request, with the recipe's place.
    ("sparsity: 1.5", "line 1, column 11: --sparsity is 1.5, but must be at least 0 and below 1"),
    ("\nmethod: wandaa", "line 2, column 9: There is no method 'wandaa'"),
    ("options: {x: 1}", "line 1, column 14: The method wanda has no option 'x'"),
    ("pattern: 4:2", "line 1, column 10: --pattern is '4:2'"),
    ("preset: bestest", "line 1, column 9: --preset is 'bestest'"),
]


@pytest.mark.parametrize(("text", "told"), WRONG, ids=[told[:60] for _, told in WRONG])
def test_what_is_wrong_is_told_with_its_place(text: str, told: str, tmp_path: Path, command: RunCommand) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    outcome = command("prune", "nowhere", tmp_path / "out", "--recipe", file)
    assert outcome.code == 2
    assert outcome.stderr.startswith(f"Error: {file}") or outcome.stderr.startswith(f"Error: --recipe {file}")
    assert told in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_a_value_of_the_command_line_is_not_blamed_on_the_recipe(tmp_path: Path, command: RunCommand) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("sparsity: 0.5")
    outcome = command("prune", "nowhere", tmp_path / "out", "--recipe", file, "-s", 2)
    assert outcome.stderr.startswith("Error: --sparsity is 2")


def test_plain_words_are_what_they_look_like(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("pattern: 2:4\nrevision: 0123456\nsamples: ~\noptions: {a.b: 1e-3, c: off}\nbatch-size: 4\n")
    recipe = read_recipe(file)
    expected = {"pattern": "2:4", "revision": "0123456", "options": {"a.b": 1e-3, "c": "off"}, "batch_size": 4}
    assert recipe.values == expected


def over(tmp_path: Path, below: str, **explicit: Any) -> dict[str, Any]:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\nout: o\n" + below)
    return merged((read_recipe(file).values, explicit))


def test_the_command_line_wins(tmp_path: Path) -> None:
    assert over(tmp_path, "sparsity: 0.5\nseed: 1", sparsity=0.6) == {
        "model": "m",
        "out": Path("o"),
        "sparsity": 0.6,
        "seed": 1,
    }
    assert "sparsity" not in over(tmp_path, "sparsity: 0.5", pattern="2:4")
    assert over(tmp_path, "options: {a: 1, b: 2}", options={"b": "3"})["options"] == {"a": 1, "b": "3"}
    assert over(tmp_path, "preset: best", preset="fast")["method"] == "wanda"
    assert "target" not in over(tmp_path, "preset: best\nmethod: admm\ntarget: dense", preset="fast")
    assert over(tmp_path, "method: wanda", preset="best")["target"] == "dense"
    assert over(tmp_path, "preset: best", method="sparsegpt")["method"] == "sparsegpt"
    assert over(tmp_path, "", model="elsewhere")["out"] == Path("elsewhere"), "a lone argument is OUT"
    assert over(tmp_path, "revision: v1", model="n", out=Path("p")) == {"model": "n", "out": Path("p")}
    assert over(tmp_path, "revision: v1", model="m", out=Path("p"))["revision"] == "v1"
    with pytest.raises(RequestError, match="OUT is missing: give it on the command line, or as out in a recipe"):
        merged(({"model": "m"},))


def without_times_and_places(report: dict[str, Any]) -> dict[str, Any]:
    """But for times, what depends on the machine's load, and where it was written."""
    report["blocks"] = [{**block, "seconds": None} for block in report["blocks"]]
    report["request"]["out"] = report["output"]["folder"] = None
    return {k: v for k, v in report.items() if k not in ("created", "seconds", "peak_host_bytes")}


def test_the_same_recipe_in_two_processes(llama: Path, tokens_file: Path, tmp_path: Path) -> None:
    recipe = {"model": str(llama), "method": "sparsegpt", "sparsity": 0.6, "calibration": str(tokens_file)}
    recipe |= {"eval": str(tokens_file), "refine": None, "exclude": ["*.0.*"], "options": {"block_size": 16}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    outs = [tmp_path / name for name in ("a", "b")]
    processes = [ForkedRun("prune", "--recipe", tmp_path / "recipe.yaml", out, "--json") for out in outs]
    reports = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
        reports.append(json.loads(stdout))
    assert folder_bytes(outs[0]) == folder_bytes(outs[1])
    assert without_times_and_places(reports[0]) == without_times_and_places(reports[1])


def test_a_report_and_a_saved_recipe_repeat_the_run(
    llama: Path, tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    first, saved = tmp_path / "first", tmp_path / "saved.yaml"
    explicit = ["--preset", "best", "-o", "steps=3", "--calibration", tokens_file, "--include", "*q_proj*"]
    explicit += ["--save-recipe", saved]
    report = command("prune", llama, first, *explicit, "--json").json
    request = {name: value for name, value in report["request"].items() if name != "out"} | {"inputs": report["inputs"]}
    assert saved.read_text().startswith("# A recipe of prune-cli")
    assert yaml.safe_load(saved.read_text()) == {
        "model": str(llama), "out": str(first), "method": "admm", "options": {"steps": "3"}, "preset": "best",
        "calibration": str(tokens_file), "include": ["*q_proj*"], "target": "dense",
        "self_calibration": "auto", "allocate": "auto", "inputs": report["inputs"],
    }  # fmt: skip
    for number, recipe in enumerate((first / "prune_report.json", saved)):
        again = tmp_path / f"again{number}"
        outcome = command("prune", again, "--recipe", recipe, "--json")
        assert outcome.code == 0, outcome.stderr
        assert {name: value for name, value in outcome.json["request"].items() if name != "out"} == request
        assert folder_bytes(again) == folder_bytes(first)


def test_the_report_of_a_hub_model_pins_its_commit(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    assert command("prune", llama, out, "-m", "magnitude", "--overwrite", "-q").code == 0
    file = out / "prune_report.json"
    report = json.loads(file.read_text())
    report["model"]["revision"] = "0123456789abcdef"
    file.write_text(json.dumps(report))
    values = read_recipe(out).values
    assert values["revision"] == "0123456789abcdef"
    assert "overwrite" not in values


def test_a_recipe_is_not_written_over_another_file(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    saved = tmp_path / "saved.yaml"
    saved.write_text("mine")
    arguments = ("prune", llama, tmp_path / "out", "-m", "magnitude", "-q", "--dry-run", "--save-recipe")
    refused = command(*arguments, saved)
    assert refused.code == 2
    assert "saved.yaml exists already" in refused.stderr
    assert saved.read_text() == "mine"
    assert command(*arguments, tmp_path / "nowhere" / "x.yaml").code == 2
    assert command(*arguments, saved, "--overwrite").code == 0
    assert yaml.safe_load(saved.read_text())["method"] == "magnitude"


def test_a_config_is_found_upwards_and_everything_else_wins(
    whole: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, inside = tmp_path / "prune-cli.yaml", tmp_path / "deep" / "down"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    config.write_text("method: magnitude\nsparsity: 0.25\nseed: 5\nexclude: ['*.0.*']\n")
    (inside / "recipe.yaml").write_text("seed: 6\n")
    shown = command("prune", whole, "a", "--recipe", "recipe.yaml", "--pattern", "2:4")
    assert shown.stderr.splitlines()[0] == f"Options from {config}"
    request = json.loads(Path("a/prune_report.json").read_text())["request"]
    said = {name: request[name] for name in ("method", "sparsity", "pattern", "seed", "exclude", "config")}
    assert said == {
        "method": "magnitude",
        "sparsity": None,
        "pattern": "2:4",
        "seed": 6,
        "exclude": ["*.0.*"],
        "config": str(config),
    }
    assert f"- config: {config}" in Path("a/prune_report.md").read_text()
    # A report repeats its run, whatever the config says by now.
    config.write_text("include: ['nothing*']\n")
    assert command("prune", "--recipe", "a/prune_report.json", "b", "-q").code == 0
    assert folder_bytes(Path("b")) == folder_bytes(Path("a"))
    assert command("prune", whole, "c", "-m", "magnitude", "--config", "none", "-q").code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparsty: 0.5", "prune-cli.yaml, line 1, column 1: there is no option 'sparsty': did you mean sparsity?"),
        ("sparsity: 2", "prune-cli.yaml, line 1, column 11: --sparsity is 2"),
    ],
)
def test_what_is_wrong_in_a_config_is_told_with_its_place(
    text: str, words: str, whole: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prune-cli.yaml").write_text(text)
    refused = command("prune", whole, "out")
    assert (refused.code, words in refused.stderr) == (2, True), refused.stderr
    assert "--config nowhere.yaml is no file" in command("prune", whole, "out", "--config", "nowhere.yaml").stderr
