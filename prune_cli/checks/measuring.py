"""The figures of a model folder: counted in its files, measured by running it, whatever its report says."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prune_cli.checkpoint.file_names import REPORT_JSON
from prune_cli.checkpoint.inputs import EVALUATION, check_inputs, hash_file
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.source import Source, resolve_model
from prune_cli.checks.fields import told_fields
from prune_cli.checks.figures import OWN, Figures, told_text
from prune_cli.checks.inspection import inspect_model, part_of
from prune_cli.checks.loadable import load_failure
from prune_cli.checks.request import GateRequest
from prune_cli.errors import RequestError
from prune_cli.progress import Progress
from prune_cli.report.dense_model import check_dense
from prune_cli.report.read import read_report
from prune_cli.report.types import Report
from prune_cli.sparse.convert import ConvertRequest, convert
from prune_cli.sparse.format import is_sparse

_RUN = {"perplexity", "dense_perplexity", "kl", "top1"}
_BESIDE_DENSE = {"dense_perplexity", "kl", "top1"}


@dataclass(frozen=True)
class Measured:
    """`against` is the dense model as it was named, None where no rule needs one."""

    figures: Figures
    against: str | None
    warnings: tuple[str, ...] = ()


def measure_figures(request: GateRequest, progress: Progress) -> Measured:
    """Measure what the rules need and nothing else; a report in the folder only says what to compare with.

    Raises RequestError, before any measurement, where a rule cannot be decided: no text, no dense model.
    """
    needs = request.asked.needs
    source = resolve_model(request.target, request.revision)
    report = read_report(source.folder).report if (source.folder / REPORT_JSON).is_file() else None
    data = request.data or (report.request.eval if report else None)
    against = request.against or (report.model.given if report else None)
    told = told_fields(report) if report else {}
    only_told = dict.fromkeys(needs - OWN - told.keys(), f"no report in {source.folder} tells it")
    request.asked.check_decidable({**_missing(data, against), **only_told})
    dense, warnings = None, ()
    if against is not None and needs & {*_BESIDE_DENSE, "dense_bytes"}:
        dense = _dense(request, against, report)
        warnings = check_dense(source.folder, dense.folder, allow=request.allow_changed_inputs)
    figures: dict[str, Any] = {"told": told}
    if "bytes" in needs:
        figures["bytes"] = Checkpoint.open(source.folder).nbytes
    if "dense_bytes" in needs and dense is not None:
        figures["dense_bytes"] = Checkpoint.open(dense.folder).nbytes
    if "load_failure" in needs:
        progress.stage("Loading it in plain transformers", 1)
        figures["load_failure"] = load_failure(source.folder, trust_remote_code=request.trust_remote_code)
    with _decoded(source.folder, progress) as weights:
        if report is not None:
            hashes = report.output.hashes()
            figures["changed_files"] = _changed_files((source.folder, weights), hashes, progress)
        if "sparsity" in needs:
            figures |= _sparsity(weights, report)
        if needs & _RUN and data is not None:
            beside = dense if needs & _BESIDE_DENSE else None
            run, message = _run(request, weights, beside, data, report, progress)
            figures |= run
            warnings = tuple(dict.fromkeys((*warnings, *message)))
    return Measured(Figures(**figures), against if dense is not None else None, warnings)


@contextmanager
def _decoded(folder: Path, progress: Progress) -> Iterator[Path]:
    """The folder itself; for sparse safetensors a dense copy, which lives until the end of the block."""
    if not any(is_sparse(folder / file) for file in Checkpoint.open(folder).files):
        yield folder
        return
    with TemporaryDirectory(prefix="prune-cli-check-") as place:
        convert(ConvertRequest(str(folder), Path(place) / "dense", "dense"), progress)
        yield Path(place) / "dense"


def _missing(data: str | None, against: str | None) -> dict[str, str]:
    no_text = "no text to measure on: add --data SOURCE"
    no_dense = "no dense model to compare with: add --against DENSE"
    missing = dict.fromkeys(_RUN, no_text) if data is None else {}
    return missing if against is not None else {**missing, **dict.fromkeys((*_BESIDE_DENSE, "dense_bytes"), no_dense)}


def _dense(request: GateRequest, against: str, report: Report | None) -> Source:
    """The dense model, of the commit in the report where it is the report's."""
    if request.against is not None:
        return resolve_model(against, None)
    assert report is not None
    try:
        return resolve_model(against, report.model.revision)
    except RequestError as error:
        raise RequestError(
            f"The dense model that the report names cannot be opened ({str(error).rstrip('.')}): say --against DENSE."
        ) from error


