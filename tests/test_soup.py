"""`prune-cli soup`: averages against a naive mean, zeros kept, everything else untouched, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prune_cli.checkpoint.file_names import partial_folder
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.errors import PruneError
from prune_cli.soup import run
from prune_cli.soup.average import average, is_sparse, same_bytes
from prune_cli.soup.report import SOUP_REPORT, soup_schema
from tests.broken import change_config, copy_of
from tests.conftest import RunCommand, folder_bytes
from tests.tiny import load_plain

SAME = "model.norm.weight"
SPARSE = "model.layers.1.mlp.up_proj.weight"


def _shards(folder: Path) -> dict[Path, dict[str, torch.Tensor]]:
    return {path: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in _shards(folder).values() for name, tensor in shard.items()}


def _change(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """Rewrite every tensor, as training would."""
    for path, tensors in _shards(folder).items():
        new = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
        save_file(new, path, metadata={"format": "pt"})
    return folder


def _retrained(source: Path, folder: Path, seed: int) -> Path:
    """Other values for what is not zero; the norm at the end stays as it was."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        return tensor if name == SAME else torch.where(tensor == 0, tensor, tensor + 0.1 * noise)

    return _change(copy_of(source, folder), change)


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with half of its linear layers' weights set to zero, in several shards."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name))
        return tensor * (torch.rand(tensor.shape, generator=generator) < 0.5) if "_proj" in name else tensor

    folder = copy_of(llama, tmp_path_factory.mktemp("pruned") / "model")
    return _change(folder, change)


