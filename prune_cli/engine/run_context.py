"""What every stage of a run has at hand: what was asked for and opened, the texts, the output, progress, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from calibration.batch import Batch
from calibration.tokens import TokenSet
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.texts import Texts
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress
from prune_cli.ranks.ranks import Ranks
from prune_cli.request.request import PruneRequest

Plan_co = TypeVar("Plan_co", bound=OpenModel, covariant=True)


@dataclass(frozen=True)
class Run(Generic[Plan_co]):
    """One run of `prune` whose output has begun; `plan` is all that was settled before.

    `inputs` are hashes of what is read beside weights; `warnings` is what the run came upon that its report tells.
    """

    plan: Plan_co
    texts: Texts
    output: OutputFolder
    progress: Progress
    memory: PeakMemory
    inputs: Mapping[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def warn(self, *texts: str) -> None:
        """Tell at once, and again in the report."""
        self.warnings.extend(texts)
        for text in texts:
            self.progress.say(f"warning: {text}")

    @property
    def request(self) -> PruneRequest:
        return self.plan.request

    @property
    def model(self) -> StreamedModel:
        return self.plan.model

    @property
    def ranks(self) -> Ranks:
        """The processes of this run; the first of them writes and talks."""
        return self.plan.ranks

    @property
    def calibration(self) -> TokenSet:
        """The calibration windows, of a run that reads any."""
        assert self.texts.calibration is not None
        return self.texts.calibration

    def batches(self, windows: Batch | None = None) -> list[Batch]:
        """`windows`, by default all calibration windows, in batches of the size asked for."""
        return self.plan.batches(self.calibration.windows if windows is None else windows)
