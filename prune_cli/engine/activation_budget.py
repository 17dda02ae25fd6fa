"""How many hidden states wait in memory: what a run can change of its memory without changing a bit of its results."""

from __future__ import annotations

from dataclasses import dataclass

from prune_cli.engine.memory import LARGE_INPUTS

# Hidden states of the windows on their way together; more windows mean another pass over the weights.
GROUP_BYTES = 4 << 30


@dataclass(frozen=True)
class ActivationBudget:
    """Bytes of one model's paused batches, beyond which they wait in files; on a CPU alone.

    `inputs` of those at a linear layer; `states` of those before a block, None for all. `together` are the hidden
    states of windows that pass the blocks at once where nothing is pruned, on any device.
    """

    inputs: int = LARGE_INPUTS
    states: int | None = None
    together: int = GROUP_BYTES

    @classmethod
    def of(cls, nbytes: int | None) -> ActivationBudget:
        """`nbytes` for each, or as usual where that is less, or nothing is said."""
        return cls() if nbytes is None else cls(min(nbytes, LARGE_INPUTS), nbytes, min(nbytes, GROUP_BYTES))


USUAL = ActivationBudget()


@dataclass(frozen=True)
class Batching:
    """How windows pass a model: `size` of them in a batch, and batches side by side whose states take `together`."""

    size: int
    together: int = GROUP_BYTES
