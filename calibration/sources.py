"""Where text comes from: what a user types as SOURCE, checked at once, and the documents behind it, read on demand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calibration.builtin import builtin_documents
from calibration.errors import CalibrationError

Role = Literal["calibration", "evaluation"]
Document = str | list[dict[str, Any]]
Kind = Literal["builtin", "paper", "hub", "files", "tokens"]

PAPER_NAMES = ("c4", "wikitext2", "ptb")
_LOADERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_NEVER_OPENED = frozenset({".pt", ".pth", ".pkl", ".pickle", ".bin", ".npy", ".npz", ".ckpt"})
_GUESSED_COLUMNS = ("messages", "text", "content")
_FORMS = (
    "builtin, c4, wikitext2, ptb, hf:REPO[:CONFIG][:SPLIT][:COLUMN], a text, JSONL, CSV or Parquet file "
    "(PATH[:COLUMN]), a folder of them, or a .safetensors file with input_ids"
)
_C4_EVALUATION_DOCUMENTS = 1100


@dataclass(frozen=True)
class Source:
    """A checked SOURCE: `given` as typed; `files` for local ones; `repo`, `config`, `split` for the hub's."""

    given: str
    kind: Kind
    files: tuple[Path, ...] = ()
    repo: str = ""
    config: str | None = None
    split: str = "train"
    column: str | None = None


def parse_source(given: str) -> Source:
    """Check what can be checked without reading: the form, the paths, the kinds of file. Raises CalibrationError."""
    if given in ("builtin", "builtin:train", "builtin:test"):
        return Source(given, "builtin", split=given.partition(":")[2])
    if given in PAPER_NAMES:
        return Source(given, "paper")
    if given.startswith("hf:"):
        return _hub_source(given)
    path, column = _split_column(given)
    if path.is_dir():
        return Source(given, "files", files=_files_in(path))
    if path.is_file():
        _refuse_pickle(path)
        if path.suffix == ".safetensors":
            return Source(given, "tokens", files=(path,))
        return Source(given, "files", files=(path,), column=column)
    hint = (
        f" For the data set of that name on the hub, write hf:{given}."
        if re.fullmatch(r"[\w.-]+/[\w.-]+", given)
        else ""
    )
    raise CalibrationError(f"There is no text {given!r}: give {_FORMS}.{hint}")


def _hub_source(given: str) -> Source:
    parts = given.split(":")[1:]
    if not parts[0] or len(parts) > 4:
        raise CalibrationError(f"{given!r} is not of the form hf:REPO[:CONFIG][:SPLIT][:COLUMN].")
    repo, config, split, column = (*parts, *[""] * (4 - len(parts)))
    return Source(given, "hub", repo=repo, config=config or None, split=split or "train", column=column or None)


def _split_column(given: str) -> tuple[Path, str | None]:
    path = Path(given).expanduser()
    head, colon, column = given.rpartition(":")
    if colon and column and not path.exists() and Path(head).expanduser().suffix in _LOADERS:
        return Path(head).expanduser(), column
    return path, None


def _files_in(folder: Path) -> tuple[Path, ...]:
    visible = (p for p in sorted(folder.rglob("*")) if not any(s.startswith(".") for s in p.relative_to(folder).parts))
    files = tuple(p for p in visible if p.is_file() and (p.suffix in _LOADERS or _looks_like_text(p)))
    if not files:
        raise CalibrationError(f"The folder {folder} holds no text, JSONL, CSV or Parquet file.")
    return files


def _looks_like_text(path: Path) -> bool:
    with path.open("rb") as stream:
        return b"\0" not in stream.read(4096) and path.suffix not in _NEVER_OPENED


def _refuse_pickle(path: Path) -> None:
    if path.suffix in _NEVER_OPENED:
        raise CalibrationError(
            f"{path} may be a pickle, which is never opened because it can run code: "
            "save a .safetensors file with an integer tensor input_ids of shape (samples, length) instead."
        )


def documents(source: Source, role: Role) -> Iterator[Document]:
    """The documents of a source in order; a chat is a list of messages. Raises CalibrationError while reading."""
    if source.kind == "builtin":
        yield from builtin_documents(source.split or ("train" if role == "calibration" else "test"))
    elif source.kind == "hub":
        rows = _load(source.repo, source.config, split=source.split, streaming=True)
        yield from _column(source.given, rows, source.column)
    else:
        for path in source.files:
            yield from _file_documents(path, source.column)


def _file_documents(path: Path, column: str | None) -> Iterator[Document]:
    loader = _LOADERS.get(path.suffix)
    if loader is None:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} is not UTF-8 text ({error}): convert it, or give another file.") from error
        return
    options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
    rows = _load(loader, None, data_files=str(path), split="train", streaming=True, **options)
    try:
        yield from _column(str(path), rows, column)
    except (ValueError, TypeError, OSError) as error:
        raise CalibrationError(f"{path} cannot be read as {loader} ({_first_line(error)}): mend the file.") from error
    except Exception as error:
        # datasets wraps what its parsers raise in classes of its own; anything of ours passes.
        if type(error).__module__.split(".")[0] not in ("datasets", "pyarrow", "pandas"):
            raise
        raise CalibrationError(f"{path} cannot be read as {loader} ({_first_line(error)}): mend the file.") from error


def _column(where: str, rows: Iterable[dict[str, Any]], column: str | None) -> Iterator[Document]:
    for number, row in enumerate(rows):
        column = column or _guess_column(where, row)
        if column not in row:
            raise CalibrationError(f"{where} has no column {column!r}: it has {', '.join(row)}.")
        value = row[column]
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(message, dict) for message in value)):
            yield value
        elif value is not None:
            raise CalibrationError(
                f"Row {number} of {where} holds {type(value).__name__} in column {column!r}: expected text or messages."
            )


def _guess_column(where: str, row: dict[str, Any]) -> str:
    for name in _GUESSED_COLUMNS:
        if name in row:
            return name
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise CalibrationError(
            f"{where} has the columns {', '.join(row)}: name the one with the text by adding :COLUMN to the source."
        )
    return texts[0]


def paper_text(name: str, role: Role) -> str:
    """The text of wikitext2 or ptb, or c4's evaluation text, joined as the authors of Wanda and SparseGPT do."""
    if name == "wikitext2":
        split, glue = ("train", " ") if role == "calibration" else ("test", "\n\n")
        rows = _load("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return glue.join(row["text"] for row in rows)
    if name == "ptb":
        split = "train" if role == "calibration" else "test"
        rows = _load("ptb-text-only/ptb_text_only", None, split=split, revision="refs/convert/parquet")
        return " ".join(row["sentence"] for row in rows)
    rows = _load(
        "allenai/c4", None, data_files={"validation": "en/c4-validation.00000-of-00008.json.gz"}, split="validation"
    )
    return " ".join(row["text"] for row, _ in zip(rows, range(_C4_EVALUATION_DOCUMENTS), strict=False))


def c4_calibration_rows() -> Any:
    """The documents of c4 that the authors draw calibration samples from: a sequence of rows with `text`."""
    return _load("allenai/c4", None, data_files={"train": "en/c4-train.00000-of-01024.json.gz"}, split="train")


def _load(path: str, config: str | None, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"Reading {path} needs the package datasets: pip install datasets, or use builtin or a text file."
        ) from error
    try:
        return datasets.load_dataset(path, config, **options)
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise CalibrationError(
            f"{path} could not be loaded ({_first_line(error)}): "
            "check the name and the network; builtin and local files need none."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
