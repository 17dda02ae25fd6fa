"""-o uniform=false: blocks of their own sizes, by CFSP's coarse rule; they load where prune_cli is imported."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.structured._sizes import coarse_shares, proportional_sizes
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.open_model import open_model
from prune_cli.request.request import PruneRequest
from prune_cli.structured.units import GroupName
from prune_cli.structured.width.verify_coupling import verified_group
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.forked import run_program
from tests.test_resume import _stop_when
from tests.tiny import save_tiny

LOAD = """
import sys
{first}
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
ids, *folders = sys.argv[1:]
ids = load_file(ids)["input_ids"]
torch.set_grad_enabled(False)
for folder in folders:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:
        print(folder, error)
        continue
    logits = model(ids).logits
    assert model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape[1] > 4
    model.save_pretrained(folder + ".saved")
    again = AutoModelForCausalLM.from_pretrained(folder + ".saved", dtype=torch.float32).eval()
    assert torch.equal(again(ids).logits, logits)
    save_file({{"logits": logits.contiguous()}}, folder + ".logits")
"""


def loaded_in_new_process(folder: Path, first: str, outs: Iterable[Path]) -> str:
    """What LOAD printed; `first` is run before anything is imported."""
    done = run_program(LOAD.format(first=first), "ids.safetensors", *outs, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    save_file({"input_ids": token_ids(samples=24)}, path)
    return path


def options(text: Path, sparsity: float = 0.5) -> list[object]:
    return ["-m", "width", "-s", sparsity, "-o", "uniform=false", "-o", "multiple=4", "--calibration", text, "-q"]


def test_sizes_follow_the_angles_and_load_with_prune_cli_only(tmp_path: Path, text: Path, command: RunCommand) -> None:
    outs = {kind: tmp_path / kind / "out" for kind in ("llama-untied", "gpt2")}
    for kind, out in outs.items():
        assert command("prune", save_tiny(tmp_path / kind / "model", kind), out, *options(text)).code == 0
        report = json.loads((out / "prune_report.json").read_text())
        shapes = json.loads((out / "config.json").read_text())["quantization_config"]["shapes"]
        reads = "mlp.c_proj.weight" if kind == "gpt2" else "mlp.down_proj.weight"
        sizes = [shape[0 if kind == "gpt2" else 1] for name, shape in shapes.items() if name.endswith(reads)]
        assert sum(sizes) == 3 * 32
        assert len(set(sizes)) > 1
        assert next(iter(report["structure"]["removed_shares"].values())) == pytest.approx(0.5)

    save_file({"input_ids": token_ids(seed=3, samples=2)}, tmp_path / "ids.safetensors")
    alone = loaded_in_new_process(tmp_path, "", outs.values())
    assert all(f"{out} " in alone for out in outs.values()), "shapes that do not fit must not load"
    assert alone.count("mismatched_sizes") == 2
    root = Path(__file__).parent.parent
    with_us = f"sys.path.insert(0, {str(root)!r}); import prune_cli"
    assert loaded_in_new_process(tmp_path, with_us, outs.values()) == ""
    ids = token_ids(seed=3, samples=2)
    for out in outs.values():
        evaluated = command("eval", out, "--data", tmp_path / "ids.safetensors", "--json", "-q", "--dtype", "float32")
        logits = load_file(f"{out}.logits")["logits"]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert evaluated.json["evaluation"]["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_the_sizes_do_not_depend_on_the_number_of_tokens() -> None:
    """Twice the same text has the same angles; the authors' constant would change with it."""
    angles = torch.tensor([0.2, 0.11, 0.14, 0.3])
    once = proportional_sizes(coarse_shares(angles), [64] * 4, 128, 1)
    assert once == proportional_sizes(coarse_shares(angles * 1e3), [64] * 4, 128, 1)


def test_a_stopped_run_continues_to_the_same_bytes(
    llama: Path, tmp_path: Path, text: Path, command: RunCommand
) -> None:
    assert command("prune", llama, tmp_path / "expected", *options(text)).code == 0
    with pytest.MonkeyPatch.context() as patch:
        _stop_when(patch, 1, half_written=False)
        assert command("prune", llama, tmp_path / "out", *options(text)).code == 1
    assert command("prune", llama, tmp_path / "out", *options(text), "--resume").code == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")
    pruned_again = command("prune", tmp_path / "out", tmp_path / "sparse", "-m", "magnitude", "-q")
    assert pruned_again.code == 0, pruned_again.stderr
    assert Checkpoint.open(tmp_path / "sparse").entries.keys() == Checkpoint.open(llama).entries.keys()


def test_saved_angles_serve_other_shares(llama: Path, tmp_path: Path, text: Path, command: RunCommand) -> None:
    saved, statistics = tmp_path / "angles.safetensors", ("--statistics", tmp_path / "angles.safetensors")
    assert command("prune", llama, tmp_path / "a", *options(text), "--save-statistics", saved).code == 0
    half = options(text, 0.25)
    assert command("prune", llama, tmp_path / "expected", *half).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prune_cli.structured.hidden_states.measure_states", None)
        again = command("prune", llama, tmp_path / "b", *half, *statistics)
    assert again.code == 0, again.stderr
    assert folder_bytes(tmp_path / "b") == folder_bytes(tmp_path / "expected")

    save_file({"input_ids": token_ids(seed=7, samples=24)}, tmp_path / "other.safetensors")
    refusals = (
        (options(tmp_path / "other.safetensors"), "was made with other inputs than these: calibration tokens"),
        ([*options(text), "--dtype", "bfloat16"], "was measured with another dtype of the forward pass"),
        (["-m", "width", "--calibration", text], "have no use with -o uniform=true"),
        (["-m", "depth", "-o", "score=angular", "--calibration", text], "was measured with another method"),
    )
    for number, (arguments, told) in enumerate(refusals):
        refused = command("prune", llama, tmp_path / f"refused-{number}", *arguments, *statistics)
        assert refused.code == 2
        assert told in " ".join(refused.stderr.split())


@pytest.mark.parametrize("uniform", [True, False])
def test_a_dry_run_tells_the_sizes(uniform: bool, llama: Path, tmp_path: Path, text: Path, command: RunCommand) -> None:
    asked = [*options(text), "-o", f"uniform={str(uniform).lower()}", "-o", "parts=both"]
    plan = command("prune", llama, tmp_path / "out", *asked, "--dry-run", "--json").json
    assert not (tmp_path / "out").exists()
    assert command("prune", llama, tmp_path / "out", *asked).code == 0
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    structure = report["structure"]
    assert ("needs import prune_cli" in report["gain"]) == (not uniform)
    if uniform:
        assert plan["gain"] == report["gain"]
    assert plan["before"] == structure["before"]
    assert plan["forward_passes"] == 2.0 + (not uniform)
    if not uniform:
        assert plan["after"].pop("bytes") == pytest.approx(structure["after"].pop("bytes"), abs=64)
    assert plan["after"] == structure["after"]


@pytest.mark.parametrize(
    ("kind", "part"), [("phi3", "mlp"), ("opt", "mlp"), ("qwen2", "heads"), ("gemma2", "heads"), ("gpt_neox", "mlp")]
)
def test_other_architectures_compute_the_same_with_listed_shapes(kind: str, part: GroupName, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", kind, shards=False, tokenizer=False)
    model = open_model(PruneRequest(model=str(folder), out=tmp_path / "out"))
    assert verified_group(model, part, 1 if part == "heads" else 32, with_overrides=True).consumers
