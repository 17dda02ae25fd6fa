"""What `prune-cli bench` was asked for, frozen and checked before any work. No torch here."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from prune_cli.errors import RequestError
from prune_cli.request.request import Dtype, check_device

_MOST = 2**24


@dataclass(frozen=True)
class BenchRequest:
    """What `prune-cli bench` was asked for. None means that the user did not say."""

    model: str
    against: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int = 32
    batch_size: int = 1
    repeats: int = 5
    seed: int = 0
    device: str = "auto"
    dtype: Dtype = "auto"
    revision: str | None = None
    against_revision: str | None = None
    trust_remote_code: bool = False
    verbose: bool = False

    def check(self) -> None:
        """Raise RequestError for anything that can be told wrong without the models."""
        limits = {
            "--prompt-tokens": (self.prompt_tokens, 1),
            "--new-tokens": (self.new_tokens, 2),
            "--batch-size": (self.batch_size, 1),
            "--repeats": (self.repeats, 1),
        }
        for option, (value, least) in limits.items():
            if value is not None and not least <= value <= _MOST:
                raise RequestError(f"{option} is {value}, but must be between {least} and {_MOST}.")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"--seed is {self.seed}, but must be between 0 and 2**63 - 1.")
        if self.dtype not in typing.get_args(Dtype):
            raise RequestError(f"--dtype is {self.dtype!r}: choose one of {', '.join(typing.get_args(Dtype))}.")
        if self.against is None and self.against_revision is not None:
            raise RequestError("--against-revision is of the model that --against names: give both.")
        check_device(self.device)
