"""What `prune-cli sweep` was asked for, frozen and checked before any work, and the points it means. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prune_cli.errors import RequestError
from prune_cli.request.request import CalibrateBy, Dtype, Packed, PruneRequest
from prune_cli.sweeps.grid import options_of, parse_list, parse_method, parse_sparsities

DEFAULT_SPARSITIES = "0:0.9:0.1"


@dataclass(frozen=True)
class Point:
    """One way of pruning: `request` says how; `method` is as typed.

    `block` is set where only this block is pruned, `allocation` where tensors give unevenly, `on` names the text;
    `copies` of each calibration window are sampled beside it, once the text is known.
    """

    method: str
    request: PruneRequest
    block: int | None = None
    allocation: Mapping[str, float] | None = None
    on: str = "data"
    copies: int = 0

    @property
    def key(self) -> str:
        """All that its result depends on, but for what the points of a sweep share."""
        asked = self.request
        said = {
            "pipeline": str(asked.pipeline()),
            "options": asked.pipeline().options_as_json(),
            "target": asked.target,
            "self_calibration": self.copies,
            "sparsity": asked.sparsity,
            "pattern": asked.pattern,
            "block": self.block,
            "allocation": self.allocation,
            "on": self.on,
        }
        return json.dumps(said, sort_keys=True)

    def __str__(self) -> str:
        where = "" if self.block is None else f" of block {self.block} alone"
        return f"{self.method} at {self.request.pattern or f'{self.request.sparsity:g}'}{where}"


@dataclass(frozen=True)
class SweepRequest:
    """Everything that a sweep was asked for, as typed. None means that the user did not say."""

    model: str
    out: Path
    data: str
    windows: int | None = None
    method: str = "wanda"
    sparsity: str = DEFAULT_SPARSITIES
    pattern: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: float = 0.5
    calibration: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    calibrate_by: CalibrateBy = "sublayer"
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | Literal["auto"] = "auto"
    limit_memory: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_unsupported: bool = False
    packed: Packed | None = None
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    revision: str | None = None

    def check(self) -> None:
        """Raise RequestError for anything that can be told wrong without the model."""
        if not 0 <= self.sensitivity < 1:
            raise RequestError(f"--sensitivity is {self.sensitivity:g}, but must be at least 0 (no table) and below 1.")
        if self.windows is not None and self.windows < 1:
            raise RequestError(f"--eval-windows is {self.windows}, but must be at least 1.")
        unused = set(self.options) - {key for _, _, keys in self._methods() for key in keys}
        if unused:
            raise RequestError(
                f"-o {min(unused)}: no entry of --method has this option; write METHOD.KEY=VALUE or STEP.KEY=VALUE."
            )
        for point in (*self.points(), *self.sensitivity_points(1)):
            point.request.check()

    @property
    def methods(self) -> tuple[str, ...]:
        return parse_list("--method", self.method)

    @property
    def sparsities(self) -> tuple[float, ...]:
        return parse_sparsities(self.sparsity)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(word.strip() for word in self.device.split(","))

    def points(self) -> list[Point]:
        """The grid, method by method. Sparsity 0 is no point: it is the dense model, for every method."""
        patterns = parse_list("--pattern", self.pattern) if self.pattern is not None else ()
        asked: list[dict[str, Any]] = [{"sparsity": value} for value in self.sparsities if value > 0]
        asked += [{"pattern": pattern} for pattern in patterns]
        return [Point(name, replace(request, **how)) for name, request, _ in self._methods() for how in asked]

    def sensitivity_points(self, blocks: int | Sequence[int]) -> list[Point]:
        """Each block alone at the sparsity `sensitivity`, by the first method; none if that is 0."""
        if self.sensitivity == 0:
            return []
        name, request, _ = self._methods()[0]
        alone = replace(request, sparsity=self.sensitivity)
        return [Point(name, alone, block) for block in (range(blocks) if isinstance(blocks, int) else blocks)]

    def first(self) -> PruneRequest:
        """What is the same for all points, and the first method."""
        return self._methods()[0][1]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is done otherwise than was said, for the report."""
        follow = [name for name, request, _ in self._methods() if request.target == "dense"]
        if self.calibrate_by != "block" or not follow:
            return ()
        return (f"{', '.join(follow)}: dense targets need --calibrate-by sublayer, which is what they got.",)

    def _methods(self) -> list[tuple[str, PruneRequest, set[str]]]:
        """Per entry of --method: as typed, its request, and the keys of --option that it takes."""
        names = self.methods
        found = []
        for name in names:
            said = parse_method(name)
            own = options_of(name, said, self.options, alone=len(names) == 1)
            keys = {key for key in self.options if options_of(name, said, {key: ""}, alone=len(names) == 1)}
            found.append((name, self._pruning(said, own), keys))
        return found

    def _pruning(self, said: Mapping[str, Any], options: Mapping[str, Any]) -> PruneRequest:
        return PruneRequest(
            model=self.model,
            out=self.out,
            options=options,
            calibration=self.calibration,
            samples=self.samples,
            seq_len=self.seq_len,
            seed=self.seed,
            calibrate_by=self.calibrate_by if said.get("target") != "dense" else "sublayer",
            device=self.devices[0],
            dtype=self.dtype,
            batch_size=self.batch_size,
            limit_memory=self.limit_memory,
            include=self.include,
            exclude=self.exclude,
            eval=self.data,
            allow_unsupported=self.allow_unsupported,
            packed=self.packed,
            trust_remote_code=self.trust_remote_code,
            revision=self.revision,
            **said,
        )
