"""A whole model in memory, as plain `transformers` loads and runs it; the timings of its `generate`."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from prune_cli.bench.result import Round
from prune_cli.errors import PruneError, RequestError, one_line
from prune_cli.model.architecture import auto_class, position_limit


class WholeModel:
    """One checkpoint folder: first its config, then the weights, then rounds of generation."""

    def __init__(self, given: str, folder: Path, dtype: torch.dtype, device: torch.device, trust: bool) -> None:
        self.given = given
        self._folder, self._dtype, self._device, self._trust = folder, dtype, device, trust
        self._model: Any = None
        transformers_logging.disable_progress_bar()
        try:
            self._config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        except Exception as error:  # whatever transformers, its validators or the checkpoint's own code raise
            raise RequestError(self._not_loaded(error)) from error

    def limits(self) -> tuple[int | None, int]:
        """The longest sequence that the config allows (None where it names none), and the size of the vocabulary."""
        return position_limit(self._config), self._config.get_text_config().vocab_size

    def warm_up_loading(self) -> None:
        """What a first load pays once on any machine: the import of the model's code, and the start of the device."""
        try:
            with torch.device("meta"):
                auto_class(self._config).from_config(self._config, dtype=self._dtype, trust_remote_code=self._trust)
        except Exception as error:  # whatever transformers or the checkpoint's own code raise
            raise RequestError(self._not_loaded(error)) from error
        torch.zeros(1, device=self._device)
        self._settle()

    def load(self) -> float:
        """Read the weights to the device; returns seconds. Raises RequestError where that fails or tensors lack."""
        begun = time.perf_counter()
        try:
            model, info = auto_class(self._config).from_pretrained(
                self._folder,
                dtype=self._dtype,
                device_map={"": str(self._device)} if self._device.type != "cpu" else None,
                trust_remote_code=self._trust,
                output_loading_info=True,
            )
            self._settle()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever transformers or the checkpoint's own code raise
            raise RequestError(self._not_loaded(error)) from error
        seconds = time.perf_counter() - begun
        missing = sorted(info["missing_keys"])
        if missing:
            raise RequestError(
                f"{self.given} lacks {len(missing)} tensors that its config describes ({missing[0]}, ...): "
                "transformers would fill them with random numbers, so there is nothing to measure."
            )
        self._model = model.eval()
        return seconds

    def facts(self) -> tuple[str, int]:
        """The class's name and the number of parameters, tied ones counted once."""
        return type(self._model).__name__, sum(parameter.numel() for parameter in self._model.parameters())

    @torch.no_grad()
    def generate(self, prompt: torch.Tensor, new_tokens: int) -> Round:
        """Time the greedy continuation of `prompt` (batch, length) by `new_tokens` tokens, whatever they are."""
        # Nothing of the checkpoint's own generation config: sampling, penalties or an early end would be measured too.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0
        )
        clock = _Clock(self._device)
        ids = prompt.to(self._device)
        self._settle()
        begun = time.perf_counter()
        try:
            self._model.generate(
                ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([clock])
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever transformers or the checkpoint's own code raise
            raise PruneError(f"{self.given} fails to generate ({one_line(error)}).") from error
        times = [begun, *clock.times]
        seconds = [after - before for before, after in pairwise(times)]
        return Round(seconds[0], tuple(seconds[1:]))

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _not_loaded(self, error: Exception) -> str:
        return (
            f"{self.given} cannot be loaded by transformers ({one_line(error)}): bench measures causal language models "
            "that AutoModelForCausalLM.from_pretrained loads."
        )


class _Clock(StoppingCriteria):
    """Notes when each token is there; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._device = device

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # pyright: ignore[reportReturnType]
