"""Train a small mixture of experts from scratch, with the tokenizer and the text of `examples/demo-model`.

    python examples/train_demo_moe.py OUT --minutes 6

A Mixtral of 2 M parameters: 16 experts in each of three blocks, of which every token uses two. It serves to compare the
scores of `--method experts` (benchmarks/expert_quality.py); it is too large for what it can do to be kept.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from train_demo_model import WINDOW, all_tokens, train
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from calibration.builtin_python import python_documents

# How much unequal use of the experts of a block costs, in nats for each unit of the measure of Fedus et al.,
# arXiv:2101.03961, equation 4 (1 if equal).
BALANCE = 0.1
# Small, so that a few minutes have many steps.
BATCH = 8
TOKENIZER = Path(__file__).parent / "demo-model"


def new_model(vocabulary: int) -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=16,
            num_experts_per_tok=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def balanced_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """With a term that has each block use its experts about equally often, as published models are trained."""
    output = model(input_ids=batch, labels=batch, use_cache=False, output_router_logits=True)
    uneven = [unevenness(logits, model.config.num_experts_per_tok) for logits in output.router_logits]
    return output.loss + BALANCE * sum(uneven) / len(uneven)


def unevenness(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Of `logits` (tokens, experts): experts x the sum over them of share of the tokens x mean probability."""
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(top_k).indices, 1 / top_k)
    return logits.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=6)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokens = all_tokens(tokenizer, list(python_documents("train")))
    model = new_model(len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    train(model, tokens, arguments.minutes, balanced_loss, BATCH)
    model.bfloat16().save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
