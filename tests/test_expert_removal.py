"""`--method experts`: outputs load anywhere and equal the dense model whose router never picks what was removed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from methods.structured.experts import choose, keep_count
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.cli import app
from tests import reference_experts
from tests.broken import refused
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.round_trips import Loaded, load_elsewhere
from tests.tiny import load_plain, save_tiny

KINDS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text",
)  # fmt: skip
SHARES = {"mixtral": "0.5", "deepseek_v3": "0.5"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind, shards=kind == "mixtral") for kind in KINDS}


@pytest.fixture(scope="module")
def outputs(models: dict[str, Path], tokens_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("outputs")
    for kind, folder in models.items():
        arguments = ["-m", "experts", "-s", SHARES.get(kind, "0.25"), "--calibration", str(tokens_file), "-q"]
        done = CliRunner().invoke(app, ["prune", str(folder), str(root / kind), *arguments])
        assert done.exit_code == 0, done.output
    return {kind: root / kind for kind in models}


@pytest.fixture(scope="module")
def loaded(outputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    return load_elsewhere(outputs, token_ids(), tmp_path_factory.mktemp("elsewhere") / "scratch")


def report_of(folder: Path) -> Any:
    return json.loads((folder / "prune_report.json").read_text())


def removed_experts(report: Any) -> dict[int, list[int]]:
    """The numbers after "experts", block by block."""
    blocks = report["structure"]["blocks"]
    return {
        b["block"]: [int(n) for n in b["removed"].removeprefix("experts ").split(", ")] for b in blocks if b["removed"]
    }


class _NeverPicked(TorchFunctionMode):
    """Whatever a router's weight is multiplied with: the logits of `removed` become minus infinity."""

    def __init__(self, routers: Mapping[int, Sequence[int]]) -> None:
        self._removed = routers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and id(args[1]) in self._removed:
            result[..., self._removed[id(args[1])]] = float("-inf")
        return result


