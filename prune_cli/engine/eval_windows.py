"""How much of a text --eval measures where nobody said, and what that takes: told before it is done."""

from __future__ import annotations

from prune_cli.engine.evaluate import GROUP_BYTES, STATES_PER_TOKEN
from prune_cli.engine.open_model import OpenModel, pick_batch_size, usual_length

# Fewer say too little, however quick the pruning is.
FEWEST = 16
_MEASURED_TWICE = 2
# Multiplications that take some seconds anywhere: so much is measured in any case.
_FEW_SECONDS = 3e11
# Logits in float32, their logarithm of the softmax and its gradient-free copy.
_FLOATS_OF_A_LOGIT = 3


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


def evaluation_memory(opened: OpenModel, given_tokens: int | None) -> int:
    """Estimated bytes of --eval: hidden states that travel together, a block, the head with one batch of logits."""
    request, model = opened.request, opened.model
    if opened.evaluation is None:
        return 0
    length, itemsize = usual_length(opened), opened.dtype.itemsize
    samples = (given_tokens or 0) // length
    asked = request.eval_windows
    windows = asked if isinstance(asked, int) else usual_windows(opened, samples, length)
    states = windows * length * model.hidden_size * itemsize * STATES_PER_TOKEN
    batch = min(windows, pick_batch_size(request.batch_size, opened.device, length))
    logits = length * model.vocab_size * (batch * itemsize + _FLOATS_OF_A_LOGIT * 4)
    outside = sum(info.entry.count for info in model.tensor_map.values() if info.block is None and info.parameter)
    block = max(_block(opened, index) for index in range(len(model.blocks)))
    return (2 * block + outside) * itemsize + min(states, GROUP_BYTES) + logits


def _block(opened: OpenModel, index: int) -> int:
    return sum(opened.checkpoint.entries[name].count for name in opened.model.block_names(index))
