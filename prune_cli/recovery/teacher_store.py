"""What the teacher says of every token, computed once and kept in files: it is never in memory beside its student.

A store is a folder of safetensors, each with some windows: the most probable tokens of every position (`ids`), the
logarithms of their probabilities and of the rest (`log_p`), and hidden states behind some blocks (`state.N`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from calibration.batch import Batch
from methods._distillation import most_probable
from prune_cli.checkpoint.whole_file import NOT_WRITTEN, save_whole
from prune_cli.engine.activation_budget import GROUP_BYTES
from prune_cli.engine.evaluate import STATES_PER_TOKEN
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError, RequestError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress
from prune_cli.recovery.match_blocks import states_behind
from prune_cli.report.format import size

_KEY = "prune-cli teacher"
_VERSION = 1
_FILE_BYTES = 1 << 30
_LOG_P, _STATE = torch.float16, torch.bfloat16
_SUFFIX = ".safetensors"
_OURS = re.compile(r"\d{5,}(?P<partial>\.partial)?\.safetensors")
_SPARE_BYTES = 1 << 26

ASKING = "Asking the teacher"


@dataclass(frozen=True)
class Stored:
    """What is kept of each token; `behind` are the teacher's blocks whose hidden states are."""

    top_k: int
    vocabulary: int
    hidden: int
    behind: tuple[int, ...]

    @property
    def ids(self) -> torch.dtype:
        """The smallest that holds every token."""
        return torch.uint16 if self.vocabulary <= 1 << 16 else torch.int32

    @property
    def bytes_of_a_token(self) -> int:
        predictions = self.top_k * self.ids.itemsize + (self.top_k + 1) * _LOG_P.itemsize
        return predictions + len(self.behind) * self.hidden * _STATE.itemsize


class TeacherStore:
    """A finished store: what its teacher says of some windows, read when it is asked for."""

    def __init__(self, folder: Path, firsts: Sequence[int]) -> None:
        """`firsts` are the windows that the files begin with, and how many there are."""
        self._firsts = firsts
        self._files = [safe_open(folder / _name(number), framework="pt") for number in range(len(firsts) - 1)]

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """(windows, length, ...) of the windows `first` to `last`, exclusive."""
        parts = [
            file.get_slice(name)[max(first, begin) - begin : min(last, end) - begin]
            for file, (begin, end) in zip(self._files, pairwise(self._firsts), strict=True)
            if begin < last and first < end
        ]
        rows = torch.cat(parts)
        return rows.to(torch.int64) if name == "ids" else rows