def _changed_files(folders: Collection[Path], hashes: Mapping[str, Collection[str]], progress: Progress) -> list[str]:
    """The files that in none of `folders` (the model's, and its decoded copy) are what the report describes."""
    progress.stage(f"Comparing {len(hashes)} file(s) with the report", len(hashes))
    changed = []
    for name, expected in hashes.items():
        if not any((each / name).is_file() and hash_file(each / name) in expected for each in folders):
            changed.append(name)
        progress.advance()
    return changed


def _sparsity(folder: Path, report: Report | None) -> dict[str, Any]:
    """Counted in the tensors that the report calls pruned; without a report in all matrices of the blocks."""
    tensors = inspect_model(str(folder)).tensors
    if report is None:
        chosen = [tensor for tensor in tensors if part_of(tensor.name) == "blocks" and len(tensor.shape) >= 2]
        words = "the matrices of the blocks (there is no report that says which were pruned)"
    else:
        named = {tensor.name for tensor in report.tensors if tensor.action == "pruned"}
        chosen = [tensor for tensor in tensors if tensor.name in named]
        words = "the pruned tensors"
    count = sum(tensor.parameters for tensor in chosen)
    if not count:
        raise RequestError(
            f"The sparsity cannot be decided: {folder} has none of {words} (structured methods leave no zeros: use "
            "--max-size)."
        )
    return {"sparsity": sum(tensor.zeros or 0 for tensor in chosen) / count, "sparsity_of": words}


def _windows(request: GateRequest, report: Report | None) -> tuple[int | None, int]:
    """How many windows, None for all, and the seed that they are drawn with: the report's, unless said otherwise."""
    text = report.evaluation.text if report is not None and report.evaluation is not None else None
    if request.eval_windows is not None or request.data is not None or text is None or text.seed is None:
        return request.eval_windows, 0
    return text.samples, text.seed


def _run(
    request: GateRequest,
    weights: Path,
    dense: Source | None,
    data: str,
    report: Report | None,
    progress: Progress,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Perplexities and distances on one text, both models in step."""
    from prune_cli.evaluation.perplexity import measure
    from prune_cli.evaluation.requests import EvaluationRequest

    own_length = report.request.seq_len if report is not None and request.data is None else None
    windows, seed = _windows(request, report)
    result = measure(
        EvaluationRequest(
            model=str(weights),
            data=data,
            against=str(dense.folder) if dense is not None else None,
            eval_windows=windows,
            seed=seed,
            seq_len=own_length if request.seq_len is None else request.seq_len,
            device=request.device,
            dtype=request.dtype,
            batch_size=request.batch_size,
            trust_remote_code=request.trust_remote_code,
            allow_changed_inputs=True,  # told before
        ),
        progress,
    )
    warnings = result.warnings
    if report is not None and report.evaluation is not None and request.asks_for_the_reports_text:
        recorded, found = {EVALUATION: report.evaluation.text.sha256}, {EVALUATION: result.text.sha256}
        warnings += check_inputs(f"{request.target}/{REPORT_JSON}", recorded, found, allow=request.allow_changed_inputs)
    figures: dict[str, Any] = {"perplexity": result.evaluation.perplexity, "text": told_text(result.text)}
    if result.comparison is not None:
        figures["dense_perplexity"] = result.comparison.dense.perplexity
        figures["kl"], figures["top1"] = result.comparison.kl_from_dense, result.comparison.top1_agreement
    return figures, warnings
