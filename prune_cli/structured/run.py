"""The story of a structured run, top to bottom: decide, lay out, write what changed, report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from prune_cli.checkpoint.file_names import CARD
from prune_cli.checkpoint.inputs import KEEP_LIST, STATISTICS_FILE
from prune_cli.checkpoint.preflight import check_space
from prune_cli.checkpoint.shared_output import open_output
from prune_cli.engine.expected import sizes_of
from prune_cli.engine.generate import continued
from prune_cli.engine.inputs import check_weights, inputs_before
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.memory_limit import within_memory
from prune_cli.engine.pace import usual_pace
from prune_cli.engine.perplexity import perplexity_after, perplexity_before, read_texts
from prune_cli.engine.provenance import batch_size_of, measured, processes_of, versions
from prune_cli.engine.run_context import Run
from prune_cli.engine.texts import Texts
from prune_cli.engine.thin_calibration import thin_calibration
from prune_cli.packed.output import describe
from prune_cli.progress import Progress
from prune_cli.ranks.ranks import ALONE, Ranks
from prune_cli.report.files import report_files
from prune_cli.report.types import Report
from prune_cli.request.request import PruneRequest
from prune_cli.structured.build_report import assemble_structured
from prune_cli.structured.config import config_from
from prune_cli.structured.kept_tensors import renumbered, sliced
from prune_cli.structured.memory import estimated_memory
from prune_cli.structured.method import removal_of
from prune_cli.structured.plan import NewNumbers
from prune_cli.structured.prepare import PreparedStructure, prepare_structured
from prune_cli.structured.stages import stages_of
from prune_cli.structured.stored_output import StoredOutput, stored_output


@torch.no_grad()
def prune_structured(request: PruneRequest, progress: Progress, ranks: Ranks = ALONE) -> Report:
    """Write a smaller dense model; raises and resumes as `prune` does."""
    begun = time.monotonic()
    prepared = prepare_structured(request, ranks=ranks)
    removal = removal_of(prepared)
    if ranks.first:
        check_space(request.out, removal.bytes_at_most())
    with PeakMemory(prepared.device) as memory:
        texts = read_texts(prepared, progress)
        of_texts = sizes_of(prepared, texts)
        prepared = within_memory(prepared, estimated_memory(prepared, removal.cost(""), of_texts))
        removal = removal_of(prepared)
        left = removal.bytes_at_most() / prepared.checkpoint.nbytes
        pace = usual_pace(prepared.model)
        progress.expect(stages_of(prepared, removal.cost(""), of_texts, pace, left))
        inputs = inputs_before(prepared, texts)
        with open_output(request.out, prepared.checkpoint, prepared.source.folder, ranks) as output:
            run = Run(prepared, texts, output, progress, memory, inputs)
            progress.stage(f"Looking at {len(prepared.checkpoint.files)} file(s)", 1)
            output.begin(fingerprint(prepared, texts, inputs), resume=request.resume)
            check_weights(run)
            run.warn(*prepared.warnings)
            if texts.calibration is not None:
                maps = [info for info in prepared.model.tensor_map.values() if info.role == "linear map"]
                gram = getattr(prepared.options, "fits", False)
                run.warn(*thin_calibration(texts.calibration.windows.tokens, maps, gram=gram))
            before = perplexity_before(run)
            change = removal.decide(run)
            stored = stored_output(prepared, change)
            progress.stage(f"Writing {len(stored.layout.files)} file(s)", 1)
            output.lay_out(stored.layout, stored.source, stored.read_as)
            write_slices(run, stored, change.tables)
            change = removal.write(run, change)
            after = perplexity_after(run, config_from(change.config, prepared.model))
            evaluation, processes = measured(texts, before, after), processes_of(run)

            def end() -> Report:
                continuations = continued(run, config_from(change.config, prepared.model))
                output.copy_side_files()
                report = assemble_structured(run, removal.asked(), change, evaluation, time.monotonic() - begun)
                report = replace(report, continuations=continuations, processes=processes)
                output.commit(
                    report_files(report, prepared.source.folder / CARD),
                    config=json.dumps(change.config, indent=2, ensure_ascii=False) + "\n",
                )
                return report

            return ranks.on_first(end)


def fingerprint(prepared: PreparedStructure, texts: Texts, inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that the bytes of the output depend on, but for the input's files, which are hashed on the way."""
    request = prepared.request
    return {
        "method": request.method,
        "options": asdict(prepared.options),
        "sparsity": request.sparsity,
        "statistics": inputs.get(STATISTICS_FILE),
        "keep_list": inputs.get(KEEP_LIST),
        "packed": describe(prepared.checkpoint),
        "text_only": request.text_only,
        "seed": request.seed,
        "calibration": texts.calibration.sha256 if texts.calibration else None,
        "batch_size": batch_size_of(prepared, texts.calibration),
        "eval": texts.evaluation.sha256 if texts.evaluation else None,
        "device": prepared.device.type,
        "dtype": str(prepared.dtype),
        "versions": versions(),
    }


def write_slices(run: Run[PreparedStructure], stored: StoredOutput, tables: Mapping[str, NewNumbers]) -> None:
    """Fill the places of `stored.slices` and of `tables`; blocks that an interrupted run has done are passed over."""
    by_block: dict[int, list[str]] = {}
    for name in (*stored.slices, *tables):
        block = stored.block[name]
        by_block.setdefault(len(run.model.blocks) if block is None else block, []).append(name)
    if by_block:
        run.progress.stage("Writing what is left of tensors", len(by_block))
    for block, names in sorted(by_block.items()):
        if block not in run.output.done:
            begun = time.monotonic()
            tensors = {
                name: sliced(stored.source.read(stored.tensors[name].source), stored.slices[name])
                for name in names
                if name in stored.slices
            }
            tensors |= {name: renumbered(run.plan.checkpoint, name, tables[name]) for name in names if name in tables}
            run.output.write_block(block, tensors, {"seconds": time.monotonic() - begun})
        run.progress.advance()
    run.output.wait()
