"""What was asked for, frozen and checked before any work. No torch here, so that a wrong option answers at once."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from methods import load_method, method_names
from methods._method import Method
from prune_cli.errors import RequestError

DEFAULT_SPARSITY = 0.5
DEFAULT_SAMPLES = 128
DEFAULT_SEQ_LEN = 2048
DEFAULT_SOURCE = "builtin"
_MOST = 2**31 - 1
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,4})?")
_PATTERN = re.compile(r"(\d{1,6}):(\d{1,6})")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CalibrateBy = Literal["sublayer", "block"]
Target = Literal["pruned", "dense"]


@dataclass(frozen=True)
class PruneRequest:
    """Everything that a run was asked for. None means that the user did not say. See `prune-cli prune --help`."""

    model: str
    out: Path
    method: str = "wanda"
    sparsity: float | None = None
    pattern: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | Literal["auto"] = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    calibrate_by: CalibrateBy = "sublayer"
    target: Target = "pruned"
    eval: str | None = None
    resume: bool = False
    overwrite: bool = False
    allow_unsupported: bool = False
    trust_remote_code: bool = False
    revision: str | None = None

    def check(self) -> None:
        """Raise RequestError for anything that can be told wrong without the model."""
        find_method(self.method)
        if self.sparsity is not None and self.pattern is not None:
            raise RequestError("--sparsity and --pattern exclude each other: a pattern fixes the sparsity itself.")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise RequestError(
                f"--sparsity is {self.sparsity:g}, but must be at least 0 and below 1 (0.5 prunes half)."
            )
        if self.pattern is not None:
            split_pattern(self.pattern)
        parse_options(self.method, self.options)
        check_counts(self.samples, self.seq_len, self.batch_size)
        check_device(self.device)
        if self.dtype not in typing.get_args(Dtype):
            raise RequestError(f"--dtype is {self.dtype!r}: choose one of {', '.join(typing.get_args(Dtype))}.")
        if self.calibrate_by not in typing.get_args(CalibrateBy):
            raise RequestError(f"--calibrate-by is {self.calibrate_by!r}: choose sublayer or block.")
        self._check_target()
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"--seed is {self.seed}, but must be between 0 and 2**63 - 1.")

    def _check_target(self) -> None:
        if self.target not in typing.get_args(Target):
            raise RequestError(f"--target is {self.target!r}: choose pruned or dense.")
        if self.target == "dense" and "gram" not in find_method(self.method).needs:
            raise RequestError(
                f"--target dense is for methods that solve for new weights, and {self.method} keeps them as they are: "
                "leave it out, or use --method admm or sparsegpt."
            )
        if self.target == "dense" and self.calibrate_by == "block":
            raise RequestError("--target dense needs --calibrate-by sublayer: the two streams stop at every map.")


def find_method(name: str) -> Method:
    """The method called `name`; raises RequestError with the names there are."""
    try:
        return load_method(name)
    except KeyError:
        raise RequestError(f"There is no method {name!r}: choose one of {', '.join(method_names())}.") from None


def split_pattern(text: str) -> tuple[int, int]:
    """'2:4' to (2, 4): N kept of M. Raises RequestError unless 0 < N < M."""
    match = _PATTERN.fullmatch(text)
    keep, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < keep < of:
        raise RequestError(f"--pattern is {text!r}, but must be N:M with 0 < N < M, as 2:4 (2 kept of every 4).")
    return keep, of


def check_counts(samples: int | None, seq_len: int | None, batch_size: int | Literal["auto"]) -> None:
    counts = {"--samples": (samples, 1), "--seq-len": (seq_len, 2), "--batch-size": (batch_size, 1)}
    for option, (value, least) in counts.items():
        if isinstance(value, int) and value < least:
            raise RequestError(f"{option} is {value}, but must be at least {least}.")
        if isinstance(value, int) and value > _MOST:
            raise RequestError(f"{option} is {value}, but must be at most {_MOST}.")


def check_device(device: str) -> None:
    if not _DEVICE.fullmatch(device):
        raise RequestError(f"--device is {device!r}: choose auto, cpu, cuda, cuda:N or mps.")


def parse_options(method: str, given: Mapping[str, Any]) -> Any:
    """The method's frozen options with `given` (texts or values) in place of defaults; raises RequestError."""
    options_type = find_method(method).options
    kinds = typing.get_type_hints(options_type)
    known = {item.name for item in dataclasses.fields(options_type)}
    for name in given:
        if name not in known:
            there = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise RequestError(f"The method {method} has no option {name!r}: {there}.")
    return options_type(**{name: _convert(method, name, value, kinds[name]) for name, value in given.items()})


def _convert(method: str, name: str, value: Any, kind: Any) -> Any:
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value in choices:
            return value
        wanted = "one of " + ", ".join(str(choice) for choice in choices)
    elif typing.get_origin(kind) is types.UnionType and types.NoneType in choices:
        return None if value in (None, "none") else _convert(method, name, value, choices[0])
    elif kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
        wanted = "true or false"
    else:
        try:
            return kind(value)
        except (TypeError, ValueError):
            wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
    raise RequestError(f"The option {name} of {method} is {value!r}, but must be {wanted}.")
