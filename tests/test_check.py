"""`prune-cli check`: rules decided by measuring, or by a report's figures; exit codes, JUnit, GitHub."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import prune_cli
from prune_cli.checks.limits import Limit, parse_limit
from prune_cli.checks.outputs import to_junit
from prune_cli.checks.request import GateResult
from prune_cli.checks.rules import CheckResult
from prune_cli.errors import RequestError
from prune_cli.report.format import size
from tests import reference
from tests.conftest import Outcome, RunCommand, token_ids
from tests.forked import run_program
from tests.tiny import load_plain, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("dense") / "model", "llama-untied")


@pytest.fixture(scope="module")
def pruned(model: Path, tokens_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the weights gone, with perplexities in its report; never written to."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune_cli.prune(model, out, method="magnitude", eval=str(tokens_file))
    return out


@pytest.fixture(autouse=True)
def _outside_of_github(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def verdicts(outcome: Outcome) -> dict[str, Any]:
    return {verdict["rule"]: verdict for verdict in outcome.json["verdicts"]}


@torch.no_grad()
def test_a_model_is_measured_and_every_figure_is_that_of_a_naive_computation(
    model: Path, pruned: Path, command: RunCommand
) -> None:
    rules = ["--max-perplexity", 1000, "--max-perplexity-increase", "900%", "--max-kl", 9, "--min-top1", "1%"]
    outcome = command("check", pruned, *rules, "--min-sparsity", "50%", "--max-size", "1x", "--json")
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert (outcome.json["source"], outcome.json["against"], outcome.json["passed"]) == ("measured", str(model), True)
    found = {rule: verdict["value"] for rule, verdict in verdicts(outcome).items()}
    ids, ours, dense = token_ids(), load_plain(pruned), load_plain(model)
    after, before = (reference.perplexity(each, ids) for each in (ours, dense))
    assert found["--max-perplexity"] == pytest.approx(after, rel=1e-5)
    assert found["--max-perplexity-increase"] == pytest.approx(after / before - 1, rel=1e-3)
    logits = [each(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for each in (ours, dense)]
    assert found["--max-kl"] == pytest.approx(
        float((logits[1].exp() * (logits[1] - logits[0])).sum(-1).mean()), rel=1e-4
    )
    assert found["--min-top1"] == pytest.approx(float((logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()))
    assert found["--min-sparsity"] == 0.5
    assert found["--max-size"] == 1.0
    assert found["files as in the report"] is None


def test_the_rule_that_fails_is_named_with_both_numbers(pruned: Path, command: RunCommand) -> None:
    outcome = command("check", pruned, "--min-sparsity", "0.6", "--max-size", "1MB")
    assert outcome.code == 1
    assert "50.00 % of the pruned tensors" in " ".join(outcome.stdout.split())
    assert "Failed: --min-sparsity (1 of 3 rules)." in outcome.stdout
    quiet = command("check", pruned, "--min-sparsity", "0.6", "-q")
    assert (quiet.code, quiet.stdout, quiet.stderr) == (1, "", "Failed: --min-sparsity (1 of 2 rules).\n")


def test_a_report_is_believed_and_says_so(pruned: Path, command: RunCommand) -> None:
    report = json.loads((pruned / "prune_report.json").read_text())
    before, after = (report["evaluation"][name]["perplexity"] for name in ("before", "after"))
    file = pruned / "prune_report.json"
    outcome = command(
        "check", file, "--max-perplexity-increase", f"{after - before + 1e-6:.6f}", "--min-sparsity", "0.5"
    )
    assert outcome.code == 0, outcome.stdout
    assert "nothing was measured" in outcome.stdout
    outcome = command("check", file, "--max-perplexity-increase", "0.0001%", "--max-size", "0.5x", "--json")
    assert outcome.code == 1
    assert outcome.json["source"] == "report"
    assert verdicts(outcome)["--max-perplexity-increase"]["value"] == pytest.approx(after / before - 1)
    assert verdicts(outcome)["--max-size"] == {
        "rule": "--max-size",
        "asked": "at most 0.5x",
        "measured": f"1.000x ({size(report['totals']['bytes_before'])} to {size(report['totals']['bytes_after'])})",
        "passed": False,
        "limit": 0.5,
        "value": 1.0,
    }


def test_a_model_is_not_believed(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    lying = shutil.copytree(pruned, tmp_path / "lying")
    shard = next(iter(sorted(lying.glob("*.safetensors"))))
    save_file({name: torch.ones_like(tensor) for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    outcome = command("check", lying, "--min-sparsity", "50%", "--json")
    assert outcome.code == 1
    assert not any(verdict["passed"] for verdict in verdicts(outcome).values())
    assert verdicts(outcome)["files as in the report"]["measured"] == f"{shard.name} changed"
    assert command("check", lying / "prune_report.json", "--min-sparsity", "50%").code == 0


def test_rules_from_a_file(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    report, rules = json.loads((pruned / "prune_report.json").read_text()), tmp_path / "rules.yaml"
    loss = report["evaluation"]["after"]["loss"]
    rules.write_text(
        "max_size: 0.5x\nmin-sparsity: 50%\n"
        f"totals.sparsity_of_pruned: {{min: 50%, max: 0.5}}\nevaluation.after.loss:\n  max: {loss - 1e-6:.9f}\n"
        "peak_host_bytes: {max: 90GB, min: 1}\n"
    )
    told = command("check", pruned / "prune_report.json", "--thresholds", rules, "--max-size", "2x", "--json")
    assert told.code == 1
    found = verdicts(told)
    assert {rule for rule, verdict in found.items() if not verdict["passed"]} == {"evaluation.after.loss (max)"}
    assert found["--max-size"]["limit"] == 2  # the command line wins
    assert found["peak_host_bytes (max)"]["limit"] == 90e9
    assert found["evaluation.after.loss (max)"]["value"] == loss
    assert len(found) == 7


def test_fields_of_a_model_are_measured_where_they_can_be(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    lying, rules = shutil.copytree(pruned, tmp_path / "lying"), tmp_path / "rules.json"
    shard = next(iter(sorted(lying.glob("*.safetensors"))))
    save_file({name: torch.ones_like(tensor) for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    rules.write_text(json.dumps({"totals.sparsity_of_pruned": {"min": 0.5}, "seconds": {"max": 9999}}))
    found = verdicts(command("check", lying, "--thresholds", rules, "--json"))
    assert [found[rule]["passed"] for rule in ("totals.sparsity_of_pruned (min)", "seconds (max)")] == [False, True]
    (lying / "prune_report.json").unlink()
    refused = command("check", lying, "--thresholds", rules)
    assert refused.code == 2
    assert f"seconds (max) cannot be decided: no report in {lying} tells it." in refused.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("max-perplexity: 5%", "line 1, column 17: max-perplexity is '5%', but must be a number, as 12.5."),
        ("min-top1: 1\nsecnds: {max: 2}", "line 2, column 1: there is no rule and no number of a report called 'secn"),
        ("seconds: 3", "line 1, column 10: seconds must be followed by its bounds, as {min: 0.4, max: 0.6}."),
        ("seconds: {mx: 2}", "line 1, column 11: seconds takes min and max, once each, not 'mx'."),
        ('{"seconds": {"max": 1, "max": 2}}', "line 1, column 24: seconds takes min and max, once each, not 'max'."),
        ("seconds: {max: 2x}", "line 1, column 16: seconds: max is '2x', but must be a number, a share as 49%, or byt"),
        ("seconds: {max: }", "line 1, column 15: seconds: max must be followed by one limit"),
        ("max-kl: [1]", "line 1, column 9: max-kl must be followed by one limit"),
        ("max-kl: 1\nmax-kl: 2", "line 2, column 1: max-kl is said twice, first in line 1."),
        ("require-loadable: 3", "line 1, column 19: require-loadable must be true or false."),
        ("? [a]\n: 1", "line 1, column 3: a rule's name must be a word"),
        ("a: [", "line 1, column 5: this is no YAML"),
        ("- a", "holds no rules: write NAME: LIMIT, a line each"),
    ],
)
def test_a_file_of_rules_is_refused_by_its_line(
    text: str, complaint: str, pruned: Path, tmp_path: Path, command: RunCommand
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(text)
    outcome = command("check", pruned, "--thresholds", rules)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith(f"Error: {rules}")
    assert complaint in outcome.stderr
    assert "cannot be read" in command("check", pruned, "--thresholds", tmp_path / "none").stderr


def test_without_a_report_the_blocks_are_counted(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    bare = shutil.copytree(pruned, tmp_path / "bare", ignore=shutil.ignore_patterns("prune_report.*"))
    outcome = command("check", bare, "--min-sparsity", "50%", "--json")
    assert outcome.code == 0
    assert "the matrices of the blocks" in verdicts(outcome)["--min-sparsity"]["measured"]


def test_sparse_files_are_measured_decoded(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    sparse = tmp_path / "sparse"
    assert command("convert", pruned, sparse, "-q").code == 0
    outcome = command("check", sparse, "--min-sparsity", "50%", "--max-kl", "9", "--max-size", "0.9x", "--json")
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    dense = command("check", pruned, "--max-kl", "9", "--json")
    assert verdicts(outcome)["--max-kl"]["value"] == verdicts(dense)["--max-kl"]["value"]
    assert verdicts(outcome)["--min-sparsity"]["value"] == 0.5
    assert verdicts(outcome)["--max-size"]["value"] < 0.9


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that tries to load is a fork without our package; tests/test_pipeline.py starts the real one."""

    def run(words: list[str], cwd: str, **_: object) -> subprocess.CompletedProcess[str]:
        assert words[1:3] == ["-I", "-c"]
        return run_program(words[3], *words[4:], cwd=cwd)

    monkeypatch.setattr("prune_cli.checks.loadable.subprocess.run", run)


