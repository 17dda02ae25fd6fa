"""Lists of the experts that stay, layer by layer, as runtimes read them at load time.

JSONL: a line a layer, `{"0": [5, 2, 7]}`, those that stay, best first. JSON: `k`, how many stay in each layer (where
that differs a list, in the order of the layers); `layers`, the numbers of those with experts; `keep`, layer -> those
that stay, sorted; `ranking`, layer -> all of them, best first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prune_cli.errors import RequestError
from prune_cli.structured.moe.mixtures import Mixture

_FORMS = (".jsonl", ".json")


def check_to_write(given: str | None, *, replace: bool, said: str = "") -> None:
    """Raise RequestError before any work for a file that cannot be written; the user `said` it so."""
    if given is None:
        return
    path, said = Path(given).expanduser(), said or f"-o save_keep_list={given}"
    if path.suffix not in _FORMS:
        raise RequestError(f"{said}: its name must end in .jsonl (a line a layer) or .json (one object).")
    if path.exists() and not replace:
        raise RequestError(f"{said} exists already: choose another file, or read it with -o keep_list=.")
    if not path.parent.is_dir():
        raise RequestError(f"{said}: there is no folder {path.parent}.")


def write_keep_list(given: str, kept: Mapping[int, Sequence[int]], values: Mapping[int, torch.Tensor]) -> None:
    """`kept` are the experts that stay in each layer, `values` the scores of all, higher for better ones."""
    ranking = {block: torch.argsort(values[block], descending=True, stable=True).tolist() for block in sorted(kept)}
    best_first = {block: [expert for expert in order if expert in kept[block]] for block, order in ranking.items()}
    if given.endswith(".jsonl"):
        text = "".join(json.dumps({str(block): experts}) + "\n" for block, experts in best_first.items())
    else:
        counts = [len(kept[block]) for block in sorted(kept)]
        whole = {
            "k": counts[0] if len(set(counts)) == 1 else counts,
            "layers": sorted(kept),
            "keep": {str(block): sorted(kept[block]) for block in sorted(kept)},
            "ranking": {str(block): order for block, order in ranking.items()},
        }
        text = json.dumps(whole) + "\n"
    Path(given).expanduser().write_text(text, encoding="utf-8")


def read_keep_list(given: str, mixtures: Sequence[Mixture]) -> dict[int, list[int]]:
    """Layer -> the experts that stay. Raises RequestError where the file does not fit the model."""
    found, said = _layers(given), f"-o keep_list={given}"
    wanted = [mixture.block for mixture in mixtures]
    if sorted(found) != wanted:
        raise RequestError(f"{said} has the layers {sorted(found)}, but those with experts are {wanted}.")
    for mixture in mixtures:
        experts = found[mixture.block]
        if sorted(set(experts)) != sorted(experts) or not all(0 <= each < mixture.experts for each in experts):
            raise RequestError(
                f"{said} has {experts} for layer {mixture.block}, expected numbers from 0 to {mixture.experts - 1}, "
                "none of them twice."
            )
    return found


def check_one_length(listed: Mapping[int, Sequence[int]], said: str) -> None:
    """Raise RequestError for lists that no checkpoint can be made by; the user `said` a file."""
    counts = [len(experts) for experts in listed.values()]
    if len(set(counts)) > 1:
        raise RequestError(
            f"{said} keeps from {min(counts)} to {max(counts)} experts a layer, but config.json has one number for all "
            "layers, so such a checkpoint loads nowhere: make the lists of one length, or add --keep-list-only."
        )


def _layers(given: str) -> dict[int, list[int]]:
    path, said = Path(given).expanduser(), f"-o keep_list={given}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{said} cannot be read ({error}): make it with -o save_keep_list=.") from error
    try:
        lines = [json.loads(line) for line in ([text] if path.suffix == ".json" else text.splitlines()) if line.strip()]
        if len(lines) == 1 and "keep" in lines[0]:
            lines = [_by_layer(lines[0])]
        found = [(int(layer), [_number(each) for each in experts]) for line in lines for layer, experts in line.items()]
    except (ValueError, TypeError, AttributeError) as error:
        raise RequestError(
            f'{said} is no keep list ({error}), expected a line a layer as {{"0": [5, 2]}}, or one object with keep: '
            "make it with -o save_keep_list=."
        ) from error
    if len(dict(found)) < len(found):
        raise RequestError(f"{said} has a layer twice: keep one of its lines.")
    return dict(found)


def _by_layer(whole: Mapping[str, Any]) -> Mapping[Any, Any]:
    """`keep` of a JSON list, which may be a list beside `layers`."""
    keep = whole["keep"]
    return dict(zip(whole.get("layers", range(len(keep))), keep, strict=True)) if isinstance(keep, list) else keep


def _number(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no number of an expert")
    return value
