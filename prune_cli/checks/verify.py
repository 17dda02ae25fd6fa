"""`prune-cli verify`: whether a model is sound, is what its report says, and still holds the dense model's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from prune_cli.checkpoint.dtypes import EXPONENTS
from prune_cli.checkpoint.file_names import CONFIG_FILE, RECOVER_JSON, REPORT_JSON
from prune_cli.checkpoint.source import resolve_model
from prune_cli.checks.packed_bits import stored_tensors
from prune_cli.errors import PruneError, RequestError
from prune_cli.progress import Progress, Silent
from prune_cli.recovery.read import read_recovery
from prune_cli.recovery.report import RecoveryReport
from prune_cli.report.dense_model import change_of_dense
from prune_cli.report.read import read_report
from prune_cli.report.types import Report, TensorReport
from prune_cli.request.pipeline import make_pipeline
from prune_cli.sparse.bit_patterns import Stored, StoredTensors
from prune_cli.sparse.config import is_ours

_MOST_THREADS = 8
_WRITTEN = ("pruned", "kept", "narrowed", "refitted")


@dataclass(frozen=True)
class Problem:
    """What is wrong with which tensor or file."""

    name: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """`checked` tells what was looked at, `skipped` what could not be and why; sound if there are no `problems`."""

    model: str
    against: str | None
    checked: tuple[str, ...]
    skipped: tuple[str, ...]
    problems: tuple[Problem, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def verify(
    given: str,
    against: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    *,
    allow_changed: bool = False,
) -> Verification:
    """Look at every byte of a model's weights. Raises RequestError for a folder that cannot be opened at all.

    Damage within it is a problem of the result, by name, and so is whatever does not agree with `prune_report.json` or
    with the dense model `against`, which is the one that was pruned unless `allow_changed`.
    """
    progress = progress or Silent()
    folder = resolve_model(given, revision).folder
    stored = stored_tensors(folder)
    report = read_report(folder).report if (folder / REPORT_JSON).is_file() else None
    dense = None if against is None else stored_tensors(resolve_model(against, None).folder)
    recovered = read_recovery(folder / RECOVER_JSON) if (folder / RECOVER_JSON).is_file() else None
    verifier = _Verifier(stored, report, dense, recovered)
    progress.stage(f"Verifying {len(stored.tensors)} tensors", len(stored.tensors))
    problems = [*verifier.config(), *verifier.names()]
    change = None if dense is None else change_of_dense(folder, dense.checkpoint.folder)
    if change is not None and not allow_changed:
        problems.append(Problem(REPORT_JSON, f"{change}: the dense model is not the one that was pruned."))
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        hashes = [pool.submit(_told, file, lambda file=file: verifier.file(file)) for file in verifier.hashed]
        for found in pool.map(lambda name: _told(name, lambda: verifier.tensor(name)), stored.tensors):
            problems += found
            progress.advance()
        problems += [problem for job in hashes for problem in job.result()]
    skipped = [*verifier.skipped(), *([f"that the dense model is the one that was pruned: {change}"] if change else [])]
    return Verification(given, against, tuple(verifier.checked()), tuple(skipped), tuple(_once(problems)))


def _told(name: str, check: Callable[[], Iterable[Problem]]) -> list[Problem]:
    try:
        return list(check())
    except PruneError as error:
        return [Problem(name, str(error))]


def _once(problems: Iterable[Problem]) -> Iterator[Problem]:
    """A damaged tensor shows in its file's hash as well: told once, in its own words."""
    seen: set[str] = set()
    for problem in problems:
        if problem.problem not in seen:
            seen.add(problem.problem)
            yield problem


