"""The story of a structured run, top to bottom: decide, lay out, write what changed, report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import torch

from calibration.tokens import TokenSet
from prune_cli.assemble import batch_size_of, versions
from prune_cli.memory import PeakMemory
from prune_cli.output import OutputFolder
from prune_cli.output_place import check_space
from prune_cli.packed.output import describe, output_bytes
from prune_cli.perplexity import perplexity, perplexity_before, read_texts
from prune_cli.progress import Progress
from prune_cli.report import Report
from prune_cli.report_files import report_files
from prune_cli.request import PruneRequest
from prune_cli.structured import depth, experts, width
from prune_cli.structured.assemble import assemble_structured
from prune_cli.structured.config import config_from
from prune_cli.structured.cuts import write_cuts
from prune_cli.structured.prepare import StructuredJob, prepare_structured
from prune_cli.structured.refit import refit
from prune_cli.structured.stored_output import stored_output


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
        write_cuts(job, stored, output, progress)
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


def _check(request: PruneRequest, job: StructuredJob) -> width.WidthPlan | None:
    """Refuse what cannot be done before any work; width's plan is needed later."""
    if request.method == "width":
        return width.check(request, job)
    (experts if request.method == "experts" else depth).check(request, job)
    return None


def fingerprint(
    request: PruneRequest, job: StructuredJob, calibration: TokenSet | None, evaluation: TokenSet | None
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
