"""What `--version -v` tells: versions, devices and folders, as a report of a fault needs them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub", "datasets", "accelerate", "lm-eval")


def installation() -> Iterator[str]:
    """Line after line; importing torch for the devices."""
    yield f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}"
    yield f"prune_cli in {Path(__file__).parent.parent}"
    for name in _LIBRARIES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} is not installed"
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield f"devices: {', '.join(['cpu', *devices, *(['mps'] if torch.backends.mps.is_available() else [])])}"
    yield f"torch uses {torch.get_num_threads()} threads; models of the hub are kept in {HF_HUB_CACHE}"
