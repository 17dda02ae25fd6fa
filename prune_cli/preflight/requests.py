"""What each command refuses before torch is imported; who does the work checks the same, and the rest. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.checkpoint.preflight import check_output
from prune_cli.checkpoint.source import local_model
from prune_cli.preflight.models_and_texts import LocalModel, check_text, look_at_model
from prune_cli.request.request import DEFAULT_SOURCE, PruneRequest, split_pattern
from prune_cli.request.tensor_names import check_fits, check_globs

# Linear layers of the text model's blocks that are stored (out, in) wherever they are called so.
_LINEAR = re.compile(
    r"(model\.)?(language_model\.)?(model\.)?layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
)


def check_prune(request: PruneRequest, *, writes: bool = True) -> None:
    """Raise RequestError for what a checked request asks of a model that cannot give it. `writes`: OUT will be made."""
    model = look_at_model(request.model, request.revision)
    if request.needs_text:
        check_text(
            DEFAULT_SOURCE if request.calibration is None else request.calibration,
            model,
            request.samples,
            request.seq_len,
        )
    if request.eval is not None:
        check_text(request.eval, model, None, request.seq_len)
    if writes:
        folder = None if model is None else model.folder
        check_output(request.out, folder, resume=request.resume, overwrite=request.overwrite)
    if model is not None and not request.is_structured and _names_are_final(model, request):
        check_globs(model.checkpoint.entries, request)
        _check_pattern(model, request)


def check_models(
    models: Sequence[tuple[str, str | None]],
    texts: Sequence[tuple[str | None, int | None]] = (),
    seq_len: int | None = None,
) -> None:
    """Of commands that read models, each with its revision, and texts, each with its samples, for the first model."""
    found = [look_at_model(given, revision) for given, revision in models]
    for given, samples in texts:
        if given is not None:
            check_text(given, found[0], samples, seq_len)


def check_new_folder(out: Path, models: Sequence[str], *, resume: bool, overwrite: bool) -> None:
    """Of commands that write OUT from other models than a PruneRequest has."""
    for given in models:
        model = local_model(given, None)
        check_output(out, None if model is None else model.folder, resume=resume, overwrite=overwrite)


def _names_are_final(model: LocalModel, request: PruneRequest) -> bool:
    """Packed weights go by other names than their codes, and --text-only leaves some out."""
    return not request.text_only and not any("quant" in key or "compression" in key for key in _keys(model.config))


def _keys(config: object) -> set[str]:
    if not isinstance(config, dict):
        return set()
    return config.keys() | {key for value in config.values() for key in _keys(value)}


def _check_pattern(model: LocalModel, request: PruneRequest) -> None:
    """Of layers that are pruned for certain; the plan looks at all of them."""
    if request.pattern is None:
        return
    for name, entry in model.checkpoint.entries.items():
        chosen = not request.include or any(fnmatchcase(name, glob) for glob in request.include)
        chosen = chosen and not any(fnmatchcase(name, glob) for glob in request.exclude)
        if chosen and _LINEAR.fullmatch(name) and len(entry.shape) == 2 and entry.dtype in FLOATS:
            check_fits(name, entry.shape[1], split_pattern(request.pattern))
