"""`prune-cli prune` as a user meets it: what it prints, what it reports, what it leaves alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

import prune_cli
from methods import load_method, method_names
from methods.structured import structured_names
from prune_cli.errors import PruneError
from prune_cli.report.schema import report_schema
from prune_cli.request.request import PruneRequest
from tests import reference
from tests.conftest import LENGTH, SAMPLES, RunCommand, folder_bytes, token_ids
from tests.forked import ForkedRun
from tests.tiny import load_plain, save_tiny


def report_of(out: Path) -> Any:
    return json.loads((out / "prune_report.json").read_text())


def pruned_rows(report: Any) -> dict[str, Any]:
    return {tensor["name"]: tensor for tensor in report["tensors"] if tensor["action"] == "pruned"}


def test_json_is_one_valid_document_and_the_report_on_disk(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    out = tmp_path / "out"
    outcome = command("prune", llama, out, "--calibration", tokens_file, "--eval", tokens_file, "--json")
    assert outcome.code == 0
    jsonschema.validate(outcome.json, report_schema(), cls=jsonschema.Draft202012Validator)
    assert outcome.json == report_of(out)
    page = (out / "prune_report.md").read_text()
    assert "model.layers.0.self_attn.q_proj.weight" in page
    assert "Unstructured zeros make the file no smaller" in page


def test_the_report_holds_what_is_in_the_written_files(tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "model", "llama-tied")
    out = tmp_path / "out"
    assert command("prune", model, out, "--calibration", tokens_file, "-s", 0.6, "-q").code == 0
    report = report_of(out)
    weights = load_plain(out).state_dict()
    rows = pruned_rows(report)
    assert len(rows) == 21
    for name, row in rows.items():
        assert row["asked_sparsity"] == 0.6
        assert row["sparsity"] == int((weights[name] == 0).sum()) / weights[name].numel()
        assert row["sparsity"] == int(0.6 * weights[name].shape[1] + 1e-9) / weights[name].shape[1]
    kept = {t["name"]: t["reason"] for t in report["tensors"] if t["action"] == "kept"}
    assert kept["model.embed_tokens.weight"] == "embeddings are kept by default"
    assert kept["model.norm.weight"] == "norms are kept by default"
    assert report["totals"]["zeros_in_pruned"] == sum(int((weights[name] == 0).sum()) for name in rows)
    assert report["totals"]["bytes_before"] == report["totals"]["bytes_after"]
    assert report["model"]["files"].keys() == report["output"]["files"].keys()
    assert report["model"]["files"] != report["output"]["files"]


@torch.no_grad()
def test_output_errors_are_those_of_a_naive_computation(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    out = tmp_path / "out"
    assert command("prune", llama, out, "--calibration", tokens_file, "-q").code == 0
    dense, pruned = load_plain(llama), load_plain(out)
    report = report_of(out)
    assert report["output_error_rows"] == token_ids().numel()
    maps = {
        f"model.layers.{i}.{n}": m for i in range(3) for n, m in reference.linear_layers(pruned.model.layers[i]).items()
    }
    seen = reference.run_with_inputs(pruned, [token_ids()], maps)
    for name, row in pruned_rows(report).items():
        inputs = seen[name.removesuffix(".weight")][0].flatten(0, 1).double()
        before, after = dense.state_dict()[name].double(), pruned.state_dict()[name].double()
        error = (inputs @ (before - after).T).square().sum() / (inputs @ before.T).square().sum()
        assert row["output_error"] == pytest.approx(float(error), rel=1e-4)


@torch.no_grad()
def test_perplexity_before_and_after(llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    assert command("prune", llama, out, "-m", "magnitude", "-s", 0.7, "--eval", tokens_file, "-q").code == 0
    evaluation = report_of(out)["evaluation"]
    assert evaluation["before"]["perplexity"] == pytest.approx(
        reference.perplexity(load_plain(llama), token_ids()), rel=1e-5
    )
    assert evaluation["after"]["perplexity"] == pytest.approx(
        reference.perplexity(load_plain(out), token_ids()), rel=1e-5
    )


def test_the_terminal_output(llama: Path, tmp_path: Path, tokens_file: Path) -> None:
    process = ForkedRun("prune", llama, tmp_path / "out", "--calibration", tokens_file)
    stdout, stderr = process.communicate()
    assert process.returncode == 0
    assert "Zeros in the pruned tensors" in stdout
    assert "50.00 %" in stdout
    assert "Unstructured zeros make the file no smaller" in " ".join(stdout.split())
    told = stderr.splitlines()
    assert told[:3] == [f"Reading {llama}", "Reading text", "Copying 5 file(s)"]
    assert told[4] == "Pruning with wanda"
    assert told[3].startswith("warning: Calibration has 144 tokens, and 32,768 or more are usual")
    assert "\x1b" not in stdout + stderr


def test_a_log_file_has_stages_and_the_end_whatever_is_shown(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    log = tmp_path / "log"
    asked = ("prune", llama, tmp_path / "out", "--calibration", tokens_file, "-q", "--log-file")
    assert command(*asked, log).code == 0
    lines = [line[20:] for line in log.read_text().splitlines()]
    assert lines[0].startswith("prune-cli ")
    assert lines[1:3] == ["Reading text", "Copying 5 file(s)"]
    assert lines[3].startswith("warning: Calibration has 144 tokens")
    assert lines[-2:] == ["Pruning with wanda", "Done"]
    nowhere = command(*asked, tmp_path / "no" / "log", "--overwrite")
    assert (nowhere.code, "cannot be written" in nowhere.stderr) == (2, True)


def test_quiet_prints_nothing(llama: Path, tmp_path: Path, tokens_file: Path) -> None:
    process = ForkedRun("prune", llama, tmp_path / "out", "--calibration", tokens_file, "-q")
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_failures_in_json_are_json_too(tmp_path: Path, command: RunCommand) -> None:
    outcome = command("prune", tmp_path / "nowhere", tmp_path / "out", "--json")
    assert outcome.code == 2
    assert outcome.json["exit_code"] == 2
    assert "nowhere" in outcome.json["error"]
    assert outcome.json["error"] in outcome.stderr


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_methods_that_need_no_text_read_none(
    method: str, llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    blind, measured = tmp_path / "blind", tmp_path / "measured"
    assert command("prune", llama, blind, "-m", method, "-q").code == 0
    assert command("prune", llama, measured, "-m", method, "-q", "--calibration", tokens_file).code == 0
    assert folder_bytes(blind) == folder_bytes(measured)
    assert report_of(blind)["calibration"] is None
    assert all(row["output_error"] is None for row in pruned_rows(report_of(blind)).values())
    assert all(0 < row["output_error"] < 2 for row in pruned_rows(report_of(measured)).values())


def test_random_follows_the_seed_and_the_name_alone(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    outs = [tmp_path / name for name in ("a", "b", "c", "d")]
    extra = [[], [], ["--seed", 1], ["--exclude", "*q_proj*"]]
    for out, arguments in zip(outs, extra, strict=True):
        assert command("prune", llama, out, "-m", "random", "-q", *arguments).code == 0
    weights = [load_plain(out).state_dict() for out in outs]
    name = "model.layers.1.mlp.up_proj.weight"
    assert folder_bytes(outs[0]) == folder_bytes(outs[1])
    assert not torch.equal(weights[0][name], weights[2][name])
    assert torch.equal(weights[0][name], weights[3][name])


def test_options_of_a_method(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    assert command("prune", llama, out, "-m", "magnitude", "-o", "per=row", "-q").code == 0
    weights = load_plain(out).state_dict()
    for name in pruned_rows(report_of(out)):
        weight = weights[name]
        assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()


def test_include_narrows_or_adds_and_exclude_keeps(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    narrowed, added = tmp_path / "narrowed", tmp_path / "added"
    arguments = ["--include", "*.mlp.*", "--exclude", "*.1.*"]
    assert command("prune", llama, narrowed, "-m", "magnitude", "-q", *arguments).code == 0
    expected = {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 2) for m in ("gate", "up", "down")}
    assert set(pruned_rows(report_of(narrowed))) == expected
    assert command("prune", llama, added, "-m", "magnitude", "-q", "--include", "lm_head.weight").code == 0
    assert len(pruned_rows(report_of(added))) == 22
    assert report_of(added)["blocks"][-1]["index"] == 3


def test_dry_run_writes_nothing_and_says_what_would_happen(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    out = tmp_path / "out"
    dry = command("prune", llama, out, "--calibration", tokens_file, "--pattern", "2:4", "--dry-run", "--json")
    assert dry.code == 0
    assert list(tmp_path.iterdir()) == []
    assert command("prune", llama, out, "--calibration", tokens_file, "--pattern", "2:4", "-q").code == 0
    totals = report_of(out)["totals"]
    assert dry.json["zeros"] == totals["zeros_in_pruned"]
    assert dry.json["pruned_parameters"] == totals["pruned_parameters"]
    assert dry.json["parameters"] == totals["parameters"]
    assert dry.json["calibration_tokens"] == SAMPLES * LENGTH
    assert {(c["role"], c["action"], c["tensors"]) for c in dry.json["classes"]} == {
        ("linear map", "prune", 21),
        ("norm", "keep", 7),
        ("embedding", "keep", 1),
        ("output head", "keep", 1),
    }
    assert "2:4 zeros make the file no smaller" in dry.json["gain"]
    text = command("prune", llama, tmp_path / "other", "-m", "magnitude", "--dry-run")
    assert "peak memory, estimated" in text.stdout


@pytest.mark.parametrize(("set_before", "then"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_the_environment_says_otherwise(
    set_before: str | None, then: str, llama: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", set_before or "")
    if set_before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert command("prune", llama, tmp_path / "out", "-m", "magnitude", "-q").code == 0
    assert os.environ["OMP_WAIT_POLICY"] == then
    assert json.loads((tmp_path / "out" / "prune_report.json").read_text())["environment"]["omp_wait_policy"] == then


def test_the_python_api(llama: Path, tmp_path: Path, tokens_file: Path) -> None:
    report = prune_cli.prune(llama, tmp_path / "out", method="wanda", pattern="1:4", calibration=str(tokens_file))
    assert report.totals.sparsity_of_pruned == 0.75
    with pytest.raises(prune_cli.RequestError, match="exists already"):
        prune_cli.prune(llama, tmp_path / "out")


def test_methods_are_listed_with_their_options(command: RunCommand) -> None:
    listed = command("methods", "--json").json
    assert [i["name"] for i in listed if i["option"].startswith("--method")] == [*method_names(), *structured_names()]
    assert [i["option"] for i in listed if i["name"] in ("swaps", "reconstruct")] == ["--reconstruct", "--refine swaps"]
    assert "-o swaps.rounds=..." in command("methods", "swaps").stdout
    one = command("methods", "magnitude")
    assert "-o per=..." in one.stdout
    assert load_method("magnitude").paper.split(",")[0] in one.stdout
    unknown = command("methods", "wandaa")
    assert unknown.code == 2
    assert ", ".join(method_names()) in unknown.stderr


@pytest.mark.parametrize(
    ("method", "told"), [("wanda", "and 32,768 or more are usual"), ("admm", "fewer than the 64 inputs of the widest")]
)
def test_thin_calibration_is_told_with_its_number(
    method: str, told: str, llama: Path, tmp_path: Path, command: RunCommand
) -> None:
    save_file({"input_ids": token_ids(samples=2)}, tmp_path / "few.safetensors")
    shown = command("prune", llama, tmp_path / "out", "-m", method, "--calibration", tmp_path / "few.safetensors")
    assert f"Calibration has 48 tokens, {told}" in shown.stdout
    assert "Calibration has 48 tokens" in shown.stderr


def test_a_preset_is_told_by_name_with_all_it_does(
    llama: Path, tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    text = ("--calibration", tokens_file, "--eval", tokens_file, "--eval-windows", 3, "-o", "steps=2")
    shown = command("prune", llama, tmp_path / "out", "--preset", "best", *text)
    name = "preset best (admm, dense target, self-calibration)"
    out = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.[mh]*")}
    told = (shown.stdout, out["README.md"], out["prune_report.md"], out["prune_report.html"])
    assert all(name in " ".join(each.split()) for each in told)
    assert all("follows the outputs of the dense model" in " ".join(each.split()) for each in told)
    assert all(paper in out["README.md"] for paper in ("2401.02938", "2504.02692", "2410.17170"))
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert report["evaluation"]["text"]["samples"] == report["evaluation"]["before"]["windows"] == 3
    assert report["evaluation"]["text"]["sha256"] in out["prune_report.md"]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_steps_follow_a_method(name: str, tokens_file: Path, tmp_path: Path, command: RunCommand) -> None:
    model, out = save_tiny(tmp_path / "model", name), tmp_path / "out"
    steps = ("--refine", "swaps", "-o", "swaps.rounds=2", "--reconstruct", "--target", "dense")
    report = command("prune", model, out, "-m", "dsnot", *steps, "--calibration", tokens_file, "--json").json
    jsonschema.validate(report, report_schema())
    assert report["method"]["name"] == "dsnot + swaps + reconstruct"
    assert report["method"]["options"]["swaps.rounds"] == 2
    assert len(report["method"]["papers"]) == 4  # the dense target has one too
    pruned = [tensor for tensor in report["tensors"] if tensor["action"] == "pruned"]
    assert {tensor["sparsity"] for tensor in pruned} == {0.5}
    errors = {tensor["name"]: tensor["output_error"] for tensor in pruned}
    plain = command("prune", model, tmp_path / "plain", "--calibration", tokens_file, "--json").json
    first = pruned[0]["name"]
    worse = next(tensor["output_error"] for tensor in plain["tensors"] if tensor["name"] == first)
    assert errors[first] < worse, "the first map has the dense model's inputs, so its fit can only be better"


def test_a_preset_is_its_options_and_what_is_said_beside_it_wins(
    llama: Path, tokens_file: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PruneRequest] = []

    def stop(request: PruneRequest, *_: object, **__: object) -> None:
        asked.append(request)
        raise PruneError("far enough")

    monkeypatch.setattr("prune_cli.run.prune", stop)

    def request(*options: str) -> PruneRequest:
        assert command("prune", llama, tmp_path / "out", *options, "--calibration", tokens_file).code == 1
        return asked.pop()

    best = request("--preset", "best")
    assert (best.preset, best.method, best.target) == ("best", "admm", "dense")
    assert request("--preset", "best", "-m", "sparsegpt").method == "sparsegpt"
    assert request("--preset", "best", "--target", "pruned").target == "pruned"
    assert request().method == "wanda"
