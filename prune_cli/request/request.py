"""What was asked for, frozen and checked before any work. No torch here, so that a wrong option answers at once."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from methods.structured import load_structured, structured_names
from prune_cli.errors import RequestError
from prune_cli.request.allocation import FILE, STRATEGIES, check_allocation
from prune_cli.request.options import parse_options
from prune_cli.request.pipeline import Pipeline, make_pipeline
from prune_cli.request.sizes import parse_size

DEFAULT_SPARSITY = 0.5
DEFAULT_SAMPLES = 128
DEFAULT_SEQ_LEN = 2048
DEFAULT_SOURCE = "builtin"
_MOST = 2**31 - 1
_MOST_COPIES = 64
_MOST_NEW = 4096
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,4})?")
_PATTERN = re.compile(r"(\d{1,6}):(\d{1,6})")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CalibrateBy = Literal["sublayer", "block"]
Target = Literal["pruned", "dense"]
Format = Literal["dense", "sparse"]
Packed = Literal["keep", "bf16"]


@dataclass(frozen=True)
class PruneRequest:
    """Everything that a run was asked for. None means that the user did not say. See `prune-cli prune --help`.

    `config` names the file with options that nothing else said; it was read already.
    `inputs` maps weight files, "calibration tokens" and the like to the sha256 that a report or recipe has of them.
    """

    model: str
    out: Path
    method: str = "wanda"
    sparsity: float | None = field(default=None, metadata={"schema": {"minimum": 0, "exclusiveMaximum": 1}})
    pattern: str | None = field(default=None, metadata={"schema": {"pattern": "^[0-9]+:[0-9]+$"}})
    refine: str | None = None
    reconstruct: bool = False
    match_blocks: bool = False
    allocate: str = "uniform"
    options: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    calibration: str | None = None
    samples: int | None = field(default=None, metadata={"schema": {"minimum": 1}})
    seq_len: int | None = field(default=None, metadata={"schema": {"minimum": 2}})
    seed: int = field(default=0, metadata={"schema": {"minimum": 0}})
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | Literal["auto"] = field(default="auto", metadata={"schema": {"minimum": 1}})
    limit_memory: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    calibrate_by: CalibrateBy = "sublayer"
    target: Target = "pruned"
    self_calibration: int | Literal["auto"] = field(default=0, metadata={"schema": {"minimum": 0}})
    eval: str | None = None
    eval_windows: int | Literal["all"] | None = field(default=None, metadata={"schema": {"minimum": 1}})
    generate: int | None = field(default=None, metadata={"schema": {"minimum": 1}})
    statistics: str | None = None
    save_statistics: str | None = None
    compare_calibration: str | None = None
    format: Format = "dense"
    self_contained: bool = False
    packed: Packed | None = None
    text_only: bool = False
    resume: bool = False
    overwrite: bool = False
    allow_unsupported: bool = False
    drop_extra_heads: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    allow_changed_inputs: bool = False
    config: str | None = None

    def check(self) -> None:
        """Raise RequestError for anything that can be told wrong without the model."""
        pipeline = None if self.is_structured else self.pipeline()
        if pipeline is None:
            self.structured_options()
            check_structured(self)
        if self.sparsity is not None and self.pattern is not None:
            raise RequestError("--sparsity and --pattern exclude each other: a pattern fixes the sparsity itself.")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise RequestError(
                f"--sparsity is {self.sparsity:g}, but must be at least 0 and below 1 (0.5 prunes half)."
            )
        if self.pattern is not None:
            split_pattern(self.pattern)
        check_counts(self.samples, self.seq_len, self.batch_size)
        check_eval_windows(self.eval_windows)
        if self.limit_memory is not None:
            parse_size("--limit-memory", self.limit_memory)
        if self.generate is not None and not 1 <= self.generate <= _MOST_NEW:
            raise RequestError(f"--generate is {self.generate}, but must be 1 to {_MOST_NEW} tokens.")
        if self.eval_windows is not None and self.eval is None:
            raise RequestError(
                "--eval-windows says how much of --eval is measured: add --eval SOURCE, or leave it out."
            )
        check_device(self.device)
        if self.dtype not in typing.get_args(Dtype):
            raise RequestError(f"--dtype is {self.dtype!r}: choose one of {', '.join(typing.get_args(Dtype))}.")
        if self.calibrate_by not in typing.get_args(CalibrateBy):
            raise RequestError(f"--calibrate-by is {self.calibrate_by!r}: choose sublayer or block.")
        check_format(self.format, self_contained=self.self_contained)
        if self.packed not in (None, *typing.get_args(Packed)):
            raise RequestError(f"--packed is {self.packed!r}: choose keep or bf16.")
        if self.packed == "keep" and self.format == "sparse":
            raise RequestError("--packed keep writes codes, which --format sparse cannot store: use --packed bf16.")
        if pipeline is not None:
            if self.drop_extra_heads:
                raise RequestError(
                    "--drop-extra-heads is for methods that remove whole units "
                    f"({', '.join(structured_names())}), and {self.method} keeps every tensor: leave it out."
                )
            self._check_target(pipeline)
            self._check_self_calibration(pipeline)
            self._check_allocation()
            if self.statistics is not None or self.save_statistics is not None:
                raise RequestError(
                    "--statistics and --save-statistics are for methods that see the whole model before they decide "
                    f"({', '.join(structured_names())}), and {self.method} decides layer by layer: leave them out."
                )
        if self.compare_calibration is not None and self.method != "experts":
            raise RequestError(f"--compare-calibration is for --method experts, not {self.method}: leave it out.")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"--seed is {self.seed}, but must be between 0 and 2**63 - 1.")

    @property
    def is_structured(self) -> bool:
        """Whether the output is a smaller dense model, not one of sparse weights."""
        return self.method in structured_names()

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is read: something needs it, or it was named."""
        if self.calibration is not None:
            return True
        if self.is_structured:
            return load_structured(self.method).needs_text(self.structured_options())
        allocation_reads = self.allocation in STRATEGIES and STRATEGIES[self.allocation].needs_text
        return bool(self.pipeline().needs) or self.match_blocks or allocation_reads

    def structured_options(self) -> Any:
        """The frozen options of a structured method; raises RequestError for those that do not exist."""
        return parse_options(f"the method {self.method}", load_structured(self.method).options, self.options)

    def pipeline(self) -> Pipeline:
        """The method and the steps after it; raises RequestError for names and options that do not exist."""
        own = {key: value for key, value in self.options.items() if not self._of_allocation(key)}
        return make_pipeline(self.method, self.refine, reconstruct=self.reconstruct, options=own)

    @property
    def allocation(self) -> str:
        """The strategy, or file:PATH; `auto` spreads wherever there is something to spread."""
        if self.allocate != "auto":
            return self.allocate
        return "uniform" if self.pattern is not None or self.sparsity == 0 else "sensitivity"

    def allocation_options(self) -> Any:
        """The frozen options of --allocate; raises RequestError for names and options that do not exist."""
        own = {key.partition(".")[2]: value for key, value in self.options.items() if self._of_allocation(key)}
        return check_allocation(self.allocation, own)

    def _of_allocation(self, key: str) -> bool:
        return "." in key and key.partition(".")[0] == self.allocation

    def _check_allocation(self) -> None:
        self.allocation_options()
        if self.allocation != "uniform" and self.pattern is not None:
            raise RequestError(
                f"--allocate {self.allocate} does not go with --pattern {self.pattern}, where every tensor gives the "
                "same: use --sparsity."
            )
        if self.allocate.startswith(FILE) and self.sparsity is not None:
            raise RequestError("--sparsity and --allocate file: exclude each other: the file says how much each gives.")
        if self.allocate in STRATEGIES and self.sparsity == 0 and self.allocation != "uniform":
            raise RequestError(f"--allocate {self.allocate} has nothing to spread at --sparsity 0.")

    def _check_target(self, pipeline: Pipeline) -> None:
        if self.target not in typing.get_args(Target):
            raise RequestError(f"--target is {self.target!r}: choose pruned or dense.")
        if self.target == "dense" and not pipeline.follows_targets:
            raise RequestError(
                f"--target dense is for what works towards outputs, and {pipeline} looks at scores alone: "
                "leave it out, add --reconstruct, or use --method admm or sparsegpt."
            )
        if self.target == "dense" and self.calibrate_by == "block":
            raise RequestError("--target dense needs --calibrate-by sublayer: the two streams stop at every layer.")

    def _check_self_calibration(self, pipeline: Pipeline) -> None:
        asked = self.self_calibration
        if asked != "auto" and not 0 <= asked <= _MOST_COPIES:
            raise RequestError(f"--self-calibration is {asked}, but must be 0 to {_MOST_COPIES}, or auto.")
        if self.self_calibration and not pipeline.needs:
            raise RequestError(f"--self-calibration makes calibration text, and {pipeline} needs none: leave it out.")


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


