"""The texts of a run, and the perplexity of the model before it and of what it wrote."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from calibration.tokens import TokenSet
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.evaluate import evaluate
from prune_cli.engine.open_model import OpenModel, pick_batch_size
from prune_cli.engine.texts import read_tokens
from prune_cli.model.architecture import load_tokenizer
from prune_cli.packed.output import exact_values
from prune_cli.progress import Progress
from prune_cli.report.types import Evaluation
from prune_cli.request.request import PruneRequest


def read_texts(request: PruneRequest, job: OpenModel, progress: Progress) -> tuple[TokenSet | None, TokenSet | None]:
    """The calibration and the evaluation windows, where asked for. Evaluation always takes the whole text."""
    if job.calibration is None and job.evaluation is None:
        return None, None
    progress.stage("Reading text", 1)
    tokenizer = load_tokenizer(job.source.folder, job.trust_remote_code)
    calibration = evaluation = None
    if job.calibration is not None:
        calibration = read_tokens(
            job.calibration, job.model, tokenizer, "calibration", request.samples, request.seq_len, request.seed
        )
    if job.evaluation is not None:
        evaluation = read_tokens(
            job.evaluation, job.model, tokenizer, "evaluation", None, request.seq_len, request.seed
        )
    for tokens in (calibration, evaluation):
        for warning in tokens.warnings if tokens is not None else ():
            progress.say(f"warning: {warning}")
    return calibration, evaluation


def perplexity_before(
    request: PruneRequest, job: OpenModel, text: TokenSet | None, output: OutputFolder, progress: Progress
) -> Evaluation | None:
    """Measured once, also when the run is resumed."""
    if "evaluation_before" in output.notes:
        return Evaluation(**output.notes["evaluation_before"])
    before = perplexity(request, job, text, exact_values(job.checkpoint), "Perplexity before", progress)
    if before is not None:
        output.note("evaluation_before", asdict(before))
    return before


def perplexity(
    request: PruneRequest,
    job: OpenModel,
    text: TokenSet | None,
    checkpoint: Checkpoint,
    title: str,
    progress: Progress,
    config: Any | None = None,
) -> Evaluation | None:
    """Of the weights in `checkpoint`, whose model `config` describes where it is not the input's."""
    if text is None:
        return None
    model = job.model if checkpoint is job.checkpoint else job.with_checkpoint(checkpoint, config)
    progress.stage(title, len(model.blocks))
    batch_size = pick_batch_size(request.batch_size, job.device, text.windows.length)
    return evaluate(model, text.windows, batch_size, progress)
