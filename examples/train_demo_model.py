"""Train the small Llama in `examples/demo-model` from scratch on the text every Python installation carries.

    python examples/train_demo_model.py examples/demo-model --minutes 40

The training split of `builtin:python` is used; its test split stays unseen, for `prune-cli eval --data builtin:python`.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calibration.builtin_python import python_documents

VOCABULARY = 2048
WINDOW = 256
BATCH = 32
PEAK_LEARNING_RATE = 3e-3
WARMUP_FRACTION = 0.05


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def all_tokens(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """One long line of tokens; every document begins with the token that also ends a text."""
    encoded = tokenizer(documents, add_special_tokens=False).input_ids
    tokens = torch.tensor(list(itertools.chain.from_iterable([0, *ids] for ids in encoded)))
    print(f"{len(documents)} documents, {len(tokens)} tokens")
    return tokens


def new_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def learning_rate(progress: float) -> float:
    if progress < WARMUP_FRACTION:
        return PEAK_LEARNING_RATE * progress / WARMUP_FRACTION
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def next_token_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


def train(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    minutes: float,
    loss_of: Callable[[Any, torch.Tensor], torch.Tensor] = next_token_loss,
    batch_size: int = BATCH,
) -> None:
    """Progress is measured in time, so that the schedule always ends where the budget does."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    start = time.monotonic()
    for step in itertools.count():
        progress = (time.monotonic() - start) / (60 * minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        begins = torch.randint(0, len(tokens) - WINDOW, (batch_size,))
        batch = torch.stack([tokens[b : b + WINDOW] for b in begins.tolist()])
        loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}  {100 * progress:.0f} %  loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=40)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    documents = list(python_documents("train"))
    tokenizer = train_tokenizer(documents)
    tokens = all_tokens(tokenizer, documents)
    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    train(model, tokens, arguments.minutes)
    model.bfloat16().save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
