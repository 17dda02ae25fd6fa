"""What a report tells of where an output came from: versions, machine, model, texts, warnings."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Protocol

import torch

from calibration.tokens import TokenSet
from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.checkpoint.file_names import why_not_copied
from prune_cli.checkpoint.reader import INDEX_FILE, Checkpoint
from prune_cli.checkpoint.source import Source
from prune_cli.engine.evaluate import PROTOCOL
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.run_context import Run
from prune_cli.engine.texts import Texts
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.report.processes import Processes
from prune_cli.report.types import Environment, Evaluation, EvaluationReport, PrunedModel, TextReport
from prune_cli.version import __version__


class Opened(Protocol):
    """A model that was opened on this machine, by whatever command."""

    @property
    def source(self) -> Source: ...
    @property
    def model(self) -> StreamedModel: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...


def batch_size_of(opened: OpenModel, tokens: TokenSet | None) -> int | None:
    return None if tokens is None else opened.batch_size(tokens.windows)


@cache
def versions() -> Mapping[str, str]:
    """Of what the bytes of an output depend on."""
    names = ("torch", "transformers", "safetensors")
    return {"prune-cli": __version__, **{name: version(name) for name in names}}


def model_facts(opened: Opened, files: Mapping[str, str]) -> PrunedModel:
    """What was pruned; `files` are those of the model with their hashes."""
    return PrunedModel(
        given=opened.source.given,
        revision=opened.source.revision,
        architecture=type(opened.model.model).__name__,
        files=files,
    )


def measured(texts: Texts, before: Evaluation | None, after: Evaluation | None) -> EvaluationReport | None:
    """The perplexities, where they were asked for."""
    if before is None or after is None or texts.evaluation is None:
        return None
    return EvaluationReport(text_report(texts.evaluation), PROTOCOL, before, after)


def warnings_of(run: Run[OpenModel], *own: str) -> list[str]:
    """Those of the texts and the run, `own` ones, and those of files that are not in the output."""
    warnings = [w for tokens in (run.texts.calibration, run.texts.evaluation) if tokens for w in tokens.warnings]
    left = [why_not_copied(file) for file in run.output.not_copied]
    return [*warnings, *_text_alone(run), *run.warnings, *own, *_named_in_vain(run.plan.checkpoint), *left]


def _text_alone(run: Run[OpenModel]) -> list[str]:
    """What sees images or sound too was calibrated without any."""
    calibration, config = run.texts.calibration, run.model.config
    if calibration is None or calibration.beside or config.get_text_config() is config:
        return []
    return [
        "Calibrated with text alone: experts and channels that serve images or sound look unused, so look at what the "
        "output makes of such inputs, or calibrate with prepared ones (a .safetensors file for each sample)."
    ]


def _named_in_vain(checkpoint: Checkpoint) -> list[str]:
    if not checkpoint.absent:
        return []
    return [
        f"{INDEX_FILE} names {len(checkpoint.absent)} tensor(s) that no file holds and the model does not need, the "
        f"first is {next(iter(checkpoint.absent))}: the output's index leaves them out."
    ]


def environment(opened: Opened, batch_size: int | None) -> Environment:
    """Where a run ran."""
    device = torch.cuda.get_device_name(opened.device) if opened.device.type == "cuda" else str(opened.device)
    return Environment(
        python=platform.python_version(),
        versions=versions(),
        platform=platform.platform(),
        device=device,
        compute_dtype=str(opened.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY"),
    )


def processes_of(run: Run[OpenModel]) -> Processes | None:
    """What several processes exchanged and cost, of all of them; None of one. A step of every rank."""
    ranks, channel = run.ranks, run.ranks.channel
    if channel is None:
        return None
    costs = ranks.gathered((channel.bytes_reduced, channel.seconds_waited, run.memory.host_bytes))
    nbytes, seconds, peaks = zip(*costs, strict=True)
    return Processes(ranks.count, ranks.nodes, sum(nbytes), list(seconds), list(peaks))


def zeros_in(written: Checkpoint, name: str) -> int | None:
    """None for storage formats whose zeros cannot be counted without decoding them."""
    if written.entries[name].dtype not in FLOATS:
        return None
    return written.zeros(name)


def text_report(tokens: TokenSet) -> TextReport:
    samples, length = tokens.ids.shape
    return TextReport(
        tokens.source, tokens.protocol, samples, length, tokens.windows.tokens, tokens.seed, tokens.sha256
    )
