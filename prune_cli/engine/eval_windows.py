"""How much of a text --eval measures where nobody said, told before it is done."""

from __future__ import annotations

from prune_cli.engine.open_model import OpenModel

# Fewer say too little, however quick the pruning is.
FEWEST = 16
_MEASURED_TWICE = 2
# Multiplications that take some seconds anywhere: so much is measured in any case.
_FEW_SECONDS = 3e11


def usual_windows(opened: OpenModel, samples: int, length: int) -> int:
    """As many as take no longer than pruning with `samples` calibration windows (0 if it reads none), or some seconds.

    Counted in multiplications of forward passes: pruning passes the blocks once (twice with --calibrate-by block),
    evaluation passes blocks and output head, before and after.
    """
    request, model = opened.request, opened.model
    blocks = sum(info.entry.count for info in model.tensor_map.values() if info.block is not None)
    head = model.vocab_size * model.hidden_size
    passes = (1 + opened.copies(samples * length)) * (2 if request.calibrate_by == "block" else 1)
    cost = _MEASURED_TWICE * (blocks + head)
    return max(FEWEST, samples * passes * blocks // cost, int(_FEW_SECONDS / (cost * length)))


def likely_windows(opened: OpenModel, samples: int, length: int) -> int:
    """Those that were asked for, else `usual_windows`."""
    asked = opened.request.eval_windows
    return asked if isinstance(asked, int) else usual_windows(opened, samples, length)
