"""Where text comes from: what a user types as SOURCE, checked at once, and the documents behind it, read on demand."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calibration.builtin import builtin_documents
from calibration.builtin_python import python_documents
from calibration.errors import CalibrationError
from calibration.hub import hub_rows
from calibration.rows import LOADERS, Document, column_of, file_rows

Role = Literal["calibration", "evaluation"]
Kind = Literal["builtin", "paper", "hub", "files", "tokens"]

PAPER_NAMES = ("c4", "wikitext2", "ptb")
NAMES = ("builtin", *PAPER_NAMES)
_NEVER_OPENED = frozenset({".pt", ".pth", ".pkl", ".pickle", ".bin", ".npy", ".npz", ".ckpt"})
_LONGEST_SHOWN = 120
_BUILTIN = re.compile(r"builtin(:(?P<of>python))?(:(?P<split>train|test))?")
_REPO = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_FORMS = (
    "builtin, c4, wikitext2, ptb, hf:REPO[:CONFIG][:SPLIT][:COLUMN], a text, JSONL, CSV or Parquet file "
    "(PATH[:COLUMN]), a folder of them, or a .safetensors file with input_ids (or a folder with one for each sample)"
)


@dataclass(frozen=True)
class Source:
    """A checked SOURCE: `given` as typed; `files` for local ones; `repo`, `config`, `split` for the hub's.

    Of builtin text `repo` is "python" for that of the Python installation; of a paper's it is the name, and
    `as_published` leaves windows without a BOS of their own.
    """

    given: str
    kind: Kind
    files: tuple[Path, ...] = ()
    repo: str = ""
    config: str | None = None
    split: str = "train"
    column: str | None = None
    as_published: bool = False


def parse_source(given: str) -> Source:
    """Check what can be checked without reading: the form, the paths, the kinds of file. Raises CalibrationError."""
    if (builtin := _BUILTIN.fullmatch(given)) is not None:
        return Source(given, "builtin", repo=builtin["of"] or "", split=builtin["split"] or "")
    name, _, way = given.partition(":")
    if name in PAPER_NAMES and way in ("", "paper"):
        return Source(given, "paper", repo=name, as_published=way == "paper")
    if given.startswith("hf:"):
        return _hub_source(given)
    if not given.strip():
        raise CalibrationError(f"No text is named: give {_FORMS}.")
    try:
        return _local_source(given)
    except (OSError, RuntimeError, ValueError) as error:
        # A name too long, a folder closed to the user, the home of nobody, a null byte.
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise CalibrationError(f"{_shown(given)} cannot be opened ({reason}): give {_FORMS}.") from error


def _local_source(given: str) -> Source:
    path, column = _split_column(given)
    if path.is_dir() and (samples := _stored_samples(path)):
        return Source(given, "tokens", files=samples)
    if path.is_dir():
        return Source(given, "files", files=_files_in(path), column=column)
    if not path.is_file():
        if path.exists():
            raise CalibrationError(f"{path} is no regular file: save the text to one and give its path.")
        raise CalibrationError(f"There is no text {_shown(given)}: give {_FORMS}{_near(given)}.{_hub_hint(given)}")
    _refuse_pickle(path)
    stored = path.suffix.lower() == ".safetensors"
    if column is not None and path.suffix.lower() not in LOADERS:
        raise CalibrationError(f"{path} has no columns, so leave out :{column}.")
    return Source(given, "tokens" if stored else "files", files=(path,), column=column)


def documents(source: Source, role: Role) -> Iterator[Document]:
    """The documents of a source in order; a chat is a list of messages. Raises CalibrationError while reading.

    The papers' texts and stored tokens are no documents: ValueError.
    """
    if source.kind == "builtin":
        of_split = python_documents if source.repo == "python" else builtin_documents
        yield from of_split(source.split or ("train" if role == "calibration" else "test"))
    elif source.kind == "hub":
        rows = hub_rows(source.repo, source.config, split=source.split)
        prefix = f"hf:{source.repo}:{source.config or ''}:{source.split}:"
        yield from column_of(source.given, rows, source.column, prefix)
    elif source.kind == "files":
        prefix = source.given.removesuffix(f":{source.column}") + ":"
        for path in source.files:
            if path.suffix.lower() in LOADERS:
                yield from column_of(str(path), file_rows(path), source.column, prefix)
            else:
                yield _plain_text(path)
    else:
        raise ValueError(f"{source.given} is not made of documents.")


def _hub_source(given: str) -> Source:
    parts = given.split(":")[1:]
    if not _REPO.fullmatch(parts[0]) or len(parts) > 4:
        raise CalibrationError(
            f"{given!r} is not of the form hf:REPO[:CONFIG][:SPLIT][:COLUMN], such as hf:owner/name::train:text."
        )
    repo, config, split, column = (*parts, *[""] * (4 - len(parts)))
    return Source(given, "hub", repo=repo, config=config or None, split=split or "train", column=column or None)


def _shown(given: str) -> str:
    return repr(given if len(given) <= _LONGEST_SHOWN else given[:_LONGEST_SHOWN] + "...")


def _hub_hint(given: str) -> str:
    if not _REPO.fullmatch(given) or given.count("/") != 1:
        return ""
    return f" For the data set of that name on the hub, write hf:{given}."


def _near(given: str) -> str:
    near = difflib.get_close_matches(given, NAMES, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _split_column(given: str) -> tuple[Path, str | None]:
    path = _path(given)
    head, _, column = given.rpartition(":")
    if head and column and not path.exists() and _path(head).exists():
        return _path(head), column
    return path, None


def _path(given: str) -> Path:
    path = Path(given)
    return path.expanduser() if given.startswith("~") and not path.exists() else path


def _files_in(folder: Path) -> tuple[Path, ...]:
    visible = (p for p in sorted(folder.rglob("*")) if not any(s.startswith(".") for s in p.relative_to(folder).parts))
    files = tuple(p for p in visible if p.is_file() and (p.suffix.lower() in LOADERS or _looks_like_text(p)))
    if not files:
        raise CalibrationError(f"The folder {folder} holds no text, JSONL, CSV or Parquet file: give one that does.")
    return files


def _stored_samples(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that holds .safetensors and nothing else."""
    files = tuple(path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return files if all(path.is_file() and path.suffix.lower() == ".safetensors" for path in files) else ()


def _looks_like_text(path: Path) -> bool:
    if path.suffix.lower() in _NEVER_OPENED | {".safetensors"}:
        return False
    try:
        with path.open("rb") as stream:
            return b"\0" not in stream.read(4096)
    except OSError as error:
        raise _unreadable(path, error) from error


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in _NEVER_OPENED:
        raise CalibrationError(
            f"{path} may be a pickle, and never a pickle is opened because it can run code: "
            "save a .safetensors file with an integer tensor input_ids of shape (samples, length) instead."
        )


def _plain_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text ({error}): convert it (or unpack it), or give another file."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CalibrationError:
    return CalibrationError(f"{path} cannot be read ({error.strerror}): check its permissions.")
