"""`prune-cli convert`: a checkpoint folder to sparse safetensors or back, file by file; a killed run continues."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from prune_cli.checkpoint.bitmask_format import bitmask_format, with_quantised
from prune_cli.checkpoint.file_names import CARD, CONFIG_FILE
from prune_cli.checkpoint.journaled_folder import JournaledFolder
from prune_cli.checkpoint.layout import index_for, index_of
from prune_cli.checkpoint.preflight import check_output, check_space
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.source import Source, resolve_model
from prune_cli.errors import RequestError
from prune_cli.progress import Progress, Silent
from prune_cli.report.loading_section import Form, for_format
from prune_cli.request.request import Format, check_format
from prune_cli.sparse.bitmask_view import BitmaskView
from prune_cli.sparse.config import LOADER, check_self_contained, is_self_contained, loader, with_entry, without_entry
from prune_cli.sparse.encode_shard import Written, make_dense, make_sparse
from prune_cli.sparse.format import DEFLATING_VERSION, VERSION, is_sparse, open_shard
from prune_cli.sparse.from_bitmask import check_bitmasks, dense_bytes, without_bitmask, write_dense
from prune_cli.sparse.parallel_files import each_file

JOURNAL = ".convert-journal.jsonl"


@dataclass(frozen=True)
class ConvertRequest:
    """What `prune-cli convert` was asked for."""

    model: str
    out: Path
    format: Format = "sparse"
    resume: bool = False
    overwrite: bool = False
    revision: str | None = None
    self_contained: bool = False
    compress: bool = False
    force: bool = False

    @property
    def version(self) -> int:
        return DEFLATING_VERSION if self.compress else VERSION

    def check(self) -> None:
        check_format(self.format, self_contained=self.self_contained)
        if self.compress and self.format != "sparse":
            raise RequestError("--compress is for --format sparse: dense files are never compressed.")


@dataclass(frozen=True)
class ConvertedFile:
    file: str
    bytes_before: int
    bytes_after: int
    tensors: int
    encoded_tensors: int


@dataclass(frozen=True)
class Conversion:
    """What was written; sizes are those of the safetensors files."""

    model: str
    out: str
    format: Format
    tensors: int
    encoded_tensors: int
    bytes_before: int
    bytes_after: int
    not_copied: tuple[str, ...]
    files: tuple[ConvertedFile, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def convert(request: ConvertRequest, progress: Progress | None = None) -> Conversion:
    """Convert a checkpoint as `request` says.

    Raises RequestError before any work where it cannot be done, PruneError (naming the tensor) for damaged data.
    """
    request.check()
    progress = progress or Silent()
    source = resolve_model(request.model, request.revision)
    checkpoint = Checkpoint.open(source.folder)
    form = _bitmasks(request, checkpoint)
    if form is None:
        _check_input(request, checkpoint)
    check_output(request.out, checkpoint.folder, resume=request.resume, overwrite=request.overwrite)
    check_space(request.out, dense_bytes(checkpoint) if form else _needed_bytes(request, checkpoint))
    config = _config(request, source)
    if request.self_contained:
        check_self_contained(source.folder)
    with closing(JournaledFolder(request.out, JOURNAL)) as folder:
        done = _begin(request, checkpoint, folder)
        progress.stage(f"Writing {len(checkpoint.files)} {request.format} file(s)", len(checkpoint.entries))
        files = _convert_files(checkpoint, folder, request, done, progress)
        _check_gain(request, files, folder)
        not_copied = _copy_side_files(checkpoint, form, folder)
        if request.self_contained:
            (folder.partial / LOADER).write_text(loader(), encoding="utf-8")
        _tell_in_card(folder.partial / CARD, "self-contained" if request.self_contained else request.format)
        if config is not None:
            (folder.partial / CONFIG_FILE).write_text(config, encoding="utf-8")
        folder.commit()
    return Conversion(
        model=request.model,
        out=str(request.out),
        format=request.format,
        tensors=sum(file.tensors for file in files),
        encoded_tensors=sum(file.encoded_tensors for file in files),
        bytes_before=sum(file.bytes_before for file in files),
        bytes_after=sum(file.bytes_after for file in files),
        not_copied=not_copied,
        files=files,
    )


def _convert_files(
    checkpoint: Checkpoint,
    folder: JournaledFolder,
    request: ConvertRequest,
    done: Mapping[str, Written],
    progress: Progress,
) -> tuple[ConvertedFile, ...]:
    """Write every shard of `checkpoint` into `folder`, but for those `done`; a journal line follows each."""

    is_masked = _bitmasks(request, checkpoint) is not None

    def write(file: str, pool: Executor, advance: Callable[[], None]) -> Written:
        path = checkpoint.folder / file
        if is_masked:
            return write_dense(checkpoint.reopened(), file, folder.partial / file, advance)
        if request.format == "sparse":
            return make_sparse(path, folder.partial / file, pool, advance, compress=request.compress)
        return make_dense(open_shard(path), folder.partial / file, pool, advance)

    every = dict(done)
    for file, written in each_file([file for file in checkpoint.files if file not in done], write, progress):
        folder.append({"file": file, "written": asdict(written)})
        every[file] = written
    return tuple(
        ConvertedFile(file, path.stat().st_size, every[file].nbytes, every[file].tensors, every[file].encoded)
        for file, path in ((file, checkpoint.folder / file) for file in checkpoint.files)
    )


def _bitmasks(request: ConvertRequest, checkpoint: Checkpoint) -> str | None:
    """The form of compressed-tensors that leaves zeros out, if it is one. Raises RequestError if it cannot be dense."""
    path = checkpoint.folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise RequestError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(config, dict):
        return None  # said where it is written
    form = bitmask_format(config)
    if form is None:
        return None
    if request.format != "dense":
        raise RequestError(
            f"{request.model} is {form} of compressed-tensors: make it dense first, with --format dense."
        )
    if with_quantised(config):
        raise RequestError(
            f"{request.model} is {form} of compressed-tensors and quantised too, which is not read: convert the "
            "checkpoint that it was made from."
        )
    check_bitmasks(checkpoint)
    return form


def _check_input(request: ConvertRequest, checkpoint: Checkpoint) -> None:
    sparse = [is_sparse(checkpoint.folder / file) for file in checkpoint.files]
    if any(sparse) and not all(sparse):
        raise RequestError(
            f"{checkpoint.folder} has sparse and dense files side by side "
            f"({checkpoint.files[sparse.index(False)]} is dense): download it again."
        )
    if all(sparse) == (request.format == "sparse"):
        raise RequestError(f"{request.model} is {request.format} already: there is nothing to convert.")


def _check_gain(request: ConvertRequest, files: Sequence[ConvertedFile], folder: JournaledFolder) -> None:
    """Refuse sparse files that are larger than the dense ones, and leave nothing behind."""
    before, after = sum(file.bytes_before for file in files), sum(file.bytes_after for file in files)
    if request.format != "sparse" or after <= before or request.force:
        return
    shutil.rmtree(folder.partial)
    raise RequestError(
        f"{request.model} has too few zeros for sparse files: they would take {after:,} bytes, the dense ones take "
        f"{before:,}. Nothing was written; --compress makes them smaller, --force writes them as they are."
    )


def _needed_bytes(request: ConvertRequest, checkpoint: Checkpoint) -> int:
    if request.format == "sparse":
        # Deflated bytes, half of the dense ones at most, wait beside the file until it is written.
        return checkpoint.nbytes * 3 // 2 if request.compress else checkpoint.nbytes
    shards = [open_shard(checkpoint.folder / file) for file in checkpoint.files]
    return sum(len(shard.dense_header) + sum(e.nbytes for e in shard.dense_entries.values()) for shard in shards)


def _config(request: ConvertRequest, source: Source) -> str | None:
    """The text of the output's config.json."""
    path = source.folder / CONFIG_FILE
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    config = json.loads(text)
    if isinstance(config, dict) and bitmask_format(config) is not None:
        return json.dumps(without_bitmask(config), indent=2, ensure_ascii=False) + "\n"
    if request.format == "sparse":
        return with_entry(text, path, self_contained=request.self_contained, version=request.version)
    return without_entry(text, path)


