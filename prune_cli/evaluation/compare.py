"""`prune-cli compare`: what a pruned and the dense model say after the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from prune_cli.engine.generate import continue_both, read_prompts
from prune_cli.engine.open_model import pick_device
from prune_cli.errors import RequestError
from prune_cli.evaluation.perplexity import open_evaluated
from prune_cli.evaluation.requests import CompareRequest, EvaluationRequest
from prune_cli.progress import Progress, Silent
from prune_cli.report.continuations import Continuation
from prune_cli.report.dense_model import check_dense, revision_of_dense


@dataclass(frozen=True)
class CompareResult:
    model: str
    dense: str
    continuations: Sequence[Continuation]
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def compare_texts(request: CompareRequest, progress: Progress | None = None) -> CompareResult:
    """Continue the prompts with both. Raises RequestError where that cannot be done, PruneError where it fails."""
    progress = progress or Silent()
    request.check()
    device = pick_device(request.device)
    asked = EvaluationRequest(
        request.model,
        "",
        device=request.device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
        revision=request.revision,
    )
    source, model = open_evaluated(request.model, request.revision, asked, device)
    revision = revision_of_dense(source.folder, request.dense)
    dense_source, dense = open_evaluated(request.dense, revision, replace(asked, revision=revision), device)
    warnings = check_dense(source.folder, dense_source.folder, allow=request.allow_changed_inputs)
    if model.vocab_size != dense.vocab_size:
        raise RequestError(
            f"{request.model} and {request.dense} have {model.vocab_size} and {dense.vocab_size} tokens: only models "
            "with the same vocabulary can be compared."
        )
    prompts = read_prompts(source.folder, request.prompts, trust_remote_code=request.trust_remote_code)
    found = continue_both(model, dense, prompts, request.tokens, progress)
    return CompareResult(request.model, request.dense, found, warnings)
