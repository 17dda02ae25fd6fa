"""The card of an output: read back with the hub's own parser, true to the report and to the source's card."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from prune_cli.report.card import card_of, read_card, warnings_of
from prune_cli.report.types import Report
from tests.conftest import RunCommand
from tests.test_repeat import parsed

SOURCE = """---
license: other
license_name: tiny-community
license_link: LICENSE
language:
- en
- de
pipeline_tag: text-generation
tags:
- gguf
extra_gated_prompt: Be kind.
---
# The tiny model
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("with-card") / "tiny-model")
    (folder / "README.md").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def out(source: Path, tokens_file: Path) -> Path:
    import prune_cli

    out = source.parent / "out"
    prune_cli.prune(source, out, method="ria", pattern="2:4", calibration=str(tokens_file), eval=str(tokens_file))
    return out


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "prune_report.json").read_text())


def as_from_hub(report: dict[str, Any]) -> Report:
    model = report["model"] | {"given": "some-org/tiny", "revision": "0123abc"}
    return Report.from_json(report | {"model": model})


def test_the_metadata_is_that_of_the_source_and_of_the_run(out: Path) -> None:
    card = ModelCard.load(out / "README.md")
    found, evaluation = card.data.to_dict(), report_of(out)["evaluation"]
    metrics = found.pop("model-index")[0]["results"][0]["metrics"]
    assert [each["value"] for each in metrics] == [evaluation[each]["perplexity"] for each in ("after", "before")]
    assert found == {
        "license": "other",
        "license_name": "tiny-community",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["pruned", "sparse", "ria", "2:4", "prune-cli"],
    }
    assert (out / "SOURCE_README.md").read_text() == SOURCE
    assert "[SOURCE_README.md](SOURCE_README.md)" in card.text


def test_a_model_of_the_hub_is_named_as_the_base(out: Path) -> None:
    card = ModelCard(card_of(as_from_hub(report_of(out)), read_card(out / "SOURCE_README.md")))
    assert card.data.get("base_model") == "some-org/tiny"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "[some-org/tiny](https://huggingface.co/some-org/tiny) (commit `0123abc`)" in card.text


def test_the_figures_are_those_of_the_report(out: Path) -> None:
    text = ModelCard.load(out / "README.md").text
    evaluation = report_of(out)["evaluation"]
    before, after = (
        f"{each['perplexity']:.2f} ± {each['perplexity'] * each['loss_standard_error']:.2f}"
        for each in (evaluation["before"], evaluation["after"])
    )
    assert f"| {before} | {after} |" in text
    assert "| Zeros in the pruned tensors |  | 50.00 % |  |" in text
    assert "The 2:4 zeros make the file no smaller" in text
    assert "https://openreview.net/forum?id=Tr0lPx9woF" in text


def test_the_command_in_the_card_repeats_the_run_without_places_of_this_machine(out: Path) -> None:
    report = report_of(out)
    text = card_of(as_from_hub(report), read_card(out / "SOURCE_README.md"))
    command = text.split("```sh\n")[1].split("\n```")[0]
    request = parsed(command)
    assert (request.model, request.revision, request.out) == ("some-org/tiny", "0123abc", Path("OUT"))
    assert (request.method, request.pattern) == ("ria", "2:4")
    local = (out / "README.md").read_text().split("```sh\n")[1].split("\n```")[0]
    assert shlex.split(local)[2:4] == ["tiny-model", "OUT"]


def test_what_must_be_settled_first_is_said(out: Path, tmp_path: Path, command: RunCommand) -> None:
    text = (out / "README.md").read_text()
    assert "> **Warning:** tiny-model is gated" in text
    assert "licence of tiny-model is not known" not in text

    unknown = tmp_path / "README.md"
    unknown.write_text("# no metadata\n")
    assert warnings_of(read_card(unknown), "m") == [
        "The licence of m is not known: its card names none. Find out if it may be passed on."
    ]
    unknown.write_text("---\nlicense: [mit\n---\n")
    assert "cannot be read" in warnings_of(read_card(unknown), "m")[0]

    pushed = command("push", out, "me/tiny", "--dry-run")
    assert "warning: tiny-model is gated" in pushed.stderr
    assert pushed.code == 0


def test_a_source_without_a_card(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    assert command("prune", llama, out, "-m", "magnitude", "-q").code == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.get("license") is None
    assert card.data.get("base_model") is None
    assert "Its quality was not measured." in card.text
    assert "The source came without a card." in card.text
    pushed = command("push", out, "me/tiny", "--dry-run")
    assert "warning: The licence of model is not known" in pushed.stderr
    card.data["license"] = "mit"
    card.save(out / "README.md")
    assert "licence" not in command("push", out, "me/tiny", "--dry-run").stderr


def test_pruning_again_keeps_the_card_of_what_was_pruned(out: Path, tmp_path: Path, command: RunCommand) -> None:
    again = tmp_path / "again"
    assert command("prune", out, again, "-m", "magnitude", "-s", 0.7, "-q").code == 0
    assert (again / "SOURCE_README.md").read_bytes() == (out / "README.md").read_bytes()
    assert ModelCard.load(again / "README.md").data.get("license_name") == "tiny-community"


@pytest.mark.parametrize("form", [[], ["--self-contained"]], ids=["sparse", "self-contained"])
def test_converted_to_sparse_files_the_card_tells_how_to_load_them(
    form: list[str], out: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    assert command("convert", out, sparse, *form, "-q").code == 0
    card = (sparse / "README.md").read_text()
    program = card.split("```python\n")[1].split("\n```")[0]
    assert program.startswith("import prune_cli ") == (not form)
    assert ("trust_remote_code lets sparse_loader.py" in program and "trust_remote_code=True" in program) == bool(form)
    assert command("convert", sparse, dense, "--format", "dense", "-q").code == 0
    assert (dense / "README.md").read_bytes() == (out / "README.md").read_bytes()
    monkeypatch.chdir(sparse)
    exec(program)  # as a reader would run it, in this folder
