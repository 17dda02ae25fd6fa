"""`prune-cli inspect`: counts against naive ones, the patterns it finds and those it does not, and what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prune_cli.checks.inspection import find_pattern, inspect_model, part_of
from tests import reference
from tests.conftest import RunCommand
from tests.tiny import save_gpt2_without_prefix, save_tiny

# --- counts -------------------------------------------------------------------------------------------------------


def _stored(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    return {
        name: (path.name, tensor) for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


def _zeros(tensor: torch.Tensor) -> int:
    return sum(1 for value in tensor.flatten().tolist() if value == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_count_is_what_lies_on_the_disk(dtype: torch.dtype, tmp_path: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "model", "llama-untied", dtype=dtype)
    out = tmp_path / "out"
    assert command("prune", model, out, "-m", "magnitude", "-s", 0.3, "-q").code == 0
    stored, found = _stored(out), inspect_model(str(out))
    assert [t.name for t in found.tensors] == list(dict.fromkeys(t.name for t in found.tensors))
    assert {t.name for t in found.tensors} == stored.keys()
    for tensor in found.tensors:
        file, values = stored[tensor.name]
        assert (tensor.file, tensor.shape, tensor.parameters) == (file, tuple(values.shape), values.numel())
        assert tensor.bytes == values.numel() * values.element_size()
        assert tensor.dtype == {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        assert tensor.zeros == _zeros(values)
        assert tensor.sparsity == _zeros(values) / values.numel()
    pruned = [tensor.sparsity for tensor in found.tensors if "_proj" in tensor.name]
    assert pruned == pytest.approx([0.3] * 21, abs=5e-3)


def test_minus_zero_is_a_zero_and_integers_are_not_counted(tmp_path: Path) -> None:
    tensors = {"h.0.w": torch.tensor([[-0.0, 0.0, 1.0]]), "ids": torch.zeros(3, dtype=torch.int64), "no": torch.ones(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = {tensor.name: tensor for tensor in inspect_model(str(tmp_path)).tensors}
    assert (found["h.0.w"].zeros, found["h.0.w"].sparsity) == (2, 2 / 3)
    assert (found["ids"].zeros, found["ids"].sparsity, found["ids"].dtype) == (None, None, "I64")
    assert (found["no"].zeros, found["no"].sparsity) == (0, None)


# Of each kind: where its embeddings, its head and its final norm are.
PARTS = {
    "gpt2": ({"transformer.wte.weight", "transformer.wpe.weight"}, set(), "transformer.ln_f.weight"),
    "gpt2-without-prefix": ({"wte.weight", "wpe.weight"}, set(), "ln_f.weight"),
    "llama-untied": ({"model.embed_tokens.weight"}, {"lm_head.weight"}, "model.norm.weight"),
    "llama-tied": ({"model.embed_tokens.weight"}, set(), "model.norm.weight"),
    "opt": (
        {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
        set(),
        "model.decoder.final_layer_norm.weight",
    ),
    "gpt_neox": ({"gpt_neox.embed_in.weight"}, {"embed_out.weight"}, "gpt_neox.final_layer_norm.weight"),
    "bloom": ({"transformer.word_embeddings.weight"}, set(), "transformer.ln_f.weight"),
    "mpt": ({"transformer.wte.weight"}, set(), "transformer.norm_f.weight"),
    "gptj": ({"transformer.wte.weight"}, {"lm_head.weight", "lm_head.bias"}, "transformer.ln_f.weight"),
    "mamba": ({"backbone.embeddings.weight"}, set(), "backbone.norm_f.weight"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_totals_of_embeddings_blocks_and_head(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_gpt2_without_prefix(folder) if kind == "gpt2-without-prefix" else save_tiny(folder, kind)
    embeddings, head, norm = PARTS[kind]
    stored = {name: tensor for name, (_, tensor) in _stored(folder).items()}
    assert {name for name in stored if part_of(name) == "embeddings"} == embeddings
    assert {name for name in stored if part_of(name) == "head"} == head
    assert part_of(norm) == "other"
    totals = {total.part: total for total in inspect_model(str(folder)).totals}
    assert list(totals)[-1] == "all"
    for part, total in totals.items():
        tensors = [tensor for name, tensor in stored.items() if part in ("all", part_of(name))]
        assert total.tensors == len(tensors) > 0
        assert total.parameters == sum(tensor.numel() for tensor in tensors)
        assert total.bytes == sum(tensor.nbytes for tensor in tensors)
        assert total.zeros == sum(_zeros(tensor) for tensor in tensors)
        assert total.sparsity == total.zeros / total.parameters
    assert totals["blocks"].parameters > totals["all"].parameters / 3


# --- patterns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        *(("llama-untied", pattern) for pattern in ("2:4", "4:8", "1:4", "1:2", "3:16")),
        *(("gpt2", pattern) for pattern in ("2:4", "3:4", "7:8", "8:16")),
    ],
)
def test_the_pattern_of_a_pruned_model_is_found(kind: str, pattern: str, tmp_path: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "model", kind)
    run = command("prune", model, tmp_path / "out", "-m", "magnitude", "--pattern", pattern, "--json")
    assert run.code == 0
    pruned = {tensor["name"] for tensor in run.json["tensors"] if tensor["action"] == "pruned"}
    axis = 0 if kind == "gpt2" else 1
    for tensor in inspect_model(str(tmp_path / "out")).tensors:
        expected = (pattern, axis) if tensor.name in pruned else (None, None)
        assert (tensor.pattern, tensor.axis) == expected, tensor.name


@pytest.mark.parametrize(
    ("method", "sparsity"),
    [("magnitude", 0.25), ("magnitude", 0.5), ("magnitude", 0.9), ("random", 0.5), ("random", 0.7), ("random", 0.75)],
)
def test_no_pattern_is_found_in_unstructured_zeros(
    method: str, sparsity: float, llama: Path, tmp_path: Path, command: RunCommand
) -> None:
    assert command("prune", llama, tmp_path / "out", "-m", method, "-s", sparsity, "-q").code == 0
    assert {tensor.pattern for tensor in inspect_model(str(tmp_path / "out")).tensors} == {None}


def _random_mask(rows: int, columns: int, sparsity: float, seed: int) -> torch.Tensor:
    """Nonzero places, each chance its own."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) >= sparsity


