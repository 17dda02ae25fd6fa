"""Which tensors are pruned and which are kept, each with its reason; refused before any work where it cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from methods._pattern import NofM, Pattern, Unstructured, pruned_count
from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.errors import RequestError
from prune_cli.model.orientation import matrix_shape
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo, unknown_in_blocks
from prune_cli.request.pipeline import Pipeline
from prune_cli.request.request import DEFAULT_SPARSITY, PruneRequest, split_pattern
from prune_cli.request.tensor_names import check_fits, check_globs

# Their inputs are known when a batch arrives there; for all others only methods without statistics work.
ROLES_WITH_INPUTS = frozenset({"linear map", "expert", "output head"})


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor of the checkpoint, and why it is kept if it is."""

    info: TensorInfo
    prune: bool
    reason: str

    @property
    def name(self) -> str:
        return self.info.entry.name


def pattern_of(request: PruneRequest) -> Pattern:
    if request.pattern is not None:
        return NofM(*split_pattern(request.pattern))
    return Unstructured(DEFAULT_SPARSITY if request.sparsity is None else request.sparsity)


def n_of_m(pattern: Pattern) -> NofM | None:
    """The pattern itself where it is an N:M."""
    return pattern if isinstance(pattern, NofM) else None


def plan_tensors(model: StreamedModel, request: PruneRequest, pipeline: Pipeline) -> dict[str, Decision]:
    """Decide every tensor, in the order of the checkpoint. Raises RequestError where the request cannot be met."""
    chosen = _chosen(model.tensor_map, request)
    decisions: dict[str, Decision] = {}
    for name, info in model.tensor_map.items():
        excluded = any(fnmatchcase(name, glob) for glob in request.exclude)
        if name in chosen and not excluded:
            decisions[name] = Decision(info, True, "")
        elif excluded:
            decisions[name] = Decision(info, False, "excluded by --exclude")
        else:
            decisions[name] = Decision(info, False, info.reason or "not named by --include")
    _check_unsupported(decisions, request)
    for decision in decisions.values():
        if decision.prune:
            _check_prunable(model, decision, pipeline, pattern_of(request))
    if not any(decision.prune for decision in decisions.values()):
        raise RequestError("Nothing is left to prune: no linear layer of a block passes --include and --exclude.")
    return decisions


def _chosen(infos: Mapping[str, TensorInfo], request: PruneRequest) -> set[str]:
    """A pattern that matches linear layers pruned by default narrows the run to them; any other adds what it names.

    Of an extra head it adds the linear layers, where it matches any.
    """
    check_globs(infos, request)
    default = {name for name, info in infos.items() if not info.head and _is_map(info)}
    of_heads = {name for name, info in infos.items() if info.head and _is_map(info)}
    narrowed: set[str] = set()
    added: set[str] = set()
    for glob in request.include:
        matches = {name for name in infos if fnmatchcase(name, glob)}
        if matches & default:
            narrowed |= matches & default
        else:
            added |= matches & of_heads or matches
    return (narrowed or default) | added


def _is_map(info: TensorInfo) -> bool:
    return "linear map" in (info.role, info.head_role) or info.expert is not None


def _check_unsupported(decisions: Mapping[str, Decision], request: PruneRequest) -> None:
    infos = {name: decision.info for name, decision in decisions.items()}
    experts = [name for name, info in infos.items() if info.role == "expert" and not info.expert]
    for names, what in (
        (experts, "tensors of experts that are stored or computed in a way unknown here"),
        (unknown_in_blocks(infos), "tensors unknown to the model"),
    ):
        if names and not request.allow_unsupported:
            raise RequestError(
                f"{request.model} has {len(names)} {what} (the first is {names[0]}): "
                "add --allow-unsupported to keep them as they are and prune the rest."
            )


def _check_prunable(model: StreamedModel, decision: Decision, pipeline: Pipeline, pattern: Pattern) -> None:
    info, name = decision.info, decision.name
    unsupported = info.role in ("unknown", "unused", "attention expert") or (
        info.role == "expert" and info.expert is None
    )
    if unsupported or info.entry.dtype not in FLOATS:
        raise RequestError(f"{name} cannot be pruned ({info.reason or info.entry.dtype}): leave it out of --include.")
    if pipeline.needs and info.role not in ROLES_WITH_INPUTS:
        raise RequestError(
            f"{name} is no linear layer whose inputs could be measured ({info.role}): "
            "leave it out of --include, or use --method magnitude."
        )
    if isinstance(pattern, NofM):
        check_fits(name, matrix_shape(info)[1], (pattern.keep, pattern.of))


def pruned_parameters(info: TensorInfo, pattern: Pattern) -> int:
    """How many weights of the tensor the pattern takes (row by row; a whole-tensor selection differs by rounding)."""
    rows, inputs = matrix_shape(info)
    rows *= info.slices
    if isinstance(pattern, NofM):
        return rows * (inputs // pattern.of) * (pattern.of - pattern.keep)
    return rows * pruned_count(pattern.sparsity, inputs)