class _Verifier:
    """The checks; each yields the problems it finds."""

    def __init__(
        self,
        stored: StoredTensors,
        report: Report | None,
        dense: StoredTensors | None,
        recovered: RecoveryReport | None = None,
    ) -> None:
        self._stored = stored
        self._report = report
        self._dense = dense
        self._told = {t.name: t for t in report.tensors if t.action in _WRITTEN} if report else {}
        self._reshaped = report is not None and report.structure is not None
        self._new_values = _new_values(report)
        self._recovered = {t.name: t for t in recovered.tensors} if recovered else {}
        self._hashes_in = RECOVER_JSON if recovered else REPORT_JSON
        written = recovered or report
        self.hashed = written.output.hashes() if written else {}

    def checked(self) -> Iterator[str]:
        yield f"headers and index of {len(self._stored.checkpoint.files)} file(s)"
        yield f"that {len(self._stored.tensors)} tensors hold finite weights"
        encoded = sum(t.sparse is not None for t in self._stored.tensors.values())
        if encoded:
            yield f"coding and checksums of {encoded} tensors"
        if self._report is not None:
            yield f"sha256 of {len(self.hashed)} file(s) and zeros of {len(self._told)} tensors, against {REPORT_JSON}"
        if self._recovered:
            files, tensors = len(self.hashed), len(self._recovered)
            yield f"sha256 of {files} file(s) and zeros of {tensors} tensors, against {RECOVER_JSON}"
        if self._dense is not None and self._recovered:
            yield "that zeros are where they were, and tensors that were not trained, against the other model"
        elif self._dense is not None and not self._reshaped:
            only = "zeros and kept tensors" if self._new_values else "every weight that is not zero"
            yield f"{only}, against the dense model"

    def skipped(self) -> Iterator[str]:
        if self._report is None and not self._recovered:
            yield f"hashes and patterns: there is no {REPORT_JSON}"
        if self._recovered and self._dense is not None:
            yield f"values of trained tensors: {RECOVER_JSON} says that they are new"
        if self._dense is not None and self._reshaped:
            yield "the dense model's weights: the report says that shapes were changed"
        elif self._dense is not None and self._new_values:
            yield "values of the kept weights: the report says that the method solved for new ones"

    def config(self) -> Iterator[Problem]:
        """Sparse files and the entry in config.json go together."""
        path = self._stored.checkpoint.folder / CONFIG_FILE
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            yield Problem(CONFIG_FILE, f"{path} is not a JSON object.")
            return
        sparse = len(self._stored.shards)
        if 0 < sparse < len(self._stored.checkpoint.files):
            yield Problem(CONFIG_FILE, "Some files are sparse and some are dense.")
        if bool(sparse) != is_ours(config) and path.is_file():
            state = "sparse, but config.json does not say so" if sparse else "dense, but config.json says sparse"
            yield Problem(CONFIG_FILE, f"The files are {state}.")

    def names(self) -> Iterator[Problem]:
        """The report, the model and the dense model have the same tensors."""
        here = self._stored.tensors
        others = [(REPORT_JSON, set(self._told))] if self._report else []
        if self._dense is not None and not self._reshaped:
            others.append(("the dense model", set(self._dense.tensors)))
        for other, names in others:
            for name in sorted(here.keys() ^ names):
                where = f"in {other} and not in the model" if name in names else f"in the model and not in {other}"
                yield Problem(name, f"{name} is {where}.")

    def file(self, file: str) -> Iterator[Problem]:
        """The hash of a file is the report's, as it lies there or of the dense file that it stands for."""
        if file not in self._stored.checkpoint.files:
            yield Problem(file, f"{file} is in {self._hashes_in}, but not there.")
            return
        expected = self.hashed[file]
        if self._stored.sha256(file) in expected:
            return
        if file not in self._stored.shards or self._stored.dense_sha256(file) not in expected:
            yield Problem(file, f"{file} does not have the sha256 that {self._hashes_in} has of it.")

    def tensor(self, name: str) -> Iterator[Problem]:
        stored, reported = self._stored.tensors[name], self._told.get(name)
        if stored.sparse is not None:
            for _ in self._stored.pieces(name):
                pass
        bits = self._stored.bits(name)
        if stored.is_float and (broken := _not_finite(bits, stored.dense.dtype)):
            yield Problem(name, f"{name} holds {broken} weights that are not finite.")
        if reported is not None:
            yield from _as_reported(name, stored, bits, reported)
        if self._recovered:
            yield from self._as_recovered(name, stored, bits)
        elif self._dense is not None and not self._reshaped and name in self._dense.tensors:
            pruned = self._report is None or (reported is not None and reported.action == "pruned")
            yield from self._as_dense(name, stored, bits, pruned)

    def _as_recovered(self, name: str, stored: Stored, bits: np.ndarray) -> Iterator[Problem]:
        """As many zeros as the report says, each where the model before the recovery, if it is there, has one."""
        reported = self._recovered.get(name)
        zero = (bits << 1) == 0
        if reported is None:
            yield Problem(name, f"{name} is in the model and not in {RECOVER_JSON}.")
        elif reported.zeros is not None and stored.is_float and int(np.count_nonzero(zero)) != reported.zeros:
            yield Problem(name, f"{name} has {np.count_nonzero(zero)} zeros, {RECOVER_JSON} has {reported.zeros}.")
        if self._dense is None or name not in self._dense.tensors:
            return
        other = self._dense.tensors[name]
        if (other.dense.dtype, other.dense.shape) != (stored.dense.dtype, stored.dense.shape):
            yield Problem(name, f"{name} has another dtype or shape than in the other model.")
            return
        before = self._dense.bits(name)
        if reported is not None and reported.action == "kept" and (changed := int(np.count_nonzero(bits != before))):
            yield Problem(
                name, f"{name} differs from the other model in {changed} elements, though it was not trained."
            )
        lost = int(np.count_nonzero(zero != ((before << 1) == 0)))
        if lost and stored.is_float:
            yield Problem(name, f"{name} has zeros in other places than the other model: {lost} differ.")

    def _as_dense(self, name: str, stored: Stored, bits: np.ndarray, pruned: bool) -> Iterator[Problem]:
        assert self._dense is not None
        other = self._dense.tensors[name]
        if (other.dense.dtype, other.dense.shape) != (stored.dense.dtype, stored.dense.shape):
            yield Problem(name, f"{name} has another dtype or shape than in the dense model.")
            return
        trained = (reported := self._told.get(name)) is not None and reported.action == "refitted"
        if trained or (pruned and self._new_values):
            return
        differ = bits != self._dense.bits(name)
        changed = int(np.count_nonzero(differ & (bits != 0) if pruned else differ))
        if changed:
            kind = "weights that were kept" if pruned else "elements, though it was not pruned"
            yield Problem(name, f"{name} differs from the dense model in {changed} {kind}.")


