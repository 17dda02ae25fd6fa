"""Options of `prune` that say nothing to a structured method are refused, not ignored. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_cli.errors import RequestError

if TYPE_CHECKING:
    from prune_cli.request import PruneRequest


def check_structured(request: PruneRequest) -> None:
    """Raise RequestError for what only sparse weights have."""
    method = request.method
    said = {
        "--pattern": request.pattern is not None,
        "--refine": request.refine is not None,
        "--reconstruct": request.reconstruct,
        "--allocate": request.allocate != "uniform",
        "--target": request.target != "pruned",
        "--self-calibration": request.self_calibration != 0,
        "--calibrate-by": request.calibrate_by != "sublayer",
        "--include": bool(request.include),
        "--exclude": bool(request.exclude),
        "--preset": request.preset is not None,
        "--format sparse": request.format == "sparse",
    }
    for option, given in said.items():
        if given:
            raise RequestError(
                f"{option} is for methods that make weights sparse, and {method} removes whole units: leave it out "
                f"(prune-cli methods {method} lists what {method} takes)."
            )
