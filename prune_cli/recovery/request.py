"""What `prune-cli recover` was asked for, checked before any work. No torch here."""

from __future__ import annotations

import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from prune_cli.errors import RequestError
from prune_cli.request.request import Dtype, check_counts, check_device, check_eval_windows

How = Literal["block"]
EPOCHS, RATE = 2, 0.02
_MOST_EPOCHS, _MOST_COPIES = 1000, 64


@dataclass(frozen=True)
class RecoverRequest:
    """Everything that a recovery was asked for, as `prune-cli recover --help` has it; None is what was not said."""

    model: str
    out: Path
    teacher: str
    how: How = "block"
    epochs: int = field(default=EPOCHS, metadata={"schema": {"minimum": 1}})
    rate: float = field(default=RATE, metadata={"schema": {"exclusiveMinimum": 0}})
    calibration: str | None = None
    samples: int | None = field(default=None, metadata={"schema": {"minimum": 2}})
    seq_len: int | None = field(default=None, metadata={"schema": {"minimum": 2}})
    seed: int = field(default=0, metadata={"schema": {"minimum": 0}})
    self_calibration: int = field(default=2, metadata={"schema": {"minimum": 0}})
    eval: str | None = None
    eval_windows: int | Literal["all"] | None = field(default=None, metadata={"schema": {"minimum": 1}})
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | Literal["auto"] = field(default="auto", metadata={"schema": {"minimum": 1}})
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    revision: str | None = None

    def check(self) -> None:
        """Raise RequestError for anything that can be told wrong without the models."""
        if self.how not in typing.get_args(How):
            raise RequestError(f"--how is {self.how!r}: choose one of {', '.join(typing.get_args(How))}.")
        if not 1 <= self.epochs <= _MOST_EPOCHS:
            raise RequestError(f"--epochs is {self.epochs}, but must be 1 to {_MOST_EPOCHS}.")
        if not 0 < self.rate <= 1:
            raise RequestError(f"--rate is {self.rate:g}, but must be above 0 and at most 1 (0.02 is two percent).")
        if not 0 <= self.self_calibration <= _MOST_COPIES:
            raise RequestError(f"--self-calibration is {self.self_calibration}, but must be 0 to {_MOST_COPIES}.")
        if self.samples is not None and self.samples < 2:
            raise RequestError(f"--samples is {self.samples}, but must be at least 2: one sample is held out.")
        check_counts(self.samples, self.seq_len, self.batch_size)
        check_eval_windows(self.eval_windows)
        check_device(self.device)
        if self.dtype not in typing.get_args(Dtype):
            raise RequestError(f"--dtype is {self.dtype!r}: choose one of {', '.join(typing.get_args(Dtype))}.")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"--seed is {self.seed}, but must be between 0 and 2**63 - 1.")


def recover_request_as_json(request: RecoverRequest) -> dict[str, Any]:
    """Every field, as JSON has it."""
    return {**asdict(request), "out": str(request.out)}
