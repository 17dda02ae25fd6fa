"""What a run gains for whoever uses its output, in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_cli.report.format import change_of, size

if TYPE_CHECKING:
    from methods._pattern import NofM


def gain_of_sparse_files(pattern: NofM | None, dense: int, sparse: int) -> str:
    """What sparse files of `sparse` bytes bring beside dense ones; `pattern` is None for zeros anywhere."""
    change = change_of(dense, sparse)
    kernels = " Runtimes with kernels for this pattern (2:4 on recent NVIDIA GPUs) can use it." if pattern else ""
    return (
        f"The sparse files take {size(sparse)} where dense ones take {size(dense)} ({change}); loaded with "
        f"import prune_cli they give the dense model, which is in memory no smaller and no faster.{kernels}"
    )


def gain_of_zeros(pattern: NofM | None) -> str:
    """What zeros in a dense file bring, said plainly; `pattern` is None for zeros anywhere."""
    if pattern:
        return (
            f"The {pattern} zeros make the file no smaller and plain transformers no faster by themselves; "
            "runtimes with kernels for this pattern (2:4 on recent NVIDIA GPUs) can use them."
        )
    return (
        "Unstructured zeros make the file no smaller and the model no faster by themselves; "
        "they pay off with a sparse or compressed storage or a runtime for sparse weights."
    )
