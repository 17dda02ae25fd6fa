"""A packed mixture of experts beside its bf16 twin: the peak memory of Wanda, and what removing experts writes.

    python benchmarks/packed.py
    python benchmarks/packed.py --blocks 8 --experts 64 --hidden 2048

A random Qwen3-MoE in FP8 by blocks; the twin holds the same values in bf16. Peak memory is RssAnon, read from outside
the process; bytes are those that it hands to the system (wchar of /proc/PID/io), beside `cp` of the output. Seconds are
those of a run that draws experts by lot, less those of its dry run (start, the model on meta), beside `cp` and `sync`
of what stays. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig
from watch import watch

from prune_cli.model.open_checkpoint import open_checkpoint

_TILE = 128
_CODES = 0x7F  # the first of the codes of E4M3 that is no number; the sign bit doubles them
_WRITTEN = """
import sys
from prune_cli.cli import app
try: app()
finally: print(open("/proc/self/io").read(), file=sys.stderr)
"""


def make(folder: Path, arguments: argparse.Namespace) -> Path:
    """The packed model, a file for each block, and `tokens.safetensors`."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    hidden, inner, vocabulary = arguments.hidden, arguments.hidden // 2, 1024
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_hidden_layers=arguments.blocks,
        num_experts=arguments.experts,
        num_experts_per_tok=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )
    config.head_dim = 128
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [_TILE, _TILE]}
    config.save_pretrained(folder)

    def packed(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        codes = torch.randint(0, 2 * _CODES, (rows, columns), generator=random, dtype=torch.uint8)
        codes = torch.where(codes < _CODES, codes, codes - _CODES + 128)
        tiles = (-(-rows // _TILE), -(-columns // _TILE))
        scales = torch.rand(tiles, generator=random) * 2e-4
        return {f"{name}.weight": codes.view(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scales}

    weight_map: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], file: str) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for block in range(arguments.blocks):
        at, tensors = f"model.layers.{block}", {}
        for name, rows, columns in (("q", 1024, hidden), ("k", 256, hidden), ("v", 256, hidden), ("o", hidden, 1024)):
            tensors |= packed(f"{at}.self_attn.{name}_proj", rows, columns)
        for expert in range(arguments.experts):
            for name in ("gate", "up"):
                tensors |= packed(f"{at}.mlp.experts.{expert}.{name}_proj", inner, hidden)
            tensors |= packed(f"{at}.mlp.experts.{expert}.down_proj", hidden, inner)
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        norms |= {"self_attn.q_norm": 128, "self_attn.k_norm": 128}
        tensors |= {f"{at}.{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
        tensors[f"{at}.mlp.gate.weight"] = torch.randn(arguments.experts, hidden, generator=random).bfloat16()
        save(tensors, f"model-{block:05}.safetensors")
    outside = {name: torch.randn(vocabulary, hidden, generator=random).bfloat16() for name in ("a", "b")}
    save(
        {
            "model.embed_tokens.weight": outside["a"],
            "lm_head.weight": outside["b"],
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        },
        "model-outside.safetensors",
    )
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = torch.randint(0, vocabulary, (8, 256), generator=random)
    save_file({"input_ids": tokens}, folder.parent / "tokens.safetensors")
    return folder


def make_twin(packed: Path, folder: Path) -> Path:
    """The same values in bf16, in the same files."""
    folder.mkdir()
    checkpoint, weight_map = open_checkpoint(packed), {}
    for file in checkpoint.files:
        names = [name for name, entry in checkpoint.entries.items() if entry.file == file]
        save_file({name: checkpoint.read(name).bfloat16() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def written_by(*words: object) -> int:
    """The bytes that a `prune-cli` process hands to the system."""
    done = subprocess.run(
        [sys.executable, "-c", _WRITTEN, *map(str, words)], stderr=subprocess.PIPE, text=True, check=True
    )
    return int(next(line for line in done.stderr.splitlines() if line.startswith("wchar:")).split()[1])


def seconds_of_work(model: Path, out: Path) -> float:
    """Of removing half of the experts, measuring nothing: reading and checking all, hashing, writing, the report."""
    command = [sys.executable, "-m", "prune_cli", "prune", str(model), str(out), "-m", "experts", "-s", "0.5", "-q"]
    command += ["-o", "score=random"]
    dry = watch([*command, "--dry-run"]).seconds
    return watch(command).seconds - dry


def seconds_of_copy(folder: Path, target: Path) -> float:
    begun = time.monotonic()
    subprocess.run(["cp", "-r", str(folder), str(target)], check=True)
    subprocess.run(["sync", "-d", *map(str, target.glob("*.safetensors"))], check=True)
    return time.monotonic() - begun


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--scratch", type=Path, help="where models and outputs go; default: the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        root = Path(scratch)
        packed = make(root / "packed", arguments)
        twin, text = make_twin(packed, root / "twin"), ["--calibration", str(root / "tokens.safetensors")]
        peaks = {
            name: watch(
                [sys.executable, "-m", "prune_cli", "prune", str(model), str(root / f"{name}-out"), *text, "-q"]
            ).peak_bytes
            for name, model in (("FP8, --packed keep", packed), ("bf16 twin", twin))
        }
        out = root / "fewer"
        written = written_by("prune", packed, out, "-m", "experts", "-s", "0.5", *text, "-q")
        kept = bytes_in(out)
        work, copy = seconds_of_work(packed, root / "drawn"), seconds_of_copy(out, root / "copy")
        table = Table("", "MB, or seconds", "ratio")
        first, last = peaks.values()
        for name, peak in peaks.items():
            table.add_row(f"peak memory of wanda, {name}", f"{peak / 1e6:.0f}", f"{peak / last:.2f}")
        table.add_row("model, FP8", f"{bytes_in(packed) / 1e6:.0f}", "")
        table.add_row("half of the experts removed: the output, as cp would write it", f"{kept / 1e6:.0f}", "1.00")
        table.add_row("half of the experts removed: written", f"{written / 1e6:.0f}", f"{written / kept:.2f}")
        table.add_row("half of the experts removed, seconds: cp and sync of the output", f"{copy:.2f}", "1.00")
        table.add_row("half of the experts removed, seconds: beyond a dry run", f"{work:.2f}", f"{work / copy:.2f}")
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        print(f"peak packed / peak bf16: {first / last:.2f} (at most 1); written / copied: {written / kept:.2f} (1.2)")
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