@settings(max_examples=200, deadline=None, database=None)
@given(
    rows=st.integers(8, 40),
    columns=st.sampled_from([16, 24, 32, 48]),
    sparsity=st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9, 0.97]),
    seed=st.integers(0, 2**31),
)
def test_small_unstructured_matrices_have_no_pattern(rows: int, columns: int, sparsity: float, seed: int) -> None:
    assert find_pattern(_random_mask(rows, columns, sparsity, seed)) == (None, None)


@settings(max_examples=200, deadline=None, database=None)
@given(
    rows=st.integers(4, 24),
    groups=st.integers(8, 12),
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 8), (8, 16), (2, 3), (3, 5), (10, 32)]),
    seed=st.integers(0, 2**31),
    columns_first=st.booleans(),
)
def test_what_is_found_holds_in_every_group(
    rows: int, groups: int, nm: tuple[int, int], seed: int, columns_first: bool
) -> None:
    """Another pattern than the one made may hold by chance too; whatever is named must be true and as tight."""
    keep, of = nm
    scores = torch.rand(rows, groups * of, generator=torch.Generator().manual_seed(seed))
    mask = reference.keep_n_of_m(scores, keep, of)
    pattern, axis = find_pattern(mask.T if columns_first else mask)
    assert pattern is not None
    most, size = map(int, pattern.split(":"))
    assert size <= of
    assert most * of == keep * size or axis == (1 if columns_first else 0)
    along = mask if axis == (0 if columns_first else 1) else mask.T
    assert all(sum(group) <= most for group in _groups(along, size))


def _groups(matrix: torch.Tensor, size: int) -> Iterator[list[bool]]:
    for row in matrix.tolist():
        yield from (row[start : start + size] for start in range(0, len(row), size))


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(4, 8), torch.ones(4, 8), torch.zeros(0, 8), torch.zeros(8, 0), torch.eye(3)],
    ids=["zeros", "ones", "no rows", "no columns", "odd"],
)
def test_shapes_in_which_there_is_nothing_to_find(mask: torch.Tensor) -> None:
    assert find_pattern(mask.bool()) == (None, None)


# --- the command --------------------------------------------------------------------------------------------------


def test_json_is_the_python_result(llama: Path, command: RunCommand) -> None:
    outcome = command("inspect", llama, "--json")
    assert outcome.code == 0
    assert outcome.stderr == ""
    assert outcome.json == json.loads(json.dumps(asdict(inspect_model(str(llama)))))
    assert outcome.json["revision"] is None
    assert outcome.json["files"] == sorted(path.name for path in llama.glob("*.safetensors"))


def test_the_table_names_every_part(llama: Path, command: RunCommand) -> None:
    outcome = command("inspect", llama)
    assert outcome.code == 0
    for word in ("embeddings", "blocks", "head", "all", "lm_head.weight", "model.layers.2.mlp.up_proj.weight"):
        assert word in outcome.stdout


def test_names_are_printed_as_they_are(tmp_path: Path, command: RunCommand) -> None:
    """Rich would take what stands in brackets for its own markup."""
    folder = tmp_path / "odd[" / "red]"
    folder.mkdir(parents=True)
    save_file({"h.0.w[bold]": torch.ones(2, 2), "h.0.w[/i]": torch.ones(2, 2)}, folder / "model.safetensors")
    outcome = command("inspect", folder)
    assert outcome.code == 0
    assert "h.0.w[bold]" in outcome.stdout
    assert "h.0.w[/i]" in outcome.stdout
    assert "[/red]" in "".join(outcome.stdout.split())


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path, command: RunCommand) -> None:
    outcome = command("inspect", tmp_path, "--json")
    assert outcome.code == 2
    assert outcome.json["exit_code"] == 2
    assert "has neither model.safetensors nor" in outcome.json["error"]


def test_a_wrong_name_is_told_without_importing_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom prune_cli.errors import RequestError\nfrom prune_cli.checks.inspection import inspect_model\n"
        f"try:\n    inspect_model({str(tmp_path)!r})\nexcept RequestError:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_it_needs_no_transformers(llama: Path) -> None:
    code = (
        "import sys\nfrom prune_cli.cli import app\n"
        f"app(['inspect', {str(llama)!r}, '--json'], standalone_mode=False)\n"
        "print(sorted(name for name in ('transformers', 'datasets', 'huggingface_hub') if name in sys.modules), "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert json.loads(done.stdout)["model"] == str(llama)
