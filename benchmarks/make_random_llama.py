"""Write a random-weight Llama for timings: 162 M parameters, several shards, with 16 x 512 tokens beside it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=13)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 11 // 4,
            num_hidden_layers=arguments.blocks,
            num_attention_heads=arguments.hidden // 64,
            num_key_value_heads=arguments.hidden // 128,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    if arguments.dtype == "bfloat16":
        model.bfloat16()
    model.save_pretrained(arguments.folder, max_shard_size="200MB")
    # Other tools refuse a model without a tokenizer, even when the tokens are given.
    for path in (Path(__file__).parent.parent / "examples" / "demo-model").glob("tokenizer*"):
        shutil.copy(path, arguments.folder)
    ids = torch.randint(0, VOCABULARY, (16, 512))
    save_file({"input_ids": ids}, arguments.folder / "tokens.safetensors")


if __name__ == "__main__":
    main()
