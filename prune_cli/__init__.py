"""The commands of prune-cli from Python: `prune("model", "out", method="wanda", sparsity=0.5)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from prune_cli.checks.own_packages import check_own_packages
from prune_cli.errors import PruneError, RequestError
from prune_cli.loading.register import register_with_transformers
from prune_cli.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from prune_cli.checks.inspection import Inspection
    from prune_cli.checks.verify import Verification
    from prune_cli.evaluation.perplexity import EvaluationResult
    from prune_cli.loading.semi_structured import SemiStructured
    from prune_cli.recovery.report import RecoveryReport
    from prune_cli.recovery.request import How
    from prune_cli.report.types import Report
    from prune_cli.request.request import CalibrateBy, Dtype, Format, Packed, Target
    from prune_cli.sparse.convert import Conversion
    from prune_cli.sweeps.report import SweepReport

__all__ = [
    "PruneError",
    "RequestError",
    "__version__",
    "convert",
    "evaluate",
    "inspect",
    "prune",
    "recover",
    "sweep",
    "to_semi_structured",
    "verify",
]

T = TypeVar("T")

check_own_packages()
# With this, from_pretrained of transformers loads sparse checkpoints.
register_with_transformers()


def prune(
    model: str | Path,
    out: str | Path,
    *,
    preset: str | None = None,
    method: str | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    allocate: str | None = None,
    refine: str | None = None,
    reconstruct: bool = False,
    match_blocks: bool | None = None,
    options: Mapping[str, Any] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    allow_unsupported: bool = False,
    drop_extra_heads: bool = False,
    calibration: str | Path | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    calibrate_by: CalibrateBy = "sublayer",
    target: Target | None = None,
    self_calibration: int | Literal["auto"] | None = None,
    eval: str | Path | None = None,
    eval_windows: int | Literal["all"] | None = None,
    generate: int | None = None,
    statistics: str | Path | None = None,
    save_statistics: str | Path | None = None,
    compare_calibration: str | Path | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int | Literal["auto"] = "auto",
    limit_memory: str | None = None,
    format: Format = "dense",
    self_contained: bool = False,
    packed: Packed | None = None,
    text_only: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    inputs: Mapping[str, str] | None = None,
    allow_changed_inputs: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Report:
    """Prune `model` (a folder or a hub id) into the new folder `out`; returns the report that is written there too.

    Parameters are the options of `prune-cli prune`, which `prune-cli prune --help` explains; None stands for what was
    not said. `options` are those of `-o`, as {"swaps.rounds": 8}; `inputs` are hashes that must hold, as those of
    another report. `progress`, here and below, shows a bar or keeps it away; None shows one in a notebook alone. Raises
    RequestError before any work where the request cannot be met and PruneError where the run fails.
    """
    given = _fields(locals())
    from prune_cli.request.presets import with_preset
    from prune_cli.request.request import PruneRequest
    from prune_cli.run import prune as run

    return _shown(run, PruneRequest(**with_preset(given)), progress)


def recover(
    model: str | Path,
    out: str | Path,
    teacher: str | Path,
    *,
    how: How = "block",
    epochs: int | None = None,
    tokens: int | None = None,
    rate: float | None = None,
    train: str | None = None,
    rank: int | None = None,
    kl: float | None = None,
    square_head: float | None = None,
    next_token: float | None = None,
    top_k: int | None = None,
    store: str | Path | None = None,
    every: int | None = None,
    gradient_checkpointing: bool = False,
    calibration: str | Path | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    self_calibration: int = 2,
    eval: str | Path | None = None,
    eval_windows: int | Literal["all"] | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int | Literal["auto"] = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: bool | None = None,
) -> RecoveryReport:
    """Train what pruning left of `model` against the dense `teacher`, zeros held, into the new folder `out`.

    Returns the report that is written there too. Parameters are the options of `prune-cli recover`. Raises RequestError
    before any work where the request cannot be met and PruneError where the run fails.
    """
    given = _fields(locals())
    from prune_cli.recovery.request import RecoverRequest
    from prune_cli.recovery.run import recover as run

    return _shown(run, RecoverRequest(**given), progress)


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    against: str | Path | None = None,
    eval_windows: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int | Literal["auto"] = "auto",
    limit_memory: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_changed_inputs: bool = False,
    progress: bool | None = None,
) -> EvaluationResult:
    """Perplexity of `model` on the text `data`; with a dense model `against`, also the distances to it.

    Loss and KL divergence are in nats per token. The options are those of `prune-cli eval --data`. Raises RequestError
    where the request cannot be met and PruneError where the run fails.
    """
    given = _fields(locals())
    from prune_cli.evaluation.perplexity import measure
    from prune_cli.evaluation.requests import EvaluationRequest

    return _shown(measure, EvaluationRequest(**given), progress)


def inspect(model: str | Path, *, revision: str | None = None) -> Inspection:
    """What is in a checkpoint: shape, dtype, zeros and N:M pattern of each tensor, and totals; sizes in bytes.

    Raises RequestError for a checkpoint that cannot be opened and PruneError for damaged data.
    """
    from prune_cli.checks.inspection import inspect_model

    return inspect_model(str(model), revision)


def verify(
    model: str | Path,
    *,
    against: str | Path | None = None,
    revision: str | None = None,
    allow_changed_inputs: bool = False,
) -> Verification:
    """Whether `model` is sound, is what its report says and, with a dense model `against`, keeps that one's weights.

    What is wrong is in `problems` of the result. Raises RequestError for a folder that cannot be opened at all.
    """
    from prune_cli.checks.verify import verify as run

    return run(str(model), None if against is None else str(against), revision, allow_changed=allow_changed_inputs)


def sweep(
    model: str | Path,
    out: str | Path,
    data: str | Path,
    *,
    windows: int | None = None,
    method: str | Sequence[str] = "wanda",
    sparsity: str | float | Sequence[float] = "0:0.9:0.1",
    pattern: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    sensitivity: float = 0.5,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    allow_unsupported: bool = False,
    calibration: str | Path | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    calibrate_by: CalibrateBy = "sublayer",
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int | Literal["auto"] = "auto",
    limit_memory: str | None = None,
    packed: Packed | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> SweepReport:
    """The loss on the text `data` over a grid of methods and sparsities; writes curves and tables to the folder `out`.

    The options are those of `prune-cli sweep`; lists may be given as such or as the command line has them. Raises
    RequestError before any work where the request cannot be met and PruneError where the run fails.
    """
    given = _fields(locals())
    given |= {name: _with_commas(given[name]) for name in ("method", "sparsity", "pattern") if name in given}
    from prune_cli.sweeps.request import SweepRequest
    from prune_cli.sweeps.run import sweep as run

    return _shown(run, SweepRequest(**given), progress)


def convert(
    model: str | Path,
    out: str | Path,
    *,
    format: Format = "sparse",
    self_contained: bool = False,
    compress: bool = False,
    force: bool = False,
    revision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Conversion:
    """Store `model` as sparse safetensors in the new folder `out`, or a sparse one as dense again; no bit is lost.

    Raises RequestError before any work where it cannot be done and PruneError, naming the tensor, for damaged data.
    """
    given = _fields(locals())
    from prune_cli.sparse.convert import ConvertRequest
    from prune_cli.sparse.convert import convert as run

    return _shown(run, ConvertRequest(**given), progress)


def to_semi_structured(model: nn.Module) -> SemiStructured:
    """Turn the 2:4 layers of a model on an NVIDIA GPU into PyTorch's semi-structured tensors, in place, for inference.

    Returns which layers were converted and why others were not. Raises PruneError where the model is on no GPU of
    compute capability 8.0 or newer.
    """
    from prune_cli.loading.semi_structured import to_semi_structured as convert

    return convert(model)


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as fields of a request: None is left out, for the request's default; one glob is a tuple of one."""
    explicit = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in given.items()
        if value is not None and name != "progress"
    }
    for name in {"include", "exclude"} & explicit.keys():
        explicit[name] = (explicit[name],) if isinstance(explicit[name], str) else tuple(explicit[name])
    return explicit | ({"out": Path(explicit["out"])} if "out" in explicit else {})


def _shown(run: Callable[[Any, Any], T], request: Any, progress: bool | None) -> T:
    from prune_cli.progress import progress_from_python

    with progress_from_python(progress) as shown:
        return run(request, shown)


def _with_commas(value: str | float | Iterable[object]) -> str:
    return str(value) if isinstance(value, str | int | float) else ",".join(map(str, value))
