"""The story of a soup: survey, copy of the first model, average after average over its bytes, report, one rename."""

from __future__ import annotations

import time
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.checkpoint.file_names import REPORT_JSON, why_not_copied
from prune_cli.checkpoint.inputs import check_inputs, hash_files
from prune_cli.checkpoint.layout import same_layout
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.preflight import check_output, check_space
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.source import resolve_model
from prune_cli.progress import Progress, Silent
from prune_cli.report.read import read_report
from prune_cli.soup.average import average
from prune_cli.soup.report import SCHEMA_VERSION, SOUP_REPORT, SoupInput, SoupReport, SoupTensor, SoupTotals
from prune_cli.soup.request import Masks, SoupRequest
from prune_cli.soup.survey import Ingredient, TensorSurvey, check_alike, survey
from prune_cli.sparse.dense_view import refuse_sparse
from prune_cli.version import __version__

# Tensors that are written, and noted as done, together.
_GROUP_BYTES = 1 << 26


def soup(request: SoupRequest, progress: Progress | None = None) -> SoupReport:
    """Average as `request` says and write OUT; returns the report that is written there too.

    Raises RequestError before anything is written where the models do not go together, PruneError where the run fails.
    """
    progress = progress or Silent()
    request.check()
    begun = time.monotonic()
    ingredients = _open(request)
    warnings = check_alike(ingredients) + _check_origins(ingredients, allow=request.allow_changed_inputs)
    progress.stage("Comparing the models", len(ingredients[0].checkpoint.entries))
    found = survey(ingredients, request.masks, progress)
    first = ingredients[0].checkpoint
    if request.dry_run:
        return _report(request, ingredients, found, None, warnings, begun)
    hashes = [hash_files(each.source.folder, each.checkpoint.files) for each in ingredients]
    with OutputFolder(request.out, first) as output:
        progress.stage(f"Copying {len(first.files)} file(s)", 1)
        output.begin(_fingerprint(request, hashes), same_layout(first), resume=request.resume)
        progress.stage("Averaging", len(found))
        for number, group in enumerate(_groups(found, first)):
            if number not in output.done:
                averaged = {each.name: _average(ingredients, each, request.masks) for each in group}
                output.write_block(number, averaged, {})
            progress.advance(len(group))
        output.wait()
        output.copy_side_files()
        warnings += tuple(why_not_copied(file) for file in output.not_copied)
        written = _Written(output.checkpoint(), output.hashes(), hashes)
        report = _report(request, ingredients, found, written, warnings, begun)
        output.commit({SOUP_REPORT: report.to_json()})
    return report


def _open(request: SoupRequest) -> list[Ingredient]:
    sources = [resolve_model(given, None) for given in request.models]
    ingredients = [
        Ingredient(source, Checkpoint.open(source.folder), weight)
        for source, weight in zip(sources, request.shares(), strict=True)
    ]
    for ingredient in ingredients:
        refuse_sparse(ingredient.checkpoint)
        check_output(request.out, ingredient.checkpoint.folder, resume=request.resume, overwrite=request.overwrite)
    check_space(request.out, ingredients[0].checkpoint.nbytes)
    return ingredients


def _check_origins(ingredients: Sequence[Ingredient], *, allow: bool) -> tuple[str, ...]:
    """As `check_inputs`: those that have a report were pruned from one dense model."""
    reported = [each for each in ingredients if (each.source.folder / REPORT_JSON).is_file()]
    warnings: tuple[str, ...] = ()
    if reported:
        first, *others = [read_report(each.source.folder).report.model.files for each in reported]
        for ingredient, files in zip(reported[1:], others, strict=True):
            owner = f"{ingredient.source.given}, unlike {reported[0].source.given},"
            warnings += check_inputs(owner, files, first, allow=allow)
    return warnings


def _fingerprint(request: SoupRequest, hashes: Sequence[dict[str, str]]) -> dict[str, object]:
    return {
        "command": "soup",
        "version": __version__,
        "weights": request.shares(),
        "masks": request.masks,
        "models": hashes,
    }


def _groups(found: Sequence[TensorSurvey], checkpoint: Checkpoint) -> Iterator[list[TensorSurvey]]:
    """What differs, in the order of the files."""
    group: list[TensorSurvey] = []
    size = 0
    for each in found:
        if each.identical:
            continue
        if group and size + checkpoint.entries[each.name].nbytes > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(each)
        size += checkpoint.entries[each.name].nbytes
    if group:
        yield group


def _average(ingredients: Sequence[Ingredient], each: TensorSurvey, masks: Masks) -> typing.Any:
    read = [partial(ingredient.checkpoint.read, each.name) for ingredient in ingredients]
    return average(each.name, read, [ingredient.weight for ingredient in ingredients], masks, sparse=each.sparse)


@dataclass(frozen=True)
class _Written:
    """The output's weights, its files with their hashes, and those of each input."""

    checkpoint: Checkpoint
    files: dict[str, str]
    inputs: Sequence[dict[str, str]]


def _report(
    request: SoupRequest,
    ingredients: Sequence[Ingredient],
    found: Sequence[TensorSurvey],
    written: _Written | None,
    warnings: tuple[str, ...],
    begun: float,
) -> SoupReport:
    zeros = {each.name: None if written is None else _zeros(written.checkpoint, each.name) for each in found}
    sparse = [each for each in found if each.sparse]
    sparse_parameters = sum(each.parameters for each in sparse)
    entries = ingredients[0].checkpoint.entries
    return SoupReport(
        schema_version=SCHEMA_VERSION,
        tool={"name": "prune-cli", "version": __version__},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        masks=request.masks,
        inputs=[
            SoupInput(
                model=ingredient.source.given,
                revision=ingredient.source.revision,
                weight=ingredient.weight,
                files=written.inputs[index] if written is not None else {},
                sparsity=sum(each.zeros[index] for each in sparse) / sparse_parameters if sparse else None,
            )
            for index, ingredient in enumerate(ingredients)
        ],
        output={"folder": str(request.out), "files": written.files} if written is not None else None,
        totals=SoupTotals(
            tensors=len(found),
            averaged=sum(not each.identical for each in found),
            sparse=len(sparse),
            parameters=sum(each.parameters for each in found),
            sparse_parameters=sparse_parameters,
            sparsity_of_sparse=_share(zeros, sparse),
            sparsity_of_model=_share(zeros, found),
        ),
        tensors=[
            SoupTensor(
                name=each.name,
                shape=entries[each.name].shape,
                dtype=entries[each.name].dtype,
                action="identical" if each.identical else "averaged",
                sparse=each.sparse,
                sparsity=_share(zeros, [each]),
            )
            for each in found
        ],
        warnings=warnings,
        seconds=time.monotonic() - begun,
    )


def _zeros(written: Checkpoint, name: str) -> int | None:
    if written.entries[name].dtype not in FLOATS:
        return None
    values = written.read(name)
    return values.numel() - int(values.count_nonzero())


def _share(zeros: dict[str, int | None], tensors: Sequence[TensorSurvey]) -> float | None:
    """The zeros of the output among the weights of `tensors`; None where none of them can be counted."""
    counted = [each for each in tensors if zeros[each.name] is not None]
    total = sum(each.parameters for each in counted)
    return sum(zeros[each.name] or 0 for each in counted) / total if total else None
