"""Tells transformers how to load sparse checkpoints and listed sizes: when it is imported, at no cost before."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now if transformers' registry of formats is there already, else as soon as something imports it."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenRegistryIsImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenRegistryIsImported())


class _WhenRegistryIsImported(MetaPathFinder):
    """Steps in once. Importing transformers in `import prune_cli` would make `prune-cli --help` wait for torch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            spec.loader.exec_module = load_and_register
        return spec


def _register() -> None:
    from prune_cli.loading.shapes_quantizer import register as register_sizes
    from prune_cli.loading.sparse_quantizer import register

    register()
    register_sizes()
