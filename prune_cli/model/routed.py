"""Which tokens a batch sends to which experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routed:
    """A batch that waits at the experts of a block: `hidden` (tokens, in), `chosen` (tokens, k) experts of each.

    `gates` (tokens, k) are what the experts' outputs are multiplied by. `every_token`: `hidden` has all tokens in their
    order, whatever their experts. Padding is no token.
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    gates: torch.Tensor
    every_token: bool

    @classmethod
    def of_all(
        cls, hidden: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor, mask: torch.Tensor | None
    ) -> Routed:
        """Of all tokens; `mask` (samples, length) is False where the batch is padded."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        chosen, gates = chosen.reshape(len(hidden), -1), gates.reshape(len(hidden), -1)
        if mask is not None:
            # Numbers, for a mask on the device would have the host wait for their count.
            real = mask.flatten().nonzero().flatten().to(hidden.device)
            hidden, chosen, gates = hidden[real], chosen[real], gates[real]
        return cls(hidden, chosen, gates, every_token=True)

    def gates_of(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """(tokens,): the gates of `expert` for tokens that it gets."""
        return torch.where(self.chosen == expert, self.gates, 0)[tokens].sum(-1)

    def all_tokens(self) -> torch.Tensor:
        return torch.arange(len(self.hidden), device=self.hidden.device)
