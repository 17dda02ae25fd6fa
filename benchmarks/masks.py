"""How far two pruned checkpoints agree about which weights are zero."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from prune_cli.checkpoint.file_names import REPORT_JSON
from prune_cli.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Agreement:
    """`share` of all compared weights that are zero in both or in neither; `worst` is the tensor that agrees least."""

    weights: int
    share: float
    worst: str
    worst_share: float


def compare_masks(ours: Path, other: Path) -> Agreement:
    """Compare the tensors that the report of `ours` calls pruned."""
    report = json.loads((ours / REPORT_JSON).read_text())
    mine, theirs = Checkpoint.open(ours), Checkpoint.open(other)
    names = [tensor["name"] for tensor in report["tensors"] if tensor["action"] == "pruned"]
    if missing := [name for name in names if name not in theirs.entries]:
        sys.exit(f"{other} has no tensor {missing[0]}")
    same = {name: int(((mine.read(name) == 0) == (theirs.read(name) == 0)).sum()) for name in names}
    shares = {name: same[name] / mine.entries[name].count for name in names}
    worst = min(shares, key=shares.__getitem__)
    weights = sum(mine.entries[name].count for name in names)
    return Agreement(weights, sum(same.values()) / weights, worst, shares[worst])
