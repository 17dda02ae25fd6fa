"""torch, imported when it is first used: a wrong option is refused from what a method states, without its seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            value = self.__dict__[name] = getattr(torch, name)
            return value

    torch = _Torch()