def _begin(request: ConvertRequest, checkpoint: Checkpoint, folder: JournaledFolder) -> dict[str, Written]:
    """Lock the folder; the files that an interrupted run of the same request has done."""
    folder.lock()
    stats = {file: (checkpoint.folder / file).stat() for file in checkpoint.files}
    now = {
        "format": request.format,
        "version": request.version,
        "self_contained": request.self_contained,
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
    }
    lines = folder.continue_lines() if request.resume else []
    if lines:
        if lines[0] != now:
            raise RequestError(
                f"The interrupted run in {folder.partial} converted something else: "
                "add --overwrite instead of --resume."
            )
        return {line["file"]: Written(**line["written"]) for line in lines[1:]}
    folder.restart([now])
    return {}


def _copy_side_files(checkpoint: Checkpoint, form: str | None, folder: JournaledFolder) -> tuple[str, ...]:
    """Everything but weights, and the index, which names the dense ones. Returns the weights left behind."""
    config = checkpoint.folder / CONFIG_FILE
    ours = (LOADER,) if config.is_file() and is_self_contained(json.loads(config.read_text(encoding="utf-8"))) else ()
    left = folder.copy_side_files(checkpoint.folder, {*checkpoint.files, CONFIG_FILE, *ours})
    if checkpoint.index:
        dense = checkpoint if form is None else BitmaskView(checkpoint, form)
        index = index_of(dense) if form is None else index_for(dense, dense.entries)
        (folder.partial / checkpoint.index).write_text(index, encoding="utf-8")
    return left


def _tell_in_card(card: Path, form: Form) -> None:
    """A card of ours tells how to load it; of any other nothing changes."""
    if card.is_file():
        text = card.read_bytes().decode("utf-8", "surrogateescape")
        card.write_bytes(for_format(text, form).encode("utf-8", "surrogateescape"))
