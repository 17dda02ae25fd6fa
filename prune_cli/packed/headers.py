"""What finders of packed weights check in headers, each refused in one sentence that names the tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.errors import RequestError

Entries = Mapping[str, TensorEntry]


def part(entries: Entries, name: str, of: str) -> TensorEntry:
    """The entry `name`, without which the codes `of` mean nothing."""
    if name not in entries:
        raise RequestError(f"{of} is packed but its {name} is missing: a shard was lost, or download it again.")
    return entries[name]


def check_dtype(entry: TensorEntry, dtypes: Collection[str], scheme: str) -> None:
    if entry.dtype not in dtypes:
        wanted = " or ".join(sorted(dtypes))
        raise RequestError(
            f"{entry.name} is stored as {entry.dtype}, but {scheme} in config.json needs {wanted}: "
            "the weights and the config do not belong together."
        )


def check_shape(entry: TensorEntry, *shapes: Sequence[int], why: str) -> None:
    """`shapes` are those that will do; `why` says what they follow from."""
    if entry.shape not in {tuple(shape) for shape in shapes}:
        raise RequestError(
            f"{entry.name} has the shape {list(entry.shape)}, expected {list(shapes[0])} ({why}): "
            "the weights and the config do not belong together."
        )
