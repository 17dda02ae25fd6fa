"""The story of a measurement: one process per model, rounds in turn, figures and ratios at the end."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from prune_cli.bench.child import Child, Loaded, Spec
from prune_cli.bench.request import BenchRequest
from prune_cli.bench.result import (
    SCHEMA_VERSION,
    BenchResult,
    ModelFigures,
    Round,
    compare,
    figure_of,
    rates_of,
    spread_warnings,
)
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.source import Source, resolve_model
from prune_cli.engine.open_model import pick_device, pick_dtype
from prune_cli.errors import RequestError
from prune_cli.model.open_checkpoint import open_checkpoint
from prune_cli.packed.dequantised import Dequantised
from prune_cli.progress import Progress, Silent
from prune_cli.version import __version__

DEFAULT_PROMPT_TOKENS = 256
PROTOCOL = (
    "greedy generate() of plain transformers with its default cache on random tokens; one process per model, one round "
    "of warm-up, then rounds in turn (A B, B A, ...); prefill is the time to the first new token, decode the tokens "
    "after it; files are in the system's cache before they are loaded"
)


@dataclass(frozen=True)
class _Contestant:
    source: Source
    checkpoint: Checkpoint
    dtype: torch.dtype
    child: Child


def bench(request: BenchRequest, progress: Progress | None = None) -> BenchResult:
    """Measure as `request` says. Raises RequestError where it cannot be met, PruneError where a model fails."""
    progress = progress or Silent()
    request.check()
    device = pick_device(request.device)
    with ExitStack() as stack:
        contestants = _start(request, device, stack)
        prompt_tokens, vocabulary = _fit(request, contestants)
        progress.stage("Loading", len(contestants))
        loaded = []
        for contestant in contestants:
            loaded.append(contestant.child.load())
            progress.advance()
        rounds = _measure(request, contestants, prompt_tokens, vocabulary, progress)
        peaks = [contestant.child.peak_running_bytes() for contestant in contestants]
    rates = rates_of(prompt_tokens, request.batch_size)
    models = tuple(
        _figures(contestant, facts, peak, own, prompt_tokens, request.batch_size)
        for contestant, facts, peak, own in zip(contestants, loaded, peaks, rounds, strict=True)
    )
    ratios = compare(models[0], models[1], rates) if len(models) > 1 else ()
    return BenchResult(
        schema_version=SCHEMA_VERSION,
        tool={"name": "prune-cli", "version": __version__},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment={
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
        },
        settings={key: value for key, value in asdict(request).items() if key != "verbose"}
        | {"prompt_tokens": prompt_tokens},
        protocol=PROTOCOL,
        models=models,
        ratios=ratios,
        warnings=spread_warnings(models, ratios),
    )


def _start(request: BenchRequest, device: torch.device, stack: ExitStack) -> list[_Contestant]:
    """Open every checkpoint before the first process starts."""
    asked = [(request.model, request.revision)]
    if request.against is not None:
        asked.append((request.against, request.against_revision))
    sources = [resolve_model(given, revision) for given, revision in asked]
    opened = [(source, open_checkpoint(source.folder)) for source in sources]
    contestants = []
    for source, checkpoint in opened:
        dtype = pick_dtype(request.dtype, device, checkpoint)
        if request.dtype == "auto" and isinstance(checkpoint, Dequantised):
            dtype = torch.bfloat16  # transformers leaves what stands beside the codes in 16 bits
        spec = Spec(
            given=source.given,
            folder=source.folder,
            files=tuple(source.folder / file for file in checkpoint.files),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            trust_remote_code=request.trust_remote_code,
            verbose=request.verbose,
        )
        contestants.append(_Contestant(source, checkpoint, dtype, stack.enter_context(Child(spec))))
    return contestants


def _fit(request: BenchRequest, contestants: Sequence[_Contestant]) -> tuple[int, int]:
    """The length of the prompts and the vocabulary they are drawn from, such that every model can take them."""
    vocabularies = []
    prompt_tokens = DEFAULT_PROMPT_TOKENS if request.prompt_tokens is None else request.prompt_tokens
    for contestant in contestants:
        limit, vocabulary = contestant.child.limits()
        vocabularies.append(vocabulary)
        if limit is None:
            continue
        if request.prompt_tokens is None:
            prompt_tokens = max(1, min(prompt_tokens, limit - request.new_tokens))
        if prompt_tokens + request.new_tokens > limit:
            raise RequestError(
                f"{contestant.source.given} takes at most {limit} positions, but {prompt_tokens} tokens of prompt and "
                f"{request.new_tokens} new ones were asked for: lower --prompt-tokens or --new-tokens."
            )
    return prompt_tokens, min(vocabularies)


def _measure(
    request: BenchRequest, contestants: Sequence[_Contestant], prompt_tokens: int, vocabulary: int, progress: Progress
) -> list[list[Round]]:
    """The rounds of each contestant. Who goes first changes every round, so that a drift hits both alike."""
    progress.stage("Measuring", (request.repeats + 1) * len(contestants))
    rounds: list[list[Round]] = [[] for _ in contestants]
    for number in range(request.repeats + 1):
        turn = list(zip(contestants, rounds, strict=True))
        for contestant, own in turn if number % 2 else reversed(turn):
            measured = contestant.child.generate(
                request.seed + number, vocabulary, (request.batch_size, prompt_tokens), request.new_tokens
            )
            if number:  # the first is the warm-up
                own.append(measured)
            progress.advance()
    return rounds


def _figures(
    contestant: _Contestant, loaded: Loaded, peak: int, rounds: Sequence[Round], prompt_tokens: int, batch_size: int
) -> ModelFigures:
    return ModelFigures(
        model=contestant.source.given,
        revision=contestant.source.revision,
        architecture=loaded.architecture,
        dtype=str(contestant.dtype).removeprefix("torch."),
        parameters=loaded.parameters,
        bytes_on_disk=contestant.checkpoint.nbytes,
        load_seconds=loaded.seconds,
        library_bytes=loaded.library_bytes,
        peak_loading_bytes=loaded.peak_loading_bytes,
        peak_running_bytes=peak,
        rounds=tuple(rounds),
        **{name: figure_of(rate, rounds) for name, rate in rates_of(prompt_tokens, batch_size).items()},
    )
