"""Write calibration tokens of a real text for a model, as `wanda_speed.py` takes them.

    python benchmarks/make_tokens.py examples/demo-model /tmp/demo-tokens.safetensors --samples 64 --seq-len 256

The same seed and options make the same tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file

from calibration.sources import parse_source
from calibration.tokens import load_tokens
from prune_cli.model.architecture import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="the file to write")
    parser.add_argument("--source", default="builtin", help="as for prune-cli prune --calibration")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokens = load_tokens(
        parse_source(arguments.source),
        load_tokenizer(arguments.model, False),
        role="calibration",
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        default_samples=arguments.samples,
        default_seq_len=arguments.seq_len,
        seed=arguments.seed,
    )
    save_file({"input_ids": tokens.ids}, arguments.tokens)
    print(f"{arguments.tokens}: {tokens.ids.shape[0]} x {tokens.ids.shape[1]} tokens of {arguments.source}")


if __name__ == "__main__":
    main()
