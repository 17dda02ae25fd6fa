"""`-o after=`: what makes up for the experts that went, in one pass of the dense model and the smaller one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from methods._block_matching import Matched
from prune_cli.checkpoint.layout import OutputTensor
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.expert_inputs import at_experts
from prune_cli.engine.run_context import Run
from prune_cli.engine.stream import Stream
from prune_cli.errors import RequestError
from prune_cli.model.moe import norms_outputs, tells_every_token
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.recovery.build_report import block_recoveries
from prune_cli.recovery.match_blocks import (
    BlockTrainer,
    Matching,
    Samples,
    held_out_of,
    pass_trained,
    samples_per_step,
    states_behind,
)
from prune_cli.recovery.trained_block import ROUTERS
from prune_cli.report.types import BlockRecovery
from prune_cli.structured.config import config_from
from prune_cli.structured.cost import Pass
from prune_cli.structured.kept_tensors import KeptTensors
from prune_cli.structured.moe.both_mixtures import BothMixtures
from prune_cli.structured.moe.expert_matrices import ExpertMatrices
from prune_cli.structured.moe.merge_experts import DenseExperts, merge_experts
from prune_cli.structured.moe.mixtures import Mixture, find_mixtures
from prune_cli.structured.moe.refit_experts import refit_experts
from prune_cli.structured.plan import StructuredPlan
from prune_cli.structured.prepare import PreparedStructure

MAKING_UP = "Making up for the experts"
# Of the training of routers.
_EPOCHS, _RATE = 8, 0.02
_RECORD = "matched"


def cost_after(after: str) -> tuple[tuple[Pass, ...], tuple[str, ...]]:
    """The pass, and in words; nothing where nothing is done."""
    if after == "nothing":
        return (), ()
    # Experts are computed again in each sweep, and a training goes through the block and back.
    passes, told = {"refit": (4.0, "fits"), "merge": (4.0, "averages"), "router": (2.0 + 3.0 * _EPOCHS, "training")}[
        after
    ]
    return (Pass(MAKING_UP, passes, both=True),), (
        f"-o after={after} then takes both models through the text, with its {told} about {passes:.0f} forward passes.",
    )


def check_after(prepared: PreparedStructure, mixtures: Sequence[Mixture]) -> None:
    """Raise RequestError for what -o after= cannot do with this model or in several processes."""
    after = prepared.options.after
    if after == "nothing":
        return
    if after == "router":
        if prepared.ranks.several:
            raise RequestError(
                "-o after=router trains in one process, and this run has several: start it without torchrun, or use "
                "-o after=refit."
            )
        return
    for mixture in mixtures:
        module = prepared.model.model.get_submodule(mixture.module)
        if not tells_every_token(module):
            raise RequestError(
                f"-o after={after} needs to know which tokens come to which expert, and {mixture.module} gets rows of "
                "zeros for all others instead: use -o after=router."
            )
        if after == "refit" and norms_outputs(module):
            raise RequestError(
                f"-o after=refit fits last layers, and {mixture.module} norms what they give: use -o after=router."
            )


def check_samples(run: Run[PreparedStructure]) -> None:
    """Raise RequestError where none can be held out."""
    if run.plan.options.after != "nothing" and len(run.calibration.windows) < 2:
        raise RequestError(
            f"{run.calibration.source} gives one sample, but -o after={run.plan.options.after} needs at least 2, of "
            "which one is held out: give more text or a smaller --seq-len."
        )


def make_up(run: Run[PreparedStructure], change: StructuredPlan) -> StructuredPlan:
    """Write every block with experts anew where that helps; returns the change with what was done.

    Raises PruneError naming a tensor that cannot be fitted.
    """
    output, kept = run.output, KeptTensors(run.plan.checkpoint, run.output.layout, change)
    smaller = run.plan.with_checkpoint(kept, config_from(change.config, run.model))
    maker = _Maker(run, smaller, find_mixtures(smaller), find_mixtures(run.model), change.experts)
    if any(mixture.block not in maker.known for mixture in maker.mixtures):
        run.progress.stage(MAKING_UP, len(run.model.blocks))
        maker.pass_blocks()
    output.wait()
    return _told(run, change)


@dataclass
class _Maker:
    """`smaller` is the model with `mixtures`, made of that with `dense_mixtures` of which the experts `kept` stay."""

    run: Run[PreparedStructure]
    smaller: StreamedModel
    mixtures: Sequence[Mixture]
    dense_mixtures: Sequence[Mixture]
    kept: Mapping[int, Sequence[int]]

    @property
    def known(self) -> set[int]:
        """The blocks that are done."""
        return {block for block, line in self.run.output.done.items() if _RECORD in line}

    def pass_blocks(self) -> None:
        """A pair of blocks is in memory at a time."""
        samples, run = self.samples, self.run
        parking = ActivationOffload(run.output.partial, run.plan.budget)
        last = max(mixture.block for mixture in self.mixtures)
        by_block = {each.block: (each, dense) for each, dense in zip(self.mixtures, self.dense_mixtures, strict=True)}
        with (
            Stream(self.smaller, samples.batches, parking, run.ranks) as stream,
            Stream(run.plan.with_checkpoint(run.plan.checkpoint), samples.batches, parking, run.ranks) as dense,
        ):
            for block in range(last + 1):
                if block in by_block and block not in self.known:
                    self._take(block, by_block[block], stream, dense)
                elif block < last:
                    dense.load(block)
                    stream.load(block, run.output.checkpoint() if block in self.known else None)
                    dense.run_block(block)
                    stream.run_block(block)
                    dense.unload(block)
                    stream.unload(block)
                run.progress.advance()

    @cached_property
    def samples(self) -> Samples:
        windows, plan = self.run.calibration.windows, self.run.plan
        fitted = len(windows) - held_out_of(len(windows))
        size = plan.batch_size(windows)
        if plan.options.after == "router":
            size = samples_per_step(self.run.request.batch_size, windows.length)
        return Samples(windows[:fitted].split(size), windows[fitted:].split(size))

    def _take(self, block: int, mixtures: tuple[Mixture, Mixture], stream: Stream, dense: Stream) -> None:
        begun = time.monotonic()
        loaded = dense.load(block)
        if self.run.plan.options.after == "router":
            matched, new = self._train(block, stream, dense)
        else:
            matched, new = self._fit(block, mixtures, stream, dense, loaded)
        before = self.run.output.done.get(block, {}).get("seconds", 0.0)
        record: dict[str, Any] = {"seconds": before + time.monotonic() - begun, _RECORD: asdict(matched)}
        record["fitted"] = sorted(new)
        self.run.output.write_block(block, new, record)
        dense.unload(block)
        stream.unload(block)

    def _train(self, block: int, stream: Stream, dense: Stream) -> tuple[Matched, dict[str, torch.Tensor]]:
        targets = states_behind(dense, block)
        tensors = stream.load(block)
        trainer = BlockTrainer(self.smaller, self.samples, Matching.of(_EPOCHS, _RATE, self.run.request.seed))
        matched, new = trainer.train(block, tensors, stream.calls(), targets, ROUTERS)
        pass_trained(stream, block, new)
        return matched, new if matched.best else {}

    def _fit(
        self,
        block: int,
        mixtures: tuple[Mixture, Mixture],
        stream: Stream,
        dense: Stream,
        loaded: Mapping[str, torch.Tensor],
    ) -> tuple[Matched, dict[str, torch.Tensor]]:
        """All batches wait at the experts of both models; the dense block was `loaded`."""
        held_out = {id(batch) for batch in self.samples.held_out}
        matrices = ExpertMatrices(self.smaller, block, stream.load(block))
        matched = Matched(0.0, (), 0)
        stops = stream.pause_at(block, [mixtures[0].tensor]), dense.pause_at(block, [mixtures[1].tensor])
        for (name, _), (other, _) in zip(*stops, strict=True):
            fitted = [id(batch) not in held_out for batch in stream.here()]
            both = BothMixtures(at_experts(stream, name), mixtures[0], at_experts(dense, other), mixtures[1], fitted)
            targets = both.targets()
            before = both.error(both.outputs(), targets)
            if self.run.plan.options.after == "refit":
                errors = refit_experts(both, targets, matrices)
            else:
                errors = merge_experts(both, targets, matrices, self._dense_experts(block, mixtures[1], loaded, dense))
            best = min(range(len(errors)), key=errors.__getitem__)
            matched = Matched(before, tuple(errors), best + 1 if errors[best] < before else 0)
        return matched, {name: matrices.tensors[name] for name in matrices.changed} if matched.best else {}

    def _dense_experts(
        self, block: int, mixture: Mixture, loaded: Mapping[str, torch.Tensor], dense: Stream
    ) -> DenseExperts:
        """Where no router's rows are found, experts are alike by what they make alone."""
        infos, matrices = dense.model.tensor_map, ExpertMatrices(dense.model, block, loaded)
        (down,) = matrices.names(0, down=True)
        hidden = len(matrices.matrix(down, 0))
        rows = [
            loaded[name] for name in loaded if infos[name].role == "router" and infos[name].entry.shape[1:] == (hidden,)
        ]
        router = rows[0][: mixture.experts] if rows else torch.zeros(mixture.experts, hidden)
        return DenseExperts(matrices, self.kept[block], router.to(dense.model.device, torch.float32))


