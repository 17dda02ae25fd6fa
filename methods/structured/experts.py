"""Experts: of every mixture the same number goes, those whose outputs say least for the tokens sent to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from methods._torch import torch
from methods.structured._method import StructuredMethod

# Sums over the tokens sent to each expert, (experts,) in float64: their number, ||f(x)||, its square, and g ||f(x)||.
SUMS = ("tokens", "norm", "squared_norm", "gated_norm")


@dataclass(frozen=True)
class Options:
    """`keep` in place of --sparsity."""

    score: Literal["reap", "man", "msan", "frequency", "random"] = field(
        default="reap",
        metadata={
            "help": "the mean over an expert's tokens of gate x output norm (reap), of the norm (man), of its square "
            "(msan); how many tokens it gets (frequency); random"
        },
    )
    keep: int | None = field(
        default=None, metadata={"help": "how many experts each mixture keeps, in place of --sparsity", "least": 1}
    )
    keep_list: str | None = field(
        default=None,
        metadata={
            "help": "a file with the experts that stay in each layer, as save_keep_list writes it; no text is read"
        },
    )
    save_keep_list: str | None = field(
        default=None,
        metadata={
            "help": "a file for runtimes that read which experts stay: .jsonl (a line a layer, best first) or .json "
            "(k, layers, keep, and the ranking of all)"
        },
    )
    after: Literal["nothing", "refit", "merge", "router"] = field(
        default="nothing",
        metadata={
            "help": "what makes up for the experts that go, where it helps on held-out samples: the last layers of "
            "those that stay are fitted by least squares (refit), those that go are averaged into their likes (merge), "
            "the router's rows are trained (router)"
        },
    )

    @property
    def measures(self) -> bool:
        """Whether a text tells which experts stay."""
        return self.score != "random" and self.keep_list is None


def expert_sums(outputs: torch.Tensor, gates: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(4,) in `dtype`: one batch's `SUMS` of one expert, from its outputs (tokens, hidden) and its gates (tokens,)."""
    norms = torch.linalg.vector_norm(outputs.float(), dim=-1).to(dtype)
    sums = norms.sum(), norms.square().sum(), (gates.to(dtype) * norms).sum()
    return torch.stack([torch.full_like(sums[0], len(norms)), *sums])


def scores(sums: Mapping[str, torch.Tensor], score: str, generator: torch.Generator) -> torch.Tensor:
    """(experts,): higher for experts to keep. One that no token was sent to has the lowest."""
    tokens = sums["tokens"]
    if score == "random":
        return torch.rand(len(tokens), generator=generator, dtype=torch.float64)
    return _SCORES[score](sums, tokens.clamp_min(1))


_SCORES: dict[str, Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "reap": lambda sums, tokens: sums["gated_norm"] / tokens,
    "man": lambda sums, tokens: sums["norm"] / tokens,
    "msan": lambda sums, tokens: sums["squared_norm"] / tokens,
    "frequency": lambda sums, _: sums["tokens"],
}


def choose(values: torch.Tensor, keep: int, groups: int) -> list[int]:
    """The experts to keep, in order: the same number of each of `groups` equal runs; of equal ones the earlier."""
    per_group = values.view(groups, -1)
    order = torch.argsort(per_group, dim=1, descending=True, stable=True)[:, : keep // groups]
    first = torch.arange(groups)[:, None] * per_group.shape[1]
    return sorted((order + first).flatten().tolist())


def spread(values: Mapping[int, torch.Tensor], total: int, fewest: Mapping[int, int], groups: int) -> dict[int, int]:
    """How many experts each mixture keeps, by their (experts,) scores over its mean: `total` in all.

    Each keeps its `fewest`, and of each of `groups` as many; of equally good ones those of the earlier mixture stay.
    """
    rest: list[tuple[float, int, int]] = []
    for at, (mixture, scored) in enumerate(values.items()):
        best = (scored / scored.mean().clamp_min(1e-30)).view(groups, -1).sort(dim=1, descending=True).values.mean(0)
        rest += [(-float(each), at, mixture) for each in best[fewest[mixture] // groups :]]
    counts = dict(fewest)
    for _, _, mixture in sorted(rest)[: (total - sum(fewest.values())) // groups]:
        counts[mixture] += groups
    return counts


def keep_count(sparsity: float, experts: int, groups: int) -> int:
    """How many experts a share to remove leaves: the same of each group, rounded; some go and some stay."""
    size = experts // groups
    return groups * min(max(size - int(sparsity * size + 0.5), 1), size - 1)


def _needs_text(options: Options) -> bool:
    return options.measures or options.after != "nothing"


METHOD = StructuredMethod(
    summary="removes whole experts of every mixture: less memory and disk at the same work per token",
    paper="Lasby et al., REAP, arXiv:2510.13999 (reap); MAN and MSAN, arXiv:2606.15716 (man, msan)",
    cost="one forward pass of the calibration text, in which each expert's outputs are computed once more",
    needs=("outputs of the experts and their gates",),
    unit="experts",
    options=Options,
    needs_text=_needs_text,
)
