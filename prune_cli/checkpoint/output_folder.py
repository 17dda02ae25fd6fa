"""The output folder while it is being made: never half valid, and a killed run continues where it was.

Everything is built in `OUT.partial`: the files are laid out first with all that the input has of them, then every
changed tensor is written at its place, and a journal line follows each block once its bytes are on the disk.
config.json, the index and the report come last; then one rename makes it OUT.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.checkpoint.file_names import (
    CARD,
    CONFIG_FILE,
    JOURNAL,
    REPORTS,
    SOURCE_CARD,
)
from prune_cli.checkpoint.inputs import changed, hash_file, hash_files
from prune_cli.checkpoint.journaled_folder import JournaledFolder, changed_keys
from prune_cli.checkpoint.layout import Layout
from prune_cli.checkpoint.reader import INDEX_FILE, Checkpoint, TensorEntry
from prune_cli.errors import PruneError, RequestError

_FILE_THREADS = 2


class OutputFolder:
    """`OUT.partial` and its journal; a context manager, so that the last write is waited for and the lock let go."""

    def __init__(self, out: Path, source: Checkpoint, beside: Path | None = None) -> None:
        """`beside` is the folder of config.json, tokenizer and so on, by default that of the weights."""
        self.out = out
        self._folder = JournaledFolder(out, JOURNAL)
        self.partial = self._folder.partial
        self.done: dict[int, dict[str, Any]] = {}
        self.resumed: frozenset[int] = frozenset()
        self.notes: dict[str, Any] = {}
        self.input_hashes: dict[str, str] = {}
        self.not_copied: list[str] = []
        self._source = source
        self._beside = beside or source.folder
        self._read_as = source.over
        self._layout: Layout | None = None
        self._descriptors: dict[str, int] = {}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prune-cli-writer")
        self._pending: Future[None] | None = None
        self._new = False

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, _kind: object, value: object, _trace: object) -> None:
        self._writer.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        # A request that is refused after all leaves nothing behind that the next one would have to overwrite.
        if isinstance(value, RequestError) and self._new and not self.done:
            shutil.rmtree(self.partial)
        self._folder.close()

    # --- begin --------------------------------------------------------------------------------------------------

    def begin(self, fingerprint: Mapping[str, Any], layout: Layout | None = None, *, resume: bool) -> None:
        """Look at the input, or continue a run with the same `fingerprint`.

        With a `layout` the files are made at the same time; else `lay_out` makes them once it is known.
        Raises RequestError for another run in progress, a different request, or NaN/Inf in a weight (named).
        """
        self._layout = layout
        self._folder.lock()
        lines = self._folder.continue_lines() if resume else []
        if lines and lines[0].get("fingerprint") is not None:
            self._continue(lines, fingerprint)
            return
        self._folder.restart()
        self._new = True
        self.input_hashes = self._check_input(layout)
        self._folder.append({"fingerprint": dict(fingerprint), "input_hashes": self.input_hashes})

    def _continue(self, lines: list[dict[str, Any]], fingerprint: Mapping[str, Any]) -> None:
        differ = changed_keys(lines[0]["fingerprint"], fingerprint)
        if differ:
            raise RequestError(
                f"The interrupted run in {self.partial} was asked for something else ({', '.join(differ)} differ): "
                "repeat its command with --resume, or add --overwrite to start again."
            )
        self.input_hashes = hash_files(self._source.folder, self._source.files)
        if names := changed(lines[0]["input_hashes"], self.input_hashes):
            raise RequestError(
                f"{names[0]} of the model has changed since the run in {self.partial} was interrupted: use --overwrite "
                "to start anew."
            )
        for line in lines[1:]:
            if "block" in line:
                self.done[line["block"]] = line
            else:
                self.notes.update(line)
        self.resumed = frozenset(self.done)

    def _check_input(self, layout: Layout | None) -> dict[str, str]:
        """Hash the shards and make the output's while every float is looked at; NaN and Inf end the run here."""
        with ThreadPoolExecutor(max_workers=_FILE_THREADS) as pool:
            made = (
                [pool.submit(layout.make_file, f, self._source, self.partial) for f in layout.files] if layout else []
            )
            hashes = {file: pool.submit(hash_file, self._source.folder / file) for file in self._source.files}
            for entry in self._source.entries.values():
                _check_finite(entry, self._source)
            for file in made:
                file.result()
            return {file: digest.result() for file, digest in hashes.items()}

    def lay_out(
        self,
        layout: Layout,
        source: Checkpoint | None = None,
        read_as: Callable[[Checkpoint], Checkpoint] | None = None,
    ) -> None:
        """Make the files of a layout that was not known at the beginning, unless an interrupted run has made them.

        It is made of the tensors of `source`, and `read_as` makes weights of what the files hold, where those are not
        the input's. Raises PruneError where the interrupted run had decided on another layout.
        """
        self._layout = layout
        self._read_as = read_as or self._read_as
        made = self.notes.get("layout")
        if made is not None and made != layout.sha256:
            raise PruneError(
                f"The interrupted run in {self.partial} had laid out other tensors than this one would: "
                "add --overwrite instead of --resume to start again."
            )
        if made is None:
            with ThreadPoolExecutor(max_workers=_FILE_THREADS) as pool:
                list(pool.map(lambda file: layout.make_file(file, source or self._source, self.partial), layout.files))
            self.note("layout", layout.sha256)

    @property
    def layout(self) -> Layout:
        assert self._layout is not None, "the output has no files before it is laid out"
        return self._layout

    # --- work ---------------------------------------------------------------------------------------------------

    def write_block(self, block: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Write `tensors` (name -> stored tensor) at their places in the background, then note the block as done.

        At most one block waits to be written; a failure of the previous write is raised here.
        """
        self._wait()
        self._pending = self._writer.submit(self._write_block, block, dict(tensors), dict(record))

    def wait(self) -> None:
        """Wait until everything handed over is on the disk; raises what went wrong there."""
        self._wait()

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write_block(self, block: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        files = set()
        for name, tensor in tensors.items():
            entry = self.layout.entries[name]
            files.add(entry.file)
            self._overwrite(entry, tensor)
        for file in files:
            os.fdatasync(self._descriptors[file])
        line = {"block": block, **record}
        self._folder.append(line)
        self.done[block] = line

    def _overwrite(self, entry: TensorEntry, tensor: torch.Tensor) -> None:
        if entry.file not in self._descriptors:
            self._descriptors[entry.file] = os.open(self.partial / entry.file, os.O_RDWR)
        data = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if len(data) != entry.nbytes:
            raise PruneError(
                f"{entry.name} has {len(data)} bytes after pruning, its place {entry.nbytes}: please report it."
            )
        position = entry.begin
        while data:
            written = os.pwrite(self._descriptors[entry.file], data, position)
            data, position = data[written:], position + written

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON `value` for a run that is resumed: it finds it in `notes`."""
        self._wait()
        self._folder.append({key: value})

    def checkpoint(self) -> Checkpoint:
        """The weights as they now lie in `OUT.partial`."""
        return self._read_as(Checkpoint(self.partial, self.layout.entries, self.layout.files, self._source.index))

    # --- end ----------------------------------------------------------------------------------------------------

    def copy_side_files(self) -> None:
        """Tokenizer, templates, generation config and so on; weights in other formats stay behind, listed.

        The source's README.md makes room for the output's own.
        """
        folder = self._beside
        skip = {*self._source.files, CONFIG_FILE, INDEX_FILE, *REPORTS}
        if (folder / CARD).is_file():
            skip.add(SOURCE_CARD)
        self.not_copied = list(self._folder.copy_side_files(folder, skip, {CARD: SOURCE_CARD}))

    def release(self) -> None:
        """The shards are whole and their files let go, so that others can take their places."""
        self._wait()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def hashes(self) -> dict[str, str]:
        """sha256 of every shard as it now lies on the disk."""
        self._wait()
        return hash_files(self.partial, self.layout.files)

    def commit(self, reports: Mapping[str, str], config: str | None = None) -> None:
        """Write index, `config` (the input's config.json by default) and `reports` (file name -> text).

        Then the folder becomes OUT in one rename.
        """
        self._wait()
        if self.layout.index is not None:
            (self.partial / INDEX_FILE).write_text(self.layout.index, encoding="utf-8")
        if config is None:
            shutil.copyfile(self._beside / CONFIG_FILE, self.partial / CONFIG_FILE)
        else:
            (self.partial / CONFIG_FILE).write_text(config, encoding="utf-8")
        for file, text in reports.items():
            (self.partial / file).write_text(text, encoding="utf-8")
        self._folder.commit()


def _check_finite(entry: TensorEntry, source: Checkpoint) -> None:
    if entry.dtype not in FLOATS:
        return
    if kind := source.broken(entry.name):
        raise RequestError(
            f"{entry.name} in {entry.file} holds {kind}: the checkpoint is damaged or its training diverged; "
            "get a sound copy."
        )
