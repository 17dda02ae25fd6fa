"""Which linear layers read the same input, learned from the blocks before: most blocks are like them."""

from __future__ import annotations

from prune_cli.model.streamed_model import StreamedModel


class InputGroups:
    """A guess, for several ranks to prune side by side what one of them could only meet one after the other.

    A wrong guess costs time: what turns out to have other inputs is pruned again by those.
    """

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._beside: dict[str, list[str]] = {}

    def learn(self, first: str, name: str) -> None:
        """`name` was met behind `first`, with the same inputs."""
        beside = self._beside.setdefault(self._within(first), [])
        if self._within(name) not in beside:
            beside.append(self._within(name))

    def beside(self, first: str, names: list[str]) -> list[str]:
        """Those of `names`, of the same block, that are likely to read what `first` reads."""
        likely = self._beside.get(self._within(first), ())
        return [name for name in names if self._within(name) in likely]

    def _within(self, name: str) -> str:
        """Where in its block a tensor is used."""
        info = self._model.tensor_map[name]
        return info.module_name.removeprefix(f"{self._model.blocks_name}.{info.block}.")
