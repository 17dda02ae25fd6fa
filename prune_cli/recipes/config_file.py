"""`prune-cli.yaml`: options for all runs below a folder, in the form of a recipe."""

from __future__ import annotations

from pathlib import Path

from prune_cli.errors import RequestError
from prune_cli.recipes.reading import Recipe, read_recipe

NAME, NONE = "prune-cli.yaml", "none"


def find_config(given: str | None, folder: Path) -> Recipe | None:
    """The config in the file `given`, or in the nearest `prune-cli.yaml` of `folder` and those above it.

    None where there is none, or `given` is none. Raises RequestError as `read_recipe` does.
    """
    if given == NONE:
        return None
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise RequestError(f"--config {given} is no file: give a YAML file with options, or none for no config.")
        return read_recipe(path)
    found = next((each / NAME for each in (folder, *folder.parents) if (each / NAME).is_file()), None)
    return None if found is None else read_recipe(found)
