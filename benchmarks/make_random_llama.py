"""Write a random-weight Llama for timings, several shards, with its calibration tokens beside it.

    python benchmarks/make_random_llama.py /tmp/llama

The defaults make 162 M parameters and `tokens.safetensors` with 16 x 512 random tokens. The same seed and options
make the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 8192
TOKENS = "tokens.safetensors"
DEMO_MODEL = Path(__file__).parent.parent / "examples" / "demo-model"


def config_of(hidden: int, blocks: int, length: int) -> LlamaConfig:
    """Heads of 64, two of them to a key-value head, an MLP of 2.75 times the hidden size, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=max(2048, length),
        tie_word_embeddings=True,
    )


def write_model(folder: Path, config: LlamaConfig, dtype: str, shard_size: str) -> int:
    """Write config, shards and tokenizer; returns the number of parameters."""
    model = LlamaForCausalLM(config)
    if dtype == "bfloat16":
        model.bfloat16()
    model.save_pretrained(folder, max_shard_size=shard_size)
    # Other tools refuse a model without a tokenizer, even when the tokens are given.
    for path in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(path, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=13)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shard-size", default="200MB", help="largest shard")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.hidden <= 0 or arguments.hidden % 128:
        parser.error(f"--hidden is {arguments.hidden}: give a multiple of 128.")
    return arguments


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    config = config_of(arguments.hidden, arguments.blocks, arguments.seq_len)
    parameters = write_model(arguments.folder, config, arguments.dtype, arguments.shard_size)
    ids = torch.randint(0, VOCABULARY, (arguments.samples, arguments.seq_len))
    save_file({"input_ids": ids}, arguments.folder / TOKENS)
    shards = len(list(arguments.folder.glob("model*.safetensors")))
    print(f"{arguments.folder}: {parameters / 1e6:.1f} M parameters in {shards} shard(s), {ids.numel()} tokens")


if __name__ == "__main__":
    main()