@dataclass(frozen=True)
class StoreMaker:
    """Fills the store in `folder` for `teacher`; `identity` tells which teacher and text that is."""

    teacher: StreamedModel
    stored: Stored
    folder: Path
    identity: Mapping[str, Any]
    batch_size: int

    def make(self, windows: Batch, progress: Progress) -> TeacherStore:
        """What `windows` lack of it is computed. Raises RequestError for a folder of other files, or too full a disk,
        PruneError where it cannot be written.
        """
        firsts = self._firsts(windows)
        lacking = self._lacking(firsts, progress)
        if lacking:
            self._check_space(windows, progress)
            progress.stage(ASKING, len(lacking) * len(self.teacher.blocks))
        for number in lacking:
            self._write(number, self._ask(windows[firsts[number] : firsts[number + 1]], progress))
        return TeacherStore(self.folder, firsts)

    def _firsts(self, windows: Batch) -> list[int]:
        state = self.teacher.hidden_size * self.teacher.dtype.itemsize * STATES_PER_TOKEN
        fits = min(_FILE_BYTES // self.stored.bytes_of_a_token, GROUP_BYTES // state) // windows.length
        return [*range(0, len(windows), max(1, fits)), len(windows)]

    def _lacking(self, firsts: Sequence[int], progress: Progress) -> list[int]:
        """The files that are not there; those of another teacher or text go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        heads = {path: _head(path) for path in sorted(self.folder.iterdir())}
        foreign = [path.name for path, head in heads.items() if head is None]
        if foreign:
            raise RequestError(
                f"--store {self.folder} holds {foreign[0]}, which is no part of a store: choose another."
            )
        expected = {self.folder / _name(number): self._head(number) for number in range(len(firsts) - 1)}
        kept = {path for path, head in heads.items() if head == expected.get(path)}
        if heads and not kept:
            progress.say(f"The store in {self.folder} is of another teacher, text or choice: it is made anew.")
        for path in heads.keys() - kept:
            path.unlink()
        return [number for number, path in enumerate(expected) if path not in kept]

    def _head(self, number: int) -> dict[str, Any]:
        return json.loads(json.dumps({**self.identity, "version": _VERSION, "file": number}))

    def _check_space(self, windows: Batch, progress: Progress) -> None:
        each = self.stored.bytes_of_a_token
        needed, free = each * windows.ids.numel(), shutil.disk_usage(self.folder).free
        told = f"The teacher's answers take {each:,} bytes a token, {size(needed)} in {self.folder}"
        if free < needed + _SPARE_BYTES:
            raise RequestError(f"{told}, where {size(free)} are free: give a folder on another disk to --store.")
        progress.say(f"{told}.")

    @torch.no_grad()
    def _ask(self, windows: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        batches = windows.split(self.batch_size)
        made = self._empty(len(windows), windows.length)
        with Stream(self.teacher, batches) as stream:
            for block in range(len(self.teacher.blocks)):
                stream.load(block)
                if block in self.stored.behind:
                    self._fill(made, f"state.{block}", batches, states_behind(stream, block))
                else:
                    stream.run_block(block)
                stream.unload(block)
                progress.advance()
            for batch, rows, output in zip(batches, _rows(batches), stream.finish(), strict=True):
                for row in range(len(batch)):
                    ids, log_p = most_probable(output.logits[row].float(), self.stored.top_k)
                    if not bool(torch.isfinite(log_p).all()):
                        raise PruneError("The teacher's predictions are not finite: try --dtype float32.")
                    made["ids"][rows.start + row, : batch.length] = ids.to(self.stored.ids)
                    made["log_p"][rows.start + row, : batch.length] = log_p.to(_LOG_P)
        return made

    def _empty(self, windows: int, length: int) -> dict[str, torch.Tensor]:
        stored = self.stored
        shapes = {"ids": (stored.top_k, stored.ids), "log_p": (stored.top_k + 1, _LOG_P)}
        shapes |= {f"state.{block}": (stored.hidden, _STATE) for block in stored.behind}
        return {name: torch.zeros(windows, length, last, dtype=dtype) for name, (last, dtype) in shapes.items()}

    @staticmethod
    def _fill(
        made: Mapping[str, torch.Tensor], name: str, batches: Sequence[Batch], states: Sequence[torch.Tensor]
    ) -> None:
        for batch, rows, state in zip(batches, _rows(batches), states, strict=True):
            made[name][rows, : batch.length] = state.reshape(len(batch), batch.length, -1).to(_STATE).cpu()

    def _write(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        try:
            save_whole(self.folder / _name(number), tensors, _KEY, self._head(number))
        except NOT_WRITTEN as error:
            raise PruneError(
                f"The teacher's answers cannot be written to {self.folder} ({error}): make space, or give "
                "another folder to --store, then continue with --resume."
            ) from error


def _rows(batches: Sequence[Batch]) -> Iterator[slice]:
    first = 0
    for batch in batches:
        yield slice(first, first + len(batch))
        first += len(batch)


def _name(number: int) -> str:
    return f"{number:05}{_SUFFIX}"


def _head(path: Path) -> dict[str, Any] | None:
    """What a file of a store says of itself, {} for one that was cut short; None for any other file."""
    named = _OURS.fullmatch(path.name)
    if named is None or not path.is_file():
        return None
    if named["partial"]:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get(_KEY)
            return None if told is None else json.loads(told)
    except (OSError, ValueError, SafetensorError):
        return None
