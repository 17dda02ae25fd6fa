"""What `prune-cli recover` was asked for, checked before any work. No torch here."""

from __future__ import annotations

import math
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from prune_cli.errors import RequestError
from prune_cli.request.request import Dtype, check_counts, check_device, check_eval_windows

How = Literal["block", "full", "lora", "router"]
Part = Literal["norms", "biases", "attention", "mlp", "routers"]
EPOCHS, RATE = 2, 0.02
# End to end, where nobody said.
_PASSES, _FULL_RATE, TOP_K, _LOOKS, _RANK = 4, 0.01, 50, 20, 16
# Only these train end to end, and only they take these options.
_END_TO_END = (
    "tokens",
    "train",
    "rank",
    "kl",
    "square_head",
    "next_token",
    "top_k",
    "store",
    "every",
    "gradient_checkpointing",
)
_MOST_EPOCHS, _MOST_COPIES = 1000, 64
_MOST = {"tokens": 10**15, "every": 10**9, "top_k": 10_000, "rank": 10_000}
_CHOICES = tuple(part for part in typing.get_args(Part) if part != "routers")


@dataclass(frozen=True)
class RecoverRequest:
    """Everything that a recovery was asked for, as `prune-cli recover --help` has it; None is what was not said."""

    model: str
    out: Path
    teacher: str
    how: How = "block"
    epochs: int | None = field(default=None, metadata={"schema": {"minimum": 1}})
    tokens: int | None = field(default=None, metadata={"schema": {"minimum": 1}})
    rate: float | None = field(default=None, metadata={"schema": {"exclusiveMinimum": 0}})
    train: str | None = None
    rank: int | None = field(default=None, metadata={"schema": {"minimum": 1}})
    kl: float | None = field(default=None, metadata={"schema": {"minimum": 0}})
    square_head: float | None = field(default=None, metadata={"schema": {"minimum": 0}})
    next_token: float | None = field(default=None, metadata={"schema": {"minimum": 0}})
    top_k: int | None = field(default=None, metadata={"schema": {"minimum": 1}})
    store: str | None = None
    every: int | None = field(default=None, metadata={"schema": {"minimum": 1}})
    gradient_checkpointing: bool = False
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
        if not 1 <= self.passes <= _MOST_EPOCHS:
            raise RequestError(f"--epochs is {self.epochs}, but must be 1 to {_MOST_EPOCHS}.")
        if not 0 < self.learning_rate <= 1:
            raise RequestError(f"--rate is {self.rate:g}, but must be above 0 and at most 1 (0.02 is two percent).")
        self._check_end_to_end()
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

    def _check_end_to_end(self) -> None:
        """Raise RequestError for options of an end-to-end training, one by one and together."""
        given = [name for name in _END_TO_END if (value := getattr(self, name)) is not None and value is not False]
        if given and not self.end_to_end:
            raise RequestError(
                f"{_option(given[0])} is for --how full, lora and router, not for --how block: leave it out."
            )
        if self.rank is not None and self.how != "lora":
            raise RequestError(f"--rank is for --how lora, not for --how {self.how}: leave it out.")
        if self.train is not None and self.how == "router":
            raise RequestError("--train is for --how full and lora: --how router trains routers alone.")
        wrong = [] if self.train in (None, "all") else [part for part in self.parts if part not in _CHOICES]
        if wrong:
            raise RequestError(f"--train has {wrong[0]!r}: choose of {', '.join(_CHOICES)}, or all.")
        if self.tokens is not None and self.epochs is not None:
            raise RequestError("--tokens and --epochs both say how long to train: give one of them.")
        for name in ("tokens", "every", "top_k", "rank"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST[name]:
                raise RequestError(f"{_option(name)} is {value}, but must be 1 to {_MOST[name]}.")
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise RequestError(f"{_option(name)} is {weight:g}, but a loss weighs 0 or more.")
        if not any(self.weights.values()):
            raise RequestError("--kl, --square-head and --next-token are all 0, so there is nothing to train for.")

    @property
    def end_to_end(self) -> bool:
        """Whether the whole model is trained at once."""
        return self.how != "block"

    @property
    def passes(self) -> int:
        """Times that the text is seen, where no number of tokens says otherwise."""
        return self.epochs if self.epochs is not None else _PASSES if self.end_to_end else EPOCHS

    @property
    def learning_rate(self) -> float:
        return self.rate if self.rate is not None else _FULL_RATE if self.end_to_end else RATE

    @property
    def parts(self) -> tuple[str, ...]:
        """What of the blocks is trained, as --train names it."""
        if self.how == "router":
            return ("routers",)
        return _CHOICES if self.train in (None, "all") else tuple(self.train.split(","))

    @property
    def low_rank(self) -> int:
        return _RANK if self.rank is None else self.rank

    @property
    def weights(self) -> dict[str, float]:
        """Of the three losses."""
        usual = {"kl": 1.0, "square_head": 0.0, "next_token": 0.0}
        return {name: weight if (given := getattr(self, name)) is None else given for name, weight in usual.items()}

    @property
    def known_tokens(self) -> int:
        """How many of the teacher's most probable tokens are kept of each position."""
        return TOP_K if self.top_k is None else self.top_k

    def looks_every(self, steps: int) -> int:
        """After how many of so many steps the held-out samples are looked at, and the state is saved."""
        return self.every if self.every is not None else max(1, steps // _LOOKS)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def recover_request_as_json(request: RecoverRequest) -> dict[str, Any]:
    """Every field, as JSON has it."""
    return {**asdict(request), "out": str(request.out)}
