"""What `prune-cli check` was asked for, frozen. No torch here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from prune_cli.checks.rules import CheckResult, Thresholds
from prune_cli.request.request import Dtype


@dataclass(frozen=True)
class GateRequest:
    """`target` is a model (folder or hub id), which is measured, or the JSON file of a report, which is believed.

    None means that the user did not say: `data` and `against` are then those of the report in the model's folder.
    """

    target: str
    asked: Thresholds
    data: str | None = None
    against: str | None = None
    eval_windows: int | None = None
    seq_len: int | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | Literal["auto"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    allow_changed_inputs: bool = False

    @property
    def asks_for_the_reports_text(self) -> bool:
        """Whether the very windows are meant that the report of the model was measured on."""
        return self.data is None and self.eval_windows is None and self.seq_len is None

    @property
    def is_report(self) -> bool:
        return Path(self.target).expanduser().is_file()


@dataclass(frozen=True)
class GateResult:
    """`source` tells whether figures were measured or taken from a report; `text` what they were measured on."""

    target: str
    source: Literal["measured", "report"]
    against: str | None
    text: str
    passed: bool
    verdicts: Sequence[CheckResult]
    warnings: Sequence[str] = ()

    @property
    def failed(self) -> list[CheckResult]:
        return [verdict for verdict in self.verdicts if not verdict.passed]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
