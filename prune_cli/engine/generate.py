"""Greedy continuations of a few prompts, streamed block by block: the whole model need not fit, a token is a pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.batch import Batch
from calibration.opening import find_opening
from calibration.token_set import tokenise
from prune_cli.engine.evaluate import before_the_head
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.run_context import Run
from prune_cli.errors import RequestError
from prune_cli.model.architecture import load_tokenizer
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.packed.output import exact_values
from prune_cli.progress import Progress
from prune_cli.report.continuations import Continuation

GENERATING = "Continuing prompts"
PROMPTS = ("The history of the city begins with", "def add(a, b):\n", "In the morning the children")
QUESTIONS = ("Why is the sky blue? Answer in two sentences.", "Write a Python function that reverses a list.")


@dataclass(frozen=True)
class Prompts:
    """`texts` as they were given, `ids` as a model sees them: in its chat template where it has one."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    tokenizer: Any

    def told(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def read_prompts(folder: Path, texts: Sequence[str], *, trust_remote_code: bool) -> Prompts:
    """`texts`, or some of our own where there are none. Raises RequestError for a model without a tokenizer."""
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if tokenizer is None:
        raise RequestError(f"{folder} has no tokenizer, and prompts are text: add its tokenizer files.")
    chats = bool(tokenizer.chat_template)
    chosen = tuple(texts) or (QUESTIONS if chats else PROMPTS)
    return Prompts(chosen, tuple(tuple(_encoded(tokenizer, text, chats)) for text in chosen), tokenizer)


def _encoded(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if chat:
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=True, return_dict=False)
    ids = [*find_opening(tokenizer).ids, *tokenise(tokenizer, text, special_tokens=False)]
    if not ids:
        raise RequestError("A prompt is empty: give some words.")
    return ids


def continue_both(
    model: StreamedModel, dense: StreamedModel, prompts: Prompts, tokens: int, progress: Progress
) -> tuple[Continuation, ...]:
    """At most `tokens` new ones of each model. Raises RequestError where a prompt leaves no room for them."""
    limit = model.position_limit
    longest = max(map(len, prompts.ids)) + tokens
    if limit is not None and longest > limit:
        raise RequestError(f"A prompt and {tokens} tokens more are {longest}, but the model takes {limit} positions.")
    stop = {prompts.tokenizer.eos_token_id} - {None}
    progress.stage(GENERATING, tokens * (len(model.blocks) + len(dense.blocks)))
    theirs, ours = (greedy(each, prompts.ids, tokens, stop, progress) for each in (dense, model))
    return tuple(
        Continuation(text, prompts.told(other), prompts.told(mine), _same(mine, other), len(other))
        for text, mine, other in zip(prompts.texts, ours, theirs, strict=True)
    )


@torch.no_grad()
def greedy(
    model: StreamedModel, prompts: Sequence[Sequence[int]], tokens: int, stop: Collection[int], progress: Progress
) -> list[list[int]]:
    """The new ids after each prompt: always the likeliest, until one of `stop` or `tokens` of them."""
    new: list[list[int]] = [[] for _ in prompts]
    for _ in range(tokens):
        going = [row for row, ids in enumerate(new) if not (ids and ids[-1] in stop)]
        if not going:
            break
        batch = padded([[*prompts[row], *new[row]] for row in going])
        with before_the_head(model, [batch], progress) as stream:
            for output in stream.finish():
                for place, row in enumerate(going):
                    new[row].append(int(output.logits[place, batch.lengths[place] - 1].argmax()))
    return [[each for each in ids if each not in stop] for ids in new]


def continued(run: Run[OpenModel], config: Any | None = None) -> tuple[Continuation, ...]:
    """What --generate asks for, of the dense model and of what was written, whose model `config` describes."""
    plan, tokens = run.plan, run.request.generate
    if tokens is None:
        return ()
    prompts = read_prompts(plan.source.folder, (), trust_remote_code=plan.trust_remote_code)
    dense = plan.with_checkpoint(exact_values(plan.checkpoint))
    return continue_both(plan.with_checkpoint(run.output.checkpoint(), config), dense, prompts, tokens, run.progress)


def padded(rows: Sequence[Sequence[int]]) -> Batch:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    return Batch(ids, mask)[0 : len(rows)]


def _same(mine: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(mine, other, strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))
