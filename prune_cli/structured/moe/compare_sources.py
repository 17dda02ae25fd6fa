"""`--compare-calibration`: how a second text, or images, would use the experts that the calibration text decided on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calibration.tokens import TokenSet
from prune_cli.engine.provenance import text_report
from prune_cli.engine.run_context import Run
from prune_cli.engine.texts import TextReader
from prune_cli.model.architecture import load_tokenizer
from prune_cli.preflight.models_and_texts import open_text
from prune_cli.report.types import ExpertComparison, ExpertUse
from prune_cli.structured.moe.expert_statistics import measure_experts
from prune_cli.structured.moe.mixtures import Mixture
from prune_cli.structured.prepare import PreparedStructure

_TOKENS = "tokens"


def compared_use(
    run: Run[PreparedStructure],
    mixtures: Sequence[Mixture],
    counted: Mapping[int, Mapping[str, Sequence[float]]],
    kept: Mapping[int, Sequence[int]],
) -> ExpertComparison | None:
    """The tokens of every expert by calibration (`counted`) and by the text to compare with; None if none was given.

    Raises RequestError for text that does not do.
    """
    if run.request.compare_calibration is None:
        return None
    other = _read(run, run.request.compare_calibration)
    note = f"compared_experts {other.sha256}"  # a resumed run may be asked about another text
    known = run.output.notes.get(note)
    if known is None:
        sums = measure_experts(run.plan, mixtures, run.batches(other.windows), run.progress)
        known = {str(block): each[_TOKENS] for block, each in sums.items()}
        run.output.note(note, known)
    uses = []
    for mixture in mixtures:
        here, there = counted[mixture.block][_TOKENS], known[str(mixture.block)]
        for expert in range(mixture.experts):
            shares = _share(here, expert), _share(there, expert)
            uses.append(ExpertUse(mixture.block, expert, expert in kept[mixture.block], *shares))
    return ExpertComparison(text_report(other), uses)


def _share(tokens: Sequence[float], expert: int) -> float:
    total = sum(tokens)
    return tokens[expert] / total if total else 0.0


def _read(run: Run[PreparedStructure], given: str) -> TokenSet:
    prepared, request = run.plan, run.request
    tokenizer = load_tokenizer(prepared.source.folder, prepared.trust_remote_code)
    reader = TextReader(prepared.model, tokenizer, request.seq_len, request.seed)
    source = open_text(given)
    return reader.read(source, "calibration", None if source.kind == "tokens" else request.samples)
