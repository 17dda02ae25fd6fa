"""What `prune-cli eval` and `prune-cli compare` were asked for, frozen and checked before any work. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prune_cli.errors import RequestError
from prune_cli.request.request import Dtype, check_counts, check_device, check_eval_windows
from prune_cli.request.sizes import parse_size


@dataclass(frozen=True)
class EvaluationRequest:
    """What `prune-cli eval` was asked for. None means that the user did not say; `eval_windows` are then all."""

    model: str
    data: str
    against: str | None = None
    eval_windows: int | None = None
    seq_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | Literal["auto"] = "auto"
    limit_memory: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    allow_changed_inputs: bool = False

    def check(self) -> None:
        """Raise RequestError for anything that can be told wrong without the models."""
        check_counts(None, self.seq_len, self.batch_size)
        if self.limit_memory is not None:
            parse_size("--limit-memory", self.limit_memory)
        check_eval_windows(self.eval_windows)
        check_device(self.device)


@dataclass(frozen=True)
class TasksRequest:
    """What `prune-cli eval --tasks` was asked for; `limit` is the number of examples of each task, None for all."""

    model: str
    tasks: tuple[str, ...]
    against: str | None = None
    include_path: Path | None = None
    limit: int | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | Literal["auto"] = "auto"
    trust_remote_code: bool = False
    revision: str | None = None

    def check(self) -> None:
        """Raise RequestError for anything that can be told wrong without the models."""
        check_counts(None, None, self.batch_size)
        check_device(self.device)
        if not self.tasks or not all(self.tasks):
            raise RequestError("--tasks names no task: give names with commas between, as arc_easy,hellaswag.")
        if self.limit is not None and self.limit < 1:
            raise RequestError(f"--limit is {self.limit}, but must be at least 1.")
        if self.include_path is not None and not self.include_path.is_dir():
            raise RequestError(f"--include-path is {self.include_path}, which is no folder: give one with task YAMLs.")


@dataclass(frozen=True)
class CompareRequest:
    """What was asked for; without `prompts` some of our own are continued."""

    model: str
    dense: str
    prompts: tuple[str, ...] = ()
    tokens: int = 32
    device: str = "auto"
    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    allow_changed_inputs: bool = False

    def check(self) -> None:
        """Raise RequestError for anything that can be told wrong without the models."""
        if not 1 <= self.tokens <= 4096:
            raise RequestError(f"--tokens is {self.tokens}, but must be 1 to 4096.")
        check_device(self.device)


def read_prompt_file(path: Path) -> tuple[str, ...]:
    """A prompt a line, empty lines left out. Raises RequestError for a file that cannot be read or holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompts {path} cannot be read ({error}): give a text file, a prompt a line.") from error
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise RequestError(f"--prompts {path} holds no line: give a prompt a line.")
    return prompts