@contextmanager
def without_experts(model: Any, removed: Mapping[int, Sequence[int]]) -> Iterator[None]:
    routers: dict[int, Sequence[int]] = {}
    for block, experts in removed.items():
        for name, module in model.model.layers[block].named_modules():
            if name.rpartition(".")[2] in ("gate", "router") and hasattr(module, "weight"):
                routers[id(module.weight)] = experts
                if hasattr(module, "e_score_correction_bias"):
                    module.e_score_correction_bias[list(experts)] = -1e9
    with _NeverPicked(routers):
        yield


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_output_is_the_dense_model_that_never_picks_them(
    kind: str, models: dict[str, Path], outputs: dict[str, Path], loaded: dict[str, Loaded]
) -> None:
    loaded[kind].is_whole()
    removed = removed_experts(report_of(outputs[kind]))
    assert removed
    model = load_plain(models[kind])
    whole = model(input_ids=token_ids(), use_cache=False).logits
    with without_experts(model, removed):
        logits = model(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(loaded[kind].logits, logits, rtol=1e-4, atol=1e-5)
    assert float((whole - logits).abs().max()) > 1e-3


@torch.no_grad()
def naive_scores(model: Any, ids: torch.Tensor, block: int, score: str) -> list[float]:
    """Token by token and expert by expert, from what the experts were called with."""
    module: Any = next(iter(reference_experts.experts_of(model.model.layers[block]).values()))
    calls: list[tuple[torch.Tensor, ...]] = []
    hook = module.register_forward_pre_hook(lambda _module, args: calls.append(args))
    model(input_ids=ids, use_cache=False)
    hook.remove()
    return reference_experts.removal_scores(module, calls, score)


@pytest.mark.parametrize(
    ("kind", "score"),
    [("mixtral", "reap"), ("mixtral", "frequency"), ("gpt_oss", "man"), ("olmoe", "msan"), ("deepseek_v3", "reap")],
)
def test_scores_are_the_papers(
    kind: str, score: str, models: dict[str, Path], tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    arguments = ["-m", "experts", "-s", "0.5", "-o", f"score={score}", "--calibration", tokens_file, "-q"]
    assert command("prune", models[kind], tmp_path / "out", *arguments).code == 0
    report = report_of(tmp_path / "out")
    wanted = naive_scores(load_plain(models[kind]), token_ids(), 1, score)
    found = report["structure"]["blocks"][1]["scores"]
    assert [found[f"expert {n}"] for n in range(len(wanted))] == pytest.approx(wanted, rel=1e-4)
    groups = 2 if kind == "deepseek_v3" else 1
    kept = choose(torch.tensor(wanted), len(wanted) // 2, groups)
    assert removed_experts(report)[1] == [n for n in range(len(wanted)) if n not in kept]


def test_the_report_counts_experts_bytes_and_work(models: dict[str, Path], outputs: dict[str, Path]) -> None:
    structure = report_of(outputs["olmoe"])["structure"]
    assert (structure["units_before"], structure["units_after"]) == (24, 18)
    assert structure["asked"] == "25 % of the 8 experts of every mixture removed, which leaves 6 after rounding"
    assert structure["after"]["bytes"] == sum(f.stat().st_size for f in outputs["olmoe"].glob("*.safetensors"))
    router = 3 * 2 * 32
    assert structure["before"]["macs_per_token"] - structure["after"]["macs_per_token"] == router
    config = json.loads((outputs["olmoe"] / "config.json").read_text())
    assert config["num_experts"] == 6


def test_every_group_loses_the_same_number() -> None:
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert choose(scores, 4, 1) == [0, 1, 2, 3]
    assert choose(scores, 4, 2) == [0, 1, 6, 7]
    assert choose(torch.zeros(4), 2, 1) == [0, 1]
    assert [keep_count(share, 8, 1) for share in (0.01, 0.25, 0.5, 0.99)] == [7, 6, 4, 1]
    assert keep_count(0.25, 16, 4) == 12


def test_what_cannot_stay_is_refused(
    models: dict[str, Path], llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    def message(model: Path, *options: str) -> str:
        return refused(command, model, tmp_path / "out", "-m", "experts", *options)

    assert "has no experts" in message(llama)
    text = message(models["mixtral"], "-s", "0.9")
    assert "leaves 1 of 4 experts, but every token is sent to 2, for which at least 2 must stay" in text
    assert "no multiple of 2" in message(models["deepseek_v3"], "-o", "keep=5")
    assert "at least 4 must stay" in message(models["deepseek_v3"], "-o", "keep=2")
    assert "removes none of the 4 experts" in message(models["mixtral"], "-o", "keep=4")
    assert "exclude each other" in message(models["mixtral"], "-o", "keep=3", "-s", "0.5")
    assert "--target is for methods that make weights sparse" in message(models["mixtral"], "--target", "dense")


def test_lots_are_drawn_without_text_and_by_seed(models: dict[str, Path], tmp_path: Path, command: RunCommand) -> None:
    def drawn(name: str, seed: int) -> dict[int, list[int]]:
        arguments = ["-m", "experts", "-o", "score=random", "-o", "keep=5", "--seed", seed, "-q"]
        assert command("prune", models["olmoe"], tmp_path / name, *arguments).code == 0
        return removed_experts(report_of(tmp_path / name))

    first = drawn("a", 0)
    assert first == drawn("b", 0)
    assert first != drawn("c", 1)
    assert report_of(tmp_path / "a")["calibration"] is None


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
def test_a_run_goes_on_after_a_kill(
    kind: str,
    models: dict[str, Path],
    outputs: dict[str, Path],
    tokens_file: Path,
    tmp_path: Path,
    command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["-m", "experts", "-s", SHARES.get(kind, "0.25"), "--calibration", tokens_file, "-q"]
    write = OutputFolder.write_block

    def stop(self: OutputFolder, block: int, *rest: Any) -> None:
        if block == 1:
            raise KeyboardInterrupt
        write(self, block, *rest)

    monkeypatch.setattr(OutputFolder, "write_block", stop)
    assert command("prune", models[kind], tmp_path / "out", *arguments).code == 130
    monkeypatch.undo()
    monkeypatch.setattr("prune_cli.structured.moe.choose.measure_experts", None)
    assert command("prune", models[kind], tmp_path / "out", *arguments, "--resume").code == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(outputs[kind])


def test_several_ratios_cost_one_pass(
    models: dict[str, Path],
    outputs: dict[str, Path],
    tokens_file: Path,
    tmp_path: Path,
    command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["-m", "experts", "--calibration", tokens_file, "-q"]
    kept = tmp_path / "sums.safetensors"
    first = command("prune", models["olmoe"], tmp_path / "a", *arguments, "-s", "0.5", "--save-statistics", kept)
    assert first.code == 0, first.stderr
    monkeypatch.setattr("prune_cli.structured.moe.choose.measure_experts", None)
    again = command("prune", models["olmoe"], tmp_path / "b", *arguments, "-s", "0.25", "--statistics", kept)
    assert again.code == 0, again.stderr
    assert folder_bytes(tmp_path / "b") == folder_bytes(outputs["olmoe"])
    monkeypatch.undo()
    other = command("prune", models["mixtral"], tmp_path / "c", *arguments, "--statistics", kept)
    assert other.code == 2
    assert "was made with other inputs than these: model.safetensors" in " ".join(other.stderr.split())


def test_a_dry_run_tells_the_sizes(
    models: dict[str, Path], outputs: dict[str, Path], tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    arguments = ["-m", "experts", "--calibration", tokens_file, "--dry-run", "--json"]
    told = command("prune", models["gpt_oss"], tmp_path / "out", *arguments).json
    structure = report_of(outputs["gpt_oss"])["structure"]
    assert told["after"] == structure["after"]
    assert told["forward_passes"] == 1.0
