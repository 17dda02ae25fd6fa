"""The output folder while it is being made: never half valid, and a killed run continues where it was.

Everything is built in `OUT.partial`: the files are laid out first with all that the input has of them, then every
changed tensor is written at its place, and a journal line follows each block once its bytes are on the disk.
config.json, the index and the report come last; then one rename makes it OUT.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.checkpoint.file_names import (
    CARD,
    CONFIG_FILE,
    JOURNAL,
    OTHER_WEIGHTS,
    REPORT_JSON,
    REPORT_MARKDOWN,
    REPORT_PAGE,
    SOURCE_CARD,
    partial_folder,
)
from prune_cli.checkpoint.layout import Layout
from prune_cli.checkpoint.reader import INDEX_FILE, Checkpoint, TensorEntry
from prune_cli.checkpoint.stored_values import broken
from prune_cli.errors import PruneError, RequestError

_REPORTS = (REPORT_JSON, REPORT_MARKDOWN, REPORT_PAGE)
_FILE_THREADS = 2


class OutputFolder:
    """`OUT.partial` and its journal; a context manager, so that the last write is waited for and the lock let go."""

    def __init__(self, out: Path, source: Checkpoint) -> None:
        self.out = out
        self.partial = partial_folder(out)
        self.done: dict[int, dict[str, Any]] = {}
        self.resumed: frozenset[int] = frozenset()
        self.notes: dict[str, Any] = {}
        self.input_hashes: dict[str, str] = {}
        self.not_copied: list[str] = []
        self._source = source
        self._read_as = source.over
        self._layout: Layout | None = None
        self._journal: IO[str] | None = None
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
        if self._journal is not None:
            self._journal.close()

    # --- begin --------------------------------------------------------------------------------------------------

    def begin(self, fingerprint: Mapping[str, Any], layout: Layout | None = None, *, resume: bool) -> None:
        """Look at the input, or continue a run with the same `fingerprint`.

        With a `layout` the files are made at the same time; else `lay_out` makes them once it is known.
        Raises RequestError for another run in progress, a different request, or NaN/Inf in a weight (named).
        """
        self._layout = layout
        self.partial.mkdir(parents=True, exist_ok=True)
        self._journal = (self.partial / JOURNAL).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"Another run is writing to {self.partial}: wait for it, or choose another OUT."
            ) from None
        lines = self._journal_lines() if resume else []
        if lines and lines[0].get("fingerprint") is not None:
            self._continue(lines, fingerprint)
            return
        for path in self.partial.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._journal.truncate(0)
        self._new = True
        self.input_hashes = self._check_input(layout)
        self._append({"fingerprint": dict(fingerprint), "input_hashes": self.input_hashes})

    def _journal_lines(self) -> list[dict[str, Any]]:
        """All whole lines; a line cut short by a kill is dropped."""
        assert self._journal is not None
        self._journal.seek(0)
        text = self._journal.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._journal.truncate(len(whole.encode()))
        return [json.loads(line) for line in whole.splitlines()]

    def _continue(self, lines: list[dict[str, Any]], fingerprint: Mapping[str, Any]) -> None:
        before = lines[0]["fingerprint"]
        now = json.loads(json.dumps(fingerprint))
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            raise RequestError(
                f"The interrupted run in {self.partial} was asked for something else ({', '.join(changed)} differ): "
                "repeat its command with --resume, or add --overwrite to start again."
            )
        self.input_hashes = hash_files(self._source.folder, self._source.files)
        if self.input_hashes != lines[0]["input_hashes"]:
            raise RequestError(
                f"The model has changed since the run in {self.partial} was interrupted: use --overwrite to start anew."
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
            hashes = {file: pool.submit(_sha256, self._source.folder / file) for file in self._source.files}
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
        self.wait()
        self._pending = self._writer.submit(self._write_block, block, dict(tensors), dict(record))

    def wait(self) -> None:
        """Wait until everything handed over is on the disk; raises what went wrong there."""
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
        self._append(line)
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
        self.wait()
        self._append({key: value})

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def checkpoint(self) -> Checkpoint:
        """The weights as they now lie in `OUT.partial`."""
        return self._read_as(Checkpoint(self.partial, self.layout.entries, self.layout.files, self._source.index))

    # --- end ----------------------------------------------------------------------------------------------------

    def copy_side_files(self) -> None:
        """Tokenizer, templates, generation config and so on; weights in other formats stay behind, listed.

        The source's README.md makes room for the output's own.
        """
        has_card = (self._source.folder / CARD).is_file()
        for path in sorted(self._source.folder.rglob("*")):
            relative = path.relative_to(self._source.folder)
            if not path.is_file() or any(part.startswith(".") for part in relative.parts):
                continue
            if str(relative) in (*self._source.files, CONFIG_FILE, INDEX_FILE, *_REPORTS):
                continue
            if path.name.endswith(OTHER_WEIGHTS) or path.name.endswith((".bin.index.json", ".safetensors.index.json")):
                self.not_copied.append(str(relative))
                continue
            if has_card and str(relative) == SOURCE_CARD:
                continue
            target = self.partial / (SOURCE_CARD if str(relative) == CARD else relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def release(self) -> None:
        """The shards are whole and their files let go, so that others can take their places."""
        self.wait()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def hashes(self) -> dict[str, str]:
        """sha256 of every shard as it now lies on the disk."""
        self.wait()
        return hash_files(self.partial, self.layout.files)

    def commit(self, reports: Mapping[str, str], config: str | None = None) -> None:
        """Write index, `config` (the input's config.json by default) and `reports` (file name -> text).

        Then the folder becomes OUT in one rename.
        """
        self.wait()
        if self.layout.index is not None:
            (self.partial / INDEX_FILE).write_text(self.layout.index, encoding="utf-8")
        if config is None:
            shutil.copyfile(self._source.folder / CONFIG_FILE, self.partial / CONFIG_FILE)
        else:
            (self.partial / CONFIG_FILE).write_text(config, encoding="utf-8")
        for file, text in reports.items():
            (self.partial / file).write_text(text, encoding="utf-8")
        (self.partial / JOURNAL).unlink()
        if self.out.exists():
            replaced = self.out.with_name(self.out.name + ".replaced")
            self.out.rename(replaced)
            self.partial.rename(self.out)
            shutil.rmtree(replaced)
        else:
            self.partial.rename(self.out)


def _check_finite(entry: TensorEntry, source: Checkpoint) -> None:
    if entry.dtype not in FLOATS:
        return
    if kind := broken(source.read(entry.name)):
        raise RequestError(
            f"{entry.name} in {entry.file} holds {kind}: the checkpoint is damaged or its training diverged; "
            "get a sound copy."
        )


def hash_files(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """sha256 of each of `files` in `folder`."""
    with ThreadPoolExecutor(max_workers=_FILE_THREADS) as pool:
        return dict(zip(files, pool.map(lambda file: _sha256(folder / file), files), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