def check_eval_windows(windows: int | Literal["all"] | None) -> None:
    if isinstance(windows, int) and not 1 <= windows <= _MOST:
        raise RequestError(f"--eval-windows is {windows}, but must be 1 to {_MOST}, or all.")


def check_format(name: str, *, self_contained: bool) -> None:
    if name not in typing.get_args(Format):
        raise RequestError(f"--format is {name!r}: choose dense or sparse.")
    if self_contained and name != "sparse":
        raise RequestError("--self-contained is for --format sparse: dense files need no loader.")


def check_device(device: str) -> None:
    if not _DEVICE.fullmatch(device):
        raise RequestError(f"--device is {device!r}: choose auto, cpu, cuda, cuda:N or mps.")


def request_as_json(request: PruneRequest) -> dict[str, Any]:
    """Every field, as JSON has it."""
    return {
        **asdict(request),
        "out": str(request.out),
        "include": list(request.include),
        "exclude": list(request.exclude),
    }


def check_even(request: PruneRequest) -> None:
    """Raise RequestError for experts whose number would differ by layer in a checkpoint."""
    if request.method == "experts" and request.allocate != "uniform":
        raise RequestError(
            f"--allocate {request.allocate} keeps another number of experts in each layer, but config.json has one "
            "number for all, so such a checkpoint loads nowhere: add --keep-list-only, which writes the list alone."
        )


