"""What a student is trained for: the teacher's predictions, and its hidden states.

Of the teacher's predictions the k most probable tokens are known, and what all others have together, as one bucket; the
divergence between two such coarse distributions is at most that of the whole ones. SquareHead is the layer-wise term of
Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models" (arXiv:2310.06927).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Logarithm of a probability that is none: masked entries of a vocabulary have minus infinity.
_LEAST = -1e4


def most_probable(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` most probable of the vocabulary (..., vocabulary), and `log_masses` of them."""
    ids = logits.topk(k, dim=-1).indices
    return ids, log_masses(logits, ids)


def log_masses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(..., k + 1): log-probabilities of the tokens `ids` (..., k), and behind them that of all others together.

    There must be others.
    """
    logits = logits.float()
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    found = torch.cat([logits.gather(-1, ids), others], -1) - logits.logsumexp(-1, keepdim=True)
    return found.clamp_min(_LEAST)


def divergence(logits: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """(...): KL(p || q) in nats at every position; `log_p` are the teacher's `log_masses` of `ids`, perhaps rounded."""
    log_p = log_p.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_masses(logits, ids))).sum(-1)


def square_head(states: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over layers of MSE(student, teacher) / MSE(teacher, 0); (tokens, hidden) each."""
    terms = [
        (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp_min(1e-12)
        for ours, theirs in zip(states, targets, strict=True)
    ]
    return torch.stack(terms).sum()
