"""`prune-cli eval`: a model's perplexity, and its distance to a dense one, streamed block by block."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch

from calibration.batch import Batch
from prune_cli.checkpoint.source import Source, resolve_model
from prune_cli.engine.activation_budget import ActivationBudget, Batching
from prune_cli.engine.estimated_memory import LIBRARIES, Estimate, evaluation_phase
from prune_cli.engine.evaluate import PROTOCOL, compare, evaluate, passes_of
from prune_cli.engine.memory_limit import fitted
from prune_cli.engine.open_model import pick_batch_size, pick_device, pick_dtype
from prune_cli.engine.provenance import text_report
from prune_cli.engine.texts import TextReader, check_seq_len, read_evaluation
from prune_cli.errors import RequestError
from prune_cli.evaluation.requests import EvaluationRequest
from prune_cli.model.architecture import load_tokenizer
from prune_cli.model.open_checkpoint import open_checkpoint
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.preflight.models_and_texts import open_text
from prune_cli.progress import Progress, Silent
from prune_cli.ranks.environment import SILENCE_SECONDS
from prune_cli.ranks.join import joined
from prune_cli.ranks.ranks import Ranks
from prune_cli.report.comparison import Comparison
from prune_cli.report.dense_model import check_dense, revision_of_dense
from prune_cli.report.memory import MemoryPlan
from prune_cli.report.types import Evaluation, TextReport


@dataclass(frozen=True)
class EvaluationResult:
    """`comparison` is None without a dense model; all figures are on the windows of `text`.

    `memory` is what the run was fitted into, None where it was as usual.
    """

    model: str
    against: str | None
    protocol: str
    text: TextReport
    device: str
    compute_dtype: str
    evaluation: Evaluation
    comparison: Comparison | None
    memory: MemoryPlan | None
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


@torch.no_grad()
def measure(
    request: EvaluationRequest, progress: Progress | None = None, *, rank_timeout: float = SILENCE_SECONDS
) -> EvaluationResult:
    """Evaluate as `request` says. Raises RequestError where it cannot be met, PruneError where the run fails.

    Where torchrun or the like has started several processes, they share the windows; `rank_timeout` as in `prune`.
    """
    with joined(request.device, rank_timeout) as ranks:
        return _measure(request, (progress if ranks.first else None) or Silent(), ranks)


def _measure(request: EvaluationRequest, progress: Progress, ranks: Ranks) -> EvaluationResult:
    request.check()
    text = open_text(request.data)
    device = pick_device(request.device)
    source, model = open_evaluated(request.model, request.revision, request, device)
    check_seq_len(model, request.seq_len)
    against, changed = None, ()
    if request.against is not None:
        dense, against = open_evaluated(
            request.against, revision_of_dense(source.folder, request.against), request, device
        )
        changed = check_dense(source.folder, dense.folder, allow=request.allow_changed_inputs)
    if against is not None and against.vocab_size != model.vocab_size:
        raise RequestError(
            f"{request.model} and {request.against} have {model.vocab_size} and {against.vocab_size} tokens: "
            "only models with the same vocabulary can be compared."
        )
    progress.stage("Reading the text", 1)
    tokenizer = load_tokenizer(source.folder, request.trust_remote_code, model.config)
    reader = TextReader(model, tokenizer, request.seq_len, request.seed)
    tokens = ranks.on_first(lambda: read_evaluation(reader, text, request.eval_windows))
    windows, comparison = tokens.windows, None
    memory, short = _fitted(request, model, windows, ranks)
    budget = ActivationBudget.of(None if memory is None else memory.hidden_states)
    batching = Batching(pick_batch_size(request.batch_size, device, windows.length), budget.together)
    passes = passes_of(model, windows, batching) * (1 if against is None else 2)
    progress.stage("Evaluating", len(model.blocks) * passes)
    if against is not None:
        comparison = compare(model, against, windows, batching, progress, ranks)
    evaluation = comparison.model if comparison else evaluate(model, windows, batching, progress, ranks)
    return EvaluationResult(
        model=request.model,
        against=request.against,
        protocol=PROTOCOL,
        text=text_report(tokens),
        device=str(device),
        compute_dtype=str(model.dtype).removeprefix("torch."),
        evaluation=evaluation,
        comparison=comparison,
        memory=memory,
        warnings=(*tokens.warnings, *changed, *short),
    )


def _fitted(
    request: EvaluationRequest, model: StreamedModel, windows: Batch, ranks: Ranks
) -> tuple[MemoryPlan | None, tuple[str, ...]]:
    """What it is fitted into, and warnings. Raises RequestError where it does not fit --limit-memory."""
    tokens, batch = -(-windows.tokens // ranks.count), pick_batch_size(request.batch_size, model.device, windows.length)
    models = 1 if request.against is None else 2
    phase = evaluation_phase(model, tokens, windows.length, min(batch, len(windows)), models)
    estimate = Estimate((phase,), (LIBRARIES,), model.device.type == "cpu")
    return ranks.on_first(lambda: fitted(request.limit_memory, model.device, ranks, estimate))


def open_evaluated(
    given: str, revision: str | None, request: EvaluationRequest, device: torch.device
) -> tuple[Source, StreamedModel]:
    source = resolve_model(given, revision)
    checkpoint = open_checkpoint(source.folder)
    dtype = pick_dtype(request.dtype, device, checkpoint)
    trust = request.trust_remote_code
    return source, StreamedModel(source.folder, checkpoint, dtype=dtype, device=device, trust_remote_code=trust)