def check_list_only(request: PruneRequest) -> None:
    """Raise RequestError for what --keep-list-only, which writes no model, cannot do."""
    if request.method != "experts":
        raise RequestError(f"--keep-list-only is for --method experts, not {request.method}: leave it out.")
    given = {
        "--eval": request.eval,
        "--generate": request.generate,
        "--compare-calibration": request.compare_calibration,
    }
    for option, value in given.items():
        if value is not None:
            raise RequestError(f"{option} is for a run that writes a model, not for --keep-list-only: leave it out.")
    after = request.structured_options().after
    if after != "nothing":
        raise RequestError(
            f"--keep-list-only writes no weights that could make up for experts: leave -o after={after} out."
        )
    listed = request.options.get("save_keep_list")
    if listed is None and request.out.suffix not in (".json", ".jsonl"):
        raise RequestError(
            f"With --keep-list-only OUT is the list, and {request.out} does not end in .jsonl (a line a layer) or "
            ".json (one object): call it so, or add -o save_keep_list=FILE."
        )


def check_structured(request: PruneRequest) -> None:
    """Raise RequestError for what only sparse weights have."""
    method = request.method
    explicit = {
        "--pattern": request.pattern is not None,
        "--refine": request.refine is not None,
        "--reconstruct": request.reconstruct,
        "--match-blocks": request.match_blocks,
        "--allocate": request.allocate != "uniform" and (method, request.allocate) != ("experts", "global"),
        "--target": request.target != "pruned",
        "--calibrate-by": request.calibrate_by != "sublayer",
        "--self-calibration": request.self_calibration != 0,
        "--include": bool(request.include),
        "--exclude": bool(request.exclude),
        "--preset": request.preset is not None,
        "--format sparse": request.format == "sparse",
    }
    for option, given in explicit.items():
        if given:
            raise RequestError(
                f"{option} is for methods that make weights sparse, and {method} removes whole units: leave it out "
                f"(prune-cli methods {method} lists what {method} takes)."
            )
