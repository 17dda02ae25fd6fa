"""The widest float that a device has."""

from __future__ import annotations

from methods._torch import torch


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 (Metal)."""
    return torch.float32 if device.type == "mps" else torch.float64
