"""From what the user typed (a folder or a hub id) to a local folder and the exact revision it holds."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from prune_cli.checkpoint.reader import ADAPTER_CONFIG, INDEX_FILE, SINGLE_FILE
from prune_cli.errors import PruneError, RequestError, one_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_NEVER_FETCHED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.pkl", "original/*"]


@dataclass(frozen=True)
class Source:
    """A checkpoint folder. `revision` is the commit of a hub checkpoint, None for a local folder."""

    given: str
    folder: Path
    revision: str | None


def resolve_model(given: str, revision: str | None) -> Source:
    """Find `given` on this machine, or fetch it from the hub; raises RequestError or PruneError in one sentence."""
    return local_model(given, revision) or _fetch(given, revision)


def local_model(given: str, revision: str | None) -> Source | None:
    """The folder that `given` names, None for a model id of the hub; raises RequestError for what is neither."""
    if not given.strip():
        raise RequestError("MODEL is an empty name: give the folder of a checkpoint or a model id of the hub.")
    path = Path(given).expanduser()
    if path.is_dir():
        if revision is not None:
            raise RequestError(f"--revision is for models of the hub, but {given} is a local folder: leave it out.")
        return Source(given, path.resolve(), None)
    if path.is_file():
        raise RequestError(_file_given(path))
    if given.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(given):
        raise RequestError(f"{given} is not there: give the folder of a checkpoint or a model id of the hub.")
    return None


def _file_given(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path} is GGUF: give the folder of the safetensors checkpoint that it was converted from."
    return f"{path} is a file: give the folder that holds config.json and the safetensors."


def _fetch(given: str, revision: str | None) -> Source:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(given, revision=revision, ignore_patterns=_NEVER_FETCHED))
    except GatedRepoError as error:
        raise RequestError(
            f"{given} is gated: accept its conditions on the hub and log in (hf auth login, or HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise RequestError(f"{given} has no revision {revision!r}: check --revision.") from error
    except RepositoryNotFoundError as error:
        raise RequestError(
            f"{given} is neither a folder here nor a model that this token can see on {constants.ENDPOINT}: "
            "check the name, or log in (hf auth login, or HF_TOKEN) if it is private."
        ) from error
    except LocalEntryNotFoundError as error:
        why = "offline mode is on" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached or fails"
        raise RequestError(
            f"{given} is no folder here and not in the hub's cache, and {why}: give a local folder, or fetch it online."
        ) from error
    except HFValidationError as error:
        raise RequestError(f"{given} is not there, and it is no valid model id of the hub either.") from error
    except Exception as error:  # the client's transport has exceptions of its own
        raise PruneError(
            f"Fetching {given} from {constants.ENDPOINT} failed ({one_line(error)}): try again."
        ) from error
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE, ADAPTER_CONFIG)):
        raise RequestError(
            f"{given} has neither {SINGLE_FILE} nor {INDEX_FILE} on the hub, and weights in other formats (pickle, "
            "GGUF) are not fetched: look for a revision or a copy with safetensors."
        )
    return Source(given, folder, folder.name)