def _told(run: Run[PreparedStructure], change: StructuredPlan) -> StructuredPlan:
    """What changed has a shape, as what is written; a note tells the errors."""
    lines = {block: line for block, line in sorted(run.output.done.items()) if _RECORD in line}
    fitted = {name for line in lines.values() for name in line["fitted"]}
    tensors = {
        name: OutputTensor(planned.source, run.output.layout.entries[name].shape) if name in fitted else planned
        for name, planned in change.tensors.items()
    }
    runs = [(block,) for block in range(len(run.model.blocks))]
    matched = tuple(block_recoveries(runs, run.output))
    notes = (*change.notes, _note(run.plan.options.after, matched))
    return replace(change, tensors=tensors, matched=matched, notes=notes)


def _note(after: str, matched: Sequence[BlockRecovery]) -> str:
    helped = [each for each in matched if each.best_epoch]
    rest = [str(each.block) for each in matched if not each.best_epoch]
    told = ", ".join(f"{each.block}: {each.error_before:.3g} to {each.error_after:.3g}" for each in helped)
    found = f"-o after={after}: squared error on held-out samples, as a share of the dense one's outputs, by block: "
    kept = f" It did not help in the blocks {', '.join(rest)}, which are as plain removal leaves them." if rest else ""
    return f"{found}{told or 'nowhere lower'}.{kept}"