@pytest.mark.usefixtures("forked")
def test_what_does_not_load_in_a_fresh_process_is_told(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    broken = shutil.copytree(pruned, tmp_path / "broken", ignore=shutil.ignore_patterns("prune_report.*"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    outcome = command("check", broken, "--require-loadable", "--json")
    assert outcome.code == 1
    assert "missing keys: model.layers.3." in verdicts(outcome)["--require-loadable"]["measured"]


@pytest.mark.usefixtures("forked")
def test_a_sparse_model_is_told_to_need_this_package(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    assert command("convert", pruned, tmp_path / "sparse", "-q").code == 0
    outcome = command("check", tmp_path / "sparse", "--require-loadable", "--json")
    assert outcome.code == 1
    assert "needs import prune_cli" in verdicts(outcome)["--require-loadable"]["measured"]


UNDECIDED = [
    ([], "There is no rule, and"),
    (["--max-perplexity", "5"], "--max-perplexity cannot be decided: no text to measure on: add --data SOURCE."),
    (
        ["--max-kl", "1", "--data", "TOKENS"],
        "--max-kl cannot be decided: no dense model to compare with: add --against",
    ),
    (["--max-size", "1x"], "--max-size cannot be decided: no dense model to compare with: add --against DENSE."),
    (["--max-kl", "lots"], "--max-kl is 'lots', but must be a number"),
    (["--min-sparsity", "150%"], "--min-sparsity is '150%', but must be a share"),
    (["--max-size", "7"], "--max-size is '7', but must be a size: 0.6x of the dense model's, or bytes as 4GB"),
    (["--max-perplexity-increase", "-1%"], "--max-perplexity-increase is '-1%', but must be an increase"),
    (["--min-sparsity", "0", "--junit", "no/where.xml"], "--junit no/where.xml is no file that can be written"),
]


@pytest.mark.parametrize(("arguments", "told"), UNDECIDED, ids=[" ".join(arguments) for arguments, _ in UNDECIDED])
def test_what_cannot_be_decided_is_a_wrong_request(
    arguments: list[str], told: str, model: Path, tokens_file: Path, command: RunCommand
) -> None:
    given = [str(tokens_file) if argument == "TOKENS" else argument for argument in arguments]
    outcome = command("check", model, *given)
    assert outcome.code == 2
    assert told in outcome.stderr
    assert outcome.stdout == ""


def test_what_a_report_cannot_tell(pruned: Path, tokens_file: Path, tmp_path: Path, command: RunCommand) -> None:
    file = pruned / "prune_report.json"
    for arguments, told in [
        (["--max-kl", "1"], "--max-kl cannot be decided: a report holds no KL divergence; give the model's folder"),
        (["--require-loadable"], "--require-loadable cannot be decided: a report cannot be loaded"),
        (["--max-perplexity", "9", "--data", str(tokens_file)], "--data is for measuring a model, and"),
        ([], "There is no rule"),
    ]:
        outcome = command("check", file, *arguments)
        assert outcome.code == 2
        assert told in outcome.stderr
    moved = shutil.copytree(pruned, tmp_path / "moved")
    report = json.loads((moved / "prune_report.json").read_text())
    report["model"]["given"] = str(tmp_path / "gone")
    (moved / "prune_report.json").write_text(json.dumps(report))
    outcome = command("check", moved, "--max-kl", "1")
    assert outcome.code == 2
    assert "The dense model that the report names cannot be opened" in outcome.stderr
    assert "say --against DENSE." in outcome.stderr


def test_junit_and_github(pruned: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    file, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    report = pruned / "prune_report.json"
    outcome = command("check", report, "--min-sparsity", "60%", "--max-size", "1x", "--junit", file, "--json")
    assert outcome.code == 1
    assert not outcome.json["passed"]
    assert (
        "::error title=prune-cli check%3A --min-sparsity::--min-sparsity: asked at least 60%25, "
        "found 50.00 %25 of the pruned tensors\n" in outcome.stderr
    )
    assert "| `--min-sparsity` | at least 60% | 50.00 % of the pruned tensors | **FAIL** |" in summary.read_text()
    suites = ElementTree.parse(file).getroot()
    assert (suites.tag, suites.get("tests"), suites.get("failures"), suites.get("errors")) == (
        "testsuites",
        "2",
        "1",
        "0",
    )
    cases = {case.get("name"): case for case in suites.iter("testcase")}
    assert cases.keys() == {"--min-sparsity", "--max-size"}
    assert cases["--max-size"].find("failure") is None
    failure = cases["--min-sparsity"].find("failure")
    assert failure is not None
    assert failure.get("message") == "--min-sparsity: asked at least 60%, found 50.00 % of the pruned tensors"
    assert "GitHub: 1 annotation(s), the table is in the step summary.\n" in outcome.stderr
    monkeypatch.setenv("GITHUB_ACTIONS", "false")
    assert "::error" not in command("check", report, "--min-sparsity", "60%").stderr
    assert "::error" in command("check", report, "--min-sparsity", "60%", "--github").stderr


@given(st.text())
def test_junit_is_xml_whatever_names_hold(name: str) -> None:
    result = GateResult(name, "report", name, name, False, [CheckResult(name, name, name, False)])
    assert ElementTree.fromstring(to_junit(result, 0.5).encode()).find("testsuite/testcase/failure") is not None


def test_limits_as_they_are_typed() -> None:
    assert parse_limit("--x", "5%", "increase") == Limit("5%", 0.05, relative=True)
    assert parse_limit("--x", "0.3", "increase") == Limit("0.3", 0.3)
    assert parse_limit("--x", "0.6x", "size") == Limit("0.6x", 0.6, relative=True)
    assert parse_limit("--x", "4GB", "size") == Limit("4GB", 4e9)
    assert parse_limit("--x", "900 MiB", "size") == Limit("900 MiB", 900 * 2**20)
    assert parse_limit("--x", "49%", "share").value == 0.49
    assert parse_limit("--x", ".5", "share").value == 0.5
    for text, kind in [
        ("5x", "increase"),
        ("0.6", "size"),
        ("5%", "size"),
        ("1e9", "number"),
        ("", "share"),
        ("nan", "number"),
    ]:
        with pytest.raises(RequestError, match="--x is "):
            parse_limit("--x", text, kind)  # pyright: ignore[reportArgumentType]


def test_a_baseline_is_the_rules_that_were_not_said(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    text = ("--calibration", tokens_file, "--eval", tokens_file, "-q")
    for name, sparsity in (("half", 0.5), ("less", 0.25)):
        assert command("prune", llama, tmp_path / name, "-m", "magnitude", "-s", sparsity, *text).code == 0
    half, less = (tmp_path / name / "prune_report.json" for name in ("half", "less"))
    same = command("check", half, "--baseline", half, "--json")
    assert (same.code, [each["rule"] for each in same.json["verdicts"]]) == (
        0,
        ["--max-perplexity", "--min-sparsity", "--max-size"],
    )
    worse = command("check", less, "--baseline", half, "--json")
    assert worse.code == 1
    assert "--min-sparsity" in [each["rule"] for each in worse.json["verdicts"] if not each["passed"]]
    assert command("check", less, "--baseline", half, "--min-sparsity", "20%", "--max-perplexity", 1e9).code == 0
    document = json.loads(half.read_text())
    document["evaluation"]["text"]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(document))
    refused = command("check", half, "--baseline", tmp_path / "other.json")
    assert (refused.code, "are of different texts" in refused.stderr) == (2, True)
