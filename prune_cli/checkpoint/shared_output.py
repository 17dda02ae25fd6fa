"""The output folder of a run of several processes: the first of them writes it, the others follow what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prune_cli.checkpoint.layout import Layout
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.errors import RequestError
from prune_cli.ranks.ranks import Ranks


def open_output(out: Path, source: Checkpoint, beside: Path, ranks: Ranks) -> OutputFolder:
    """The folder that this process writes alone, or with others."""
    return SharedOutput(out, source, beside, ranks) if ranks.several else OutputFolder(out, source, beside)


class SharedOutput(OutputFolder):
    """`begin`, `lay_out` and `wait` are steps that every rank takes. The end, `copy_side_files` to `commit`, is the
    first rank's alone, and so are the bytes: others remember of `write_block` what the journal will say.
    """

    def __init__(self, out: Path, source: Checkpoint, beside: Path, ranks: Ranks) -> None:
        super().__init__(out, source, beside)
        self._ranks = ranks

    def begin(self, fingerprint: Mapping[str, Any], layout: Layout | None = None, *, resume: bool) -> None:
        """Raises RequestError too where a rank, on another machine, does not see the folder."""

        def begin() -> tuple[dict[int, dict[str, Any]], dict[str, Any], dict[str, str]]:
            super(SharedOutput, self).begin(fingerprint, layout, resume=resume)
            return self.done, self.notes, self.input_hashes

        self.done, self.notes, self.input_hashes = self._ranks.on_first(begin)
        self.resumed = frozenset(self.done)
        self._layout = layout
        if not self.partial.is_dir():
            raise RequestError(
                f"Rank {self._ranks.rank} does not see {self.partial}, which the first rank has made: put OUT where "
                "all machines of the run can read it."
            )

    def lay_out(
        self,
        layout: Layout,
        source: Checkpoint | None = None,
        read_as: Callable[[Checkpoint], Checkpoint] | None = None,
    ) -> None:
        self._layout = layout
        self._read_as = read_as or self._read_as
        self._ranks.on_first(lambda: super(SharedOutput, self).lay_out(layout, source, read_as))

    def write_block(self, block: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        if self._ranks.first:
            super().write_block(block, tensors, record)
        else:
            self.done[block] = {"block": block, **record}

    def wait(self) -> None:
        """Wait until the first rank has everything on the disk, where the others may read it."""
        self._ranks.on_first(self._wait)

    def note(self, key: str, value: Any) -> None:
        """Remembered by all, so that all ask for it alike."""
        if self._ranks.first:
            super().note(key, value)
        else:
            self.notes[key] = value