@pytest.fixture(scope="module")
def three(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models retrained from one pruned checkpoint, its zeros held."""
    root = tmp_path_factory.mktemp("three")
    return [_retrained(pruned, root / f"seed-{seed}", seed) for seed in (1, 2, 3)]


def test_the_average_of_three_keeps_the_zeros(three: list[Path], tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    outcome = command("soup", *three, out, "--weights", "0.5,0.3,0.2", "--json", "-q")
    assert outcome.code == 0, outcome.stderr
    inputs, found = [_tensors(folder) for folder in three], _tensors(out)
    assert list(found) == list(inputs[0])
    for name, tensor in found.items():
        mean = sum(w * each[name].double() for w, each in zip((0.5, 0.3, 0.2), inputs, strict=True))
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
        assert torch.equal(tensor == 0, inputs[0][name] == 0)
        assert not torch.signbit(tensor[tensor == 0]).any()
    assert same_bytes(found[SAME], inputs[0][SAME])
    report = outcome.json
    assert report == json.loads((out / SOUP_REPORT).read_text())
    jsonschema.validate(report, soup_schema())
    assert [each["weight"] for each in report["inputs"]] == [0.5, 0.3, 0.2]
    linear = [tensor for name, tensor in found.items() if "_proj" in name]
    zeros = sum(int((tensor == 0).sum()) for tensor in linear)
    assert report["totals"]["sparse"] == len(linear) == 21
    assert report["totals"]["sparsity_of_sparse"] == zeros / sum(tensor.numel() for tensor in linear)
    assert [t["name"] for t in report["tensors"] if t["action"] == "identical"] == [SAME]
    # Loads, and everything but the weights is the first model's.
    load_plain(out)
    sides = {name: data for name, data in folder_bytes(three[0]).items() if not name.endswith(".safetensors")}
    assert {name: data for name, data in folder_bytes(out).items() if name in sides} == sides


def test_shares_are_equal_by_default_and_the_table_tells(
    three: list[Path], tmp_path: Path, command: RunCommand
) -> None:
    outcome = command("soup", *three[:2], tmp_path / "out")
    assert outcome.code == 0, outcome.stderr
    a, b, found = (_tensors(folder)[SPARSE] for folder in (*three[:2], tmp_path / "out"))
    torch.testing.assert_close(found, (a + b) / 2)
    assert "the soup" in outcome.stdout
    assert f"Written to {tmp_path / 'out'}" in outcome.stdout


def test_a_soup_of_copies_is_the_copy(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    outcome = command("soup", pruned, pruned, tmp_path / "out", "--json", "-q")
    assert outcome.json["totals"]["averaged"] == 0
    expected = folder_bytes(pruned)
    assert {name: data for name, data in folder_bytes(tmp_path / "out").items() if name != SOUP_REPORT} == expected


def test_dry_run_writes_nothing(three: list[Path], tmp_path: Path, command: RunCommand) -> None:
    outcome = command("soup", *three, tmp_path / "out", "--dry-run", "--json", "-q")
    assert outcome.code == 0, outcome.stderr
    jsonschema.validate(outcome.json, soup_schema())
    assert outcome.json["output"] is None
    assert list(tmp_path.iterdir()) == []
    assert "would be averaged" in command("soup", *three, tmp_path / "out", "--dry-run").stdout


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_mask(three: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One more weight of one map is zero, and another one is not."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name != SPARSE:
            return tensor
        tensor = tensor.clone()
        flat = tensor.view(-1)
        flat[int((flat == 0).nonzero()[0])] = 0.5
        flat[int((flat != 0).nonzero()[5])] = 0
        return tensor

    return _change(copy_of(three[1], tmp_path_factory.mktemp("other") / "model"), change)


def test_other_masks_are_refused_by_name(
    three: list[Path], other_mask: Path, tmp_path: Path, command: RunCommand
) -> None:
    refused = command("soup", three[0], other_mask, tmp_path / "out", "-q")
    assert refused.code == 2
    assert f"The zeros of {SPARSE} lie elsewhere" in refused.stderr
    assert "(2 weights)" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("masks", ["union", "intersection"])
def test_union_and_intersection(
    masks: str, three: list[Path], other_mask: Path, tmp_path: Path, command: RunCommand
) -> None:
    assert command("soup", three[0], other_mask, tmp_path / "out", "--masks", masks, "-q").code == 0
    a, b, found = (_tensors(folder)[SPARSE] for folder in (three[0], other_mask, tmp_path / "out"))
    keep = (a != 0) | (b != 0) if masks == "union" else (a != 0) & (b != 0)
    assert torch.equal(found != 0, keep)
    torch.testing.assert_close(found[keep], ((a + b) / 2)[keep])


_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3.0])


@given(
    st.lists(st.lists(_values, min_size=6, max_size=6), min_size=2, max_size=4),
    st.sampled_from(["union", "intersection"]),
)
def test_any_average_is_the_naive_one(rows: list[list[float]], masks: Any) -> None:
    tensors = [torch.tensor(row, dtype=torch.bfloat16).view(2, 3) for row in rows]
    share = 1 / len(rows)
    found = average("w", [lambda t=t: t for t in tensors], [share] * len(rows), masks, sparse=True)
    for place in range(6):
        values = [row[place] for row in rows]
        kept = masks == "union" or all(values)
        expected = torch.tensor(sum(share * value for value in values) if kept else 0.0).to(torch.bfloat16)
        assert float(found.view(-1)[place]) == pytest.approx(float(expected), rel=0.01, abs=1e-7)
    assert found.dtype == torch.bfloat16
    assert not torch.signbit(found[found == 0]).any()


def test_float64_is_averaged_in_float64() -> None:
    tensors = [torch.tensor([1.0 + 2**-40], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
    found = average("w", [lambda t=t: t for t in tensors], [0.5, 0.5], "same", sparse=False)
    assert float(found) == 1 + 2**-41


@pytest.mark.parametrize(("zeros", "expected"), [(0, False), (1, False), (2, True)])
def test_a_few_zeros_are_no_mask(zeros: int, expected: bool) -> None:
    matrix = torch.ones(10, 10)
    matrix.view(-1)[:zeros] = 0
    assert is_sparse(matrix) is expected
    assert not is_sparse(torch.zeros(8))
    assert not is_sparse(torch.zeros(0, 4))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "0.5"], "--weights has 1 numbers for 2 models"),
        (["--weights", "0.5,0.6"], "--weights add up to 1.1, but must add up to 1"),
        (["--weights", "1.5,-0.5"], "--weights must be above 0"),
        (["--weights", "nan,1"], "--weights must be above 0"),
        (["--weights", "half"], "--weights is 'half', but must be numbers"),
        (["--masks", "or"], "--masks is 'or': choose one of same, union, intersection"),
    ],
)
def test_what_cannot_be_asked(
    arguments: Sequence[str], words: str, three: list[Path], tmp_path: Path, command: RunCommand
) -> None:
    refused = command("soup", *three[:2], tmp_path / "out", *arguments)
    assert refused.code == 2
    assert words in refused.stderr


def test_one_model_is_no_soup(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    assert "at least two models before OUT" in command("soup", pruned, tmp_path / "out").stderr


def _set(name: str, value: float) -> Callable[[Path], object]:
    def change(each: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_fill(0, torch.tensor([0]), value) if each == name else tensor

    return lambda folder: _change(folder, change)


def _renamed(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model.norm", "model.last_norm"))
    for path, tensors in _shards(folder).items():
        save_file({n.replace("model.norm", "model.last_norm"): t for n, t in tensors.items()}, path)


DIFFER: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (lambda f: change_config(f, rms_norm_eps=1e-3), "other configs (rms_norm_eps: 1e-06 and 0.001)"),
    "quantised": (lambda f: change_config(f, quantization_config={"a": 1}), "stored quantised or packed"),
    "NaN": (_set(SPARSE, float("nan")), f"{SPARSE} of "),
    "infinite": (_set(SAME, float("inf")), "holds infinite values"),
    "names": (_renamed, "has model.norm.weight, which"),
    "dtype": (lambda f: _change(f, lambda _, t: t.bfloat16()), "is F32 [128, 32] in"),
    "shape": (
        lambda f: _change(f, lambda n, t: t[:-1] if n == "lm_head.weight" else t),
        "lm_head.weight is F32 [128, 32]",
    ),
}


@pytest.mark.parametrize("kind", DIFFER)
def test_models_that_do_not_go_together(kind: str, three: list[Path], tmp_path: Path, command: RunCommand) -> None:
    change, words = DIFFER[kind]
    other = copy_of(three[1], tmp_path / "other")
    change(other)
    refused = command("soup", three[0], other, tmp_path / "out", "-q")
    assert refused.code == 2
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not partial_folder(tmp_path / "out").exists()


def test_integers_must_be_equal(whole: Path, tmp_path: Path, command: RunCommand) -> None:
    folders = []
    for number in (1, 2):
        folder = copy_of(whole, tmp_path / str(number))
        tensors = load_file(folder / "model.safetensors") | {"steps": torch.tensor([number])}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    refused = command("soup", *folders, tmp_path / "out", "-q")
    assert "steps holds I64, which cannot be averaged, and differs" in refused.stderr
    assert command("soup", folders[0], folders[0], tmp_path / "out", "-q").code == 0


def test_another_tokenizer_is_told(three: list[Path], tmp_path: Path, command: RunCommand) -> None:
    other = copy_of(three[1], tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    result = command("soup", three[0], other, tmp_path / "out", "--json", "-q").json
    assert "tokenizer.json differs between" in result["warnings"][0]


# --- the folder ------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_when_told(three: list[Path], tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    shutil.copytree(three[2], out)
    before = folder_bytes(out)
    refused = command("soup", *three[:2], out, "-q")
    assert refused.code == 2
    assert "exists already" in refused.stderr
    assert folder_bytes(out) == before
    assert command("soup", *three[:2], out, "--overwrite", "-q").code == 0
    assert (out / SOUP_REPORT).exists()
    # Nor is the folder of any of the models the place to write to.
    assert "lie in each other" in command("soup", *three[:2], three[1], "--overwrite", "-q").stderr


def test_a_stopped_run_continues_to_the_same_bytes(
    three: list[Path], tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(run, "_GROUP_BYTES", 20_000)
    original = OutputFolder.write_block

    def write_block(self: OutputFolder, block: int, *rest: Any) -> None:
        if block == 3:
            raise PruneError("the plug was pulled")
        original(self, block, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "write_block", write_block)
        assert command("soup", *three, out, "-q").code == 1
    assert not out.exists()
    assert partial_folder(out).exists()
    refused = command("soup", *three[:2], out, "-q", "--resume")
    assert "was asked for something else (models, weights differ)" in refused.stderr
    written: list[int] = []

    def count(self: OutputFolder, block: int, *rest: Any) -> None:
        written.append(block)
        original(self, block, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "write_block", count)
        assert command("soup", *three, out, "-q", "--resume").code == 0
    assert written[0] in (2, 3)  # what waits to be written when a run ends may be lost
    assert command("soup", *three, tmp_path / "expected", "-q").code == 0
    expected = folder_bytes(tmp_path / "expected")
    found = folder_bytes(out)
    assert {n: d for n, d in found.items() if n != SOUP_REPORT} == {
        n: d for n, d in expected.items() if n != SOUP_REPORT
    }
