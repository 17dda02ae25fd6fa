"""Whether `methods` and `calibration` are the folders beside `prune_cli`: others bear such names too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

OWN = ("methods", "calibration")


def check_own_packages() -> None:
    """Raise ImportError where Python would import another `methods` or `calibration` than ours. Imports neither."""
    beside = Path(__file__).resolve().parents[2]
    for name in OWN:
        found = _place(name)
        if found is not None and found != beside / name:
            raise ImportError(
                f"prune-cli brings a package {name!r} in {beside / name}, but Python finds another one first, {found}: "
                "rename that one, uninstall it, or start Python from another folder or in an environment of its own.",
                name=name,
                path=str(found),
            )
        if found is None:
            raise ImportError(
                f"prune-cli's own package {name!r} is missing in {beside}: install prune-cli again.", name=name
            )


def _place(name: str) -> Path | None:
    """The folder of a package, or the file of a single module, that `import name` gives or gave."""
    loaded = sys.modules.get(name)
    spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return next((Path(place).resolve() for place in spec.submodule_search_locations), None)
    return Path(spec.origin).resolve() if spec.origin else None
