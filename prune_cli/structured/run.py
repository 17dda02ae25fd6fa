"""The story of a structured run, top to bottom: decide, lay out, write what changed, report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import torch

from calibration.tokens import TokenSet
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.preflight import check_space
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.perplexity import perplexity, perplexity_before, read_texts
from prune_cli.engine.provenance import batch_size_of, versions
from prune_cli.packed.output import describe, output_bytes
from prune_cli.progress import Progress
from prune_cli.report.files import report_files
from prune_cli.report.types import Report
from prune_cli.request.request import PruneRequest
from prune_cli.structured.build_report import assemble_structured
from prune_cli.structured.config import config_from
from prune_cli.structured.depth import choose as depth
from prune_cli.structured.depth.refit import refit
from prune_cli.structured.moe import choose as experts
from prune_cli.structured.prepare import PreparedStructure, prepare_structured
from prune_cli.structured.stored_output import StoredOutput, stored_output
from prune_cli.structured.width import narrow as width


@torch.no_grad()
def prune_structured(request: PruneRequest, progress: Progress) -> Report:
    """Write a smaller dense model; raises and resumes as `prune` does."""
    begun = time.monotonic()
    job = prepare_structured(request)
    plan = _check(request, job)
    check_space(
        request.out, depth.bytes_at_most(request, job) if request.method == "depth" else output_bytes(job.checkpoint)
    )
    memory = PeakMemory(job.device)
    calibration, evaluation = read_texts(request, job, progress)
    with OutputFolder(request.out, job.checkpoint) as output:
        progress.stage(f"Looking at {len(job.checkpoint.files)} file(s)", 1)
        output.begin(fingerprint(request, job, calibration, evaluation), resume=request.resume)
        before = perplexity_before(request, job, evaluation, output, progress)
        if plan is not None:
            plan = width.spread(request, job, plan, calibration, output, progress)
            change = width.decide(job, plan)
        else:
            way = experts if request.method == "experts" else depth
            change = way.decide(request, job, calibration, output, progress)
        memory.look()
        stored = stored_output(job, change)
        layout = stored.layout
        progress.stage(f"Writing {len(layout.files)} file(s)", 1)
        output.lay_out(layout, stored.source, stored.read_as)
        write_slices(job, stored, output, progress)
        if plan is not None:
            change = width.write(request, job, plan, change, calibration, output, progress, memory)
        elif request.method == "depth" and job.options.fits and calibration is not None:
            change = refit(request, job, change, calibration, output, progress, memory)
        memory.look()
        config = config_from(change.config, job.model)
        after = perplexity(request, job, evaluation, output.checkpoint(), "Perplexity after", progress, config)
        output.copy_side_files()
        report = assemble_structured(
            request, job, change, output, calibration, evaluation, before, after, memory, time.monotonic() - begun
        )
        output.commit(
            report_files(report, job.source.folder),
            config=json.dumps(change.config, indent=2, ensure_ascii=False) + "\n",
        )
    return report


def _check(request: PruneRequest, job: PreparedStructure) -> width.WidthPlan | None:
    """Refuse what cannot be done before any work; width's plan is needed later."""
    if request.method == "width":
        return width.check(request, job)
    (experts if request.method == "experts" else depth).check(request, job)
    return None


def fingerprint(
    request: PruneRequest, job: PreparedStructure, calibration: TokenSet | None, evaluation: TokenSet | None
) -> dict[str, Any]:
    """All that the bytes of the output depend on, but for the input's files, which are hashed on the way."""
    return {
        "method": request.method,
        "options": asdict(job.options),
        "sparsity": request.sparsity,
        "packed": describe(job.checkpoint),
        "seed": request.seed,
        "calibration": calibration.sha256 if calibration else None,
        "batch_size": batch_size_of(request, job, calibration),
        "eval": evaluation.sha256 if evaluation else None,
        "device": job.device.type,
        "dtype": str(job.dtype),
        "versions": versions(),
    }


def write_slices(job: PreparedStructure, stored: StoredOutput, output: OutputFolder, progress: Progress) -> None:
    """Fill the places of `stored.slices`; blocks done before by an interrupted run are passed over."""
    by_block: dict[int, list[str]] = {}
    for name in stored.slices:
        block = stored.block[name]
        by_block.setdefault(len(job.model.blocks) if block is None else block, []).append(name)
    if by_block:
        progress.stage("Writing what is left of tensors", len(by_block))
    for block, names in sorted(by_block.items()):
        if block not in output.done:
            begun = time.monotonic()
            tensors = {name: _sliced(stored, name) for name in names}
            output.write_block(block, tensors, {"seconds": time.monotonic() - begun})
        progress.advance()
    output.wait()


def _sliced(stored: StoredOutput, name: str) -> torch.Tensor:
    part, tensor = stored.slices[name], stored.source.read(stored.tensors[name].source)
    if tensor.dtype.itemsize > 1:
        return tensor.index_select(part.axis, torch.tensor(part.entries))
    # torch selects no entries of float8.
    return tensor.view(torch.uint8).index_select(part.axis, torch.tensor(part.entries)).view(tensor.dtype)
