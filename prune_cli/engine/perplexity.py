"""The texts of a run, and the perplexity of the model before it and of what it wrote."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.eval_windows import usual_windows
from prune_cli.engine.evaluate import evaluate, passes_of
from prune_cli.engine.open_model import OpenModel, usual_length
from prune_cli.engine.run_context import Run
from prune_cli.engine.texts import TextReader, Texts, read_evaluation
from prune_cli.model.architecture import load_tokenizer
from prune_cli.packed.output import exact_values
from prune_cli.progress import Progress
from prune_cli.report.types import Evaluation

BEFORE, AFTER = "Perplexity before", "Perplexity after"


def read_texts(opened: OpenModel, progress: Progress) -> Texts:
    """The calibration and the evaluation windows, where asked for; of several ranks the first reads."""
    if opened.calibration is None and opened.evaluation is None:
        return Texts(None, None)
    return opened.ranks.on_first(lambda: _read_texts(opened, progress))


def _read_texts(opened: OpenModel, progress: Progress) -> Texts:
    progress.stage("Reading text", 1)
    request = opened.request
    tokenizer = load_tokenizer(opened.source.folder, opened.trust_remote_code, opened.model.config)
    reader = TextReader(opened.model, tokenizer, request.seq_len, request.seed)
    calibration = evaluation = None
    if opened.calibration is not None:
        calibration = reader.read(opened.calibration, "calibration", request.samples)
    if opened.evaluation is not None:
        windows = request.eval_windows
        if windows is None:
            samples, length = (0, usual_length(opened)) if calibration is None else calibration.ids.shape
            windows = usual_windows(opened, samples, length)
        evaluation = read_evaluation(reader, opened.evaluation, windows)
    for tokens in (calibration, evaluation):
        for warning in tokens.warnings if tokens is not None else ():
            progress.say(f"warning: {warning}")
    return Texts(calibration, evaluation)


def perplexity_before(run: Run[OpenModel]) -> Evaluation | None:
    """Measured once, also when the run is resumed."""
    if "evaluation_before" in run.output.notes:
        return Evaluation(**run.output.notes["evaluation_before"])
    before = _perplexity(run, exact_values(run.plan.checkpoint), BEFORE)
    if before is not None:
        run.output.note("evaluation_before", asdict(before))
    return before


def perplexity_after(run: Run[OpenModel], config: Any | None = None) -> Evaluation | None:
    """Of what was written, whose model `config` describes where it is not the input's."""
    return _perplexity(run, run.output.checkpoint(), AFTER, config)


def _perplexity(
    run: Run[OpenModel], checkpoint: Checkpoint, title: str, config: Any | None = None
) -> Evaluation | None:
    """Of the weights in `checkpoint`; None where no text was given."""
    text = run.texts.evaluation
    if text is None:
        return None
    plan = run.plan
    model = plan.model if checkpoint is plan.checkpoint else plan.with_checkpoint(checkpoint, config)
    batching = plan.batching(text.windows)
    run.progress.stage(title, len(model.blocks) * passes_of(model, text.windows, batching))
    return evaluate(model, text.windows, batching, run.progress, run.ranks)