def _not_finite(bits: np.ndarray, dtype: str) -> int:
    """How many of the floats, flat bit patterns, are NaN or infinite: their exponents are all ones."""
    exponent = bits.dtype.type(EXPONENTS[dtype])
    return int(np.count_nonzero((bits & exponent) == exponent))


def _new_values(report: Report | None) -> bool:
    """Whether the method of the report gives kept weights other values; a method unknown here counts as one."""
    if report is None:
        return False
    request = report.request
    if request.match_blocks:
        return True
    try:
        return make_pipeline(request.method, request.refine, reconstruct=request.reconstruct, options={}).new_values
    except RequestError:
        return True


def _as_reported(name: str, stored: Stored, bits: np.ndarray, reported: TensorReport) -> Iterator[Problem]:
    """Shape, dtype, number of zeros and pattern are those of the report."""
    entry = stored.dense
    # Reports of before told the dtype of the values that codes stand for.
    if reported.dtype not in (entry.dtype, stored.codes) or entry.shape != reported.shape:
        shape = "x".join(map(str, reported.shape))
        yield Problem(name, f"{name} is no {reported.dtype} of {shape}, as {REPORT_JSON} says.")
        return
    if reported.sparsity is None or not stored.is_float:
        return
    nonzero = (bits << 1) != 0
    zeros = entry.count - int(np.count_nonzero(nonzero))
    expected = round(reported.sparsity * entry.count)
    if zeros != expected:
        yield Problem(name, f"{name} has {zeros} zeros, {REPORT_JSON} has {expected}.")
    if reported.action == "pruned" and (groups := reported.n_of_m):
        keep, of = groups
        if not _follows(nonzero.reshape(entry.shape), keep, of):
            yield Problem(name, f"{name} does not keep {keep} of every {of} weights, as {REPORT_JSON} says.")


def _follows(nonzero: np.ndarray, keep: int, of: int) -> bool:
    """Along the last dimension, or the one before it for matrices stored (in, out)."""
    for matrix in (nonzero, nonzero.swapaxes(-1, -2)):
        if matrix.shape[-1] % of == 0 and matrix.reshape(-1, of).sum(1).max() <= keep:
            return True
    return False
