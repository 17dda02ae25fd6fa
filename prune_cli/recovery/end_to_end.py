"""The training of a whole model on its teacher's predictions, with everything that a killed run needs to go on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

from calibration.batch import Batch
from methods._distillation import divergence, square_head
from prune_cli.checkpoint.whole_file import NOT_WRITTEN, save_whole
from prune_cli.engine.block_outputs import hidden_states
from prune_cli.engine.padding import real_rows
from prune_cli.engine.seeds import seed_of
from prune_cli.errors import PruneError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress
from prune_cli.recovery.match_blocks import Samples
from prune_cli.recovery.teacher_store import TeacherStore
from prune_cli.recovery.trained_weights import KeptWeights

TRAINING = "Training"
_BETAS = (0.9, 0.95)
_LONGEST_GRADIENT = 1.0
# Of all steps; of the rate, at the end of the cosine.
_WARM_UP, _LAST_RATE = 0.05, 0.05
# Looks at the held-out samples in a row without a better one.
_PATIENCE = 5
_STATE_FILE = "training.safetensors"
_KEY = "prune-cli training"


@dataclass(frozen=True)
class Course:
    """How long and towards what; a look at the held-out samples, and a saved state, come `every` so many steps.

    `kl`, `square_head` and `next_token` are the weights of the three losses.
    """

    steps: int
    every: int
    rate: float
    kl: float
    square_head: float
    next_token: float
    seed: int
    recompute: bool

    def rate_at(self, step: int) -> float:
        """The share of the rate at a step from 0: up in a line, then down on a cosine."""
        warm = max(1, round(self.steps * _WARM_UP))
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Look:
    """At the held-out samples after `step` steps: their KL, and the mean loss that was trained since the last look."""

    step: int
    tokens: int
    loss: float | None
    held_out: float


@dataclass(frozen=True)
class Progression:
    """How far a training is; `ended` is empty while it goes on. `best` is a step, 0 for the start."""

    looks: tuple[Look, ...] = ()
    best: int = 0
    ended: str = ""
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return self.looks[-1].step if self.looks else 0

    def with_look(self, look: Look) -> Progression:
        least = min((each.held_out for each in self.looks), default=math.inf)
        looks = (*self.looks, look)
        best = look.step if look.held_out < least else self.best
        since = sum(each.step > best for each in looks)
        return replace(self, looks=looks, best=best, ended="early" if since >= _PATIENCE else "")

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Progression:
        return cls(**{**document, "looks": tuple(Look(**look) for look in document["looks"])})


@dataclass
class EndToEnd:
    """Trains `weights` of `model`, all of which is loaded; `behind` are the blocks of the teacher that its own follow.

    `stored` makes of the parameters as they are what a checkpoint holds.
    """

    model: StreamedModel
    weights: KeptWeights
    samples: Samples
    store: TeacherStore
    behind: Sequence[int]
    course: Course
    folder: Path
    stored: Callable[[], dict[str, torch.Tensor]]
    progress: Progress
    _best: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    _states: list[torch.Tensor] = field(default_factory=list, init=False)

    def run(self) -> tuple[Progression, dict[str, torch.Tensor]]:
        """How it went, and the best values by checkpoint tensor; none where nothing was better than the start.

        It goes on from the state in `folder`, if there is one. Raises PruneError where that cannot be written, or the
        start is not finite.
        """
        course, groups = self.course, self.weights.groups(self.course.rate)
        fused = self.model.device.type in ("cpu", "cuda")
        self._optimiser = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, fused=fused)
        self._scaler = torch.amp.GradScaler(self.model.device.type, enabled=self.model.dtype == torch.float16)
        self._firsts = _firsts(self.samples)
        done = self._resumed()
        self.progress.stage(TRAINING, course.steps)
        self.progress.advance(done.step)
        with self._watched():
            if not done.looks:
                done = done.with_look(Look(0, 0, None, self._held_out()))
                if not math.isfinite(done.looks[0].held_out):
                    raise PruneError("The pruned model's predictions are not finite: try --dtype float32.")
            while not done.ended:
                done = self._until_next_look(done)
                self._save(done)
        return done, self._best

    def _until_next_look(self, done: Progression) -> Progression:
        begun, last = time.monotonic(), min(done.step + self.course.every, self.course.steps)
        losses, tokens = [], 0
        for step in range(done.step, last):
            index = self._order(step)
            loss = self._step(step, index)
            if not math.isfinite(loss):
                return replace(done, ended="nan", seconds=done.seconds + time.monotonic() - begun)
            losses.append(loss)
            tokens += self.samples.fit[index].tokens
            self.progress.advance()
        trained = time.monotonic() - begun
        look = Look(last, done.looks[-1].tokens + tokens, math.fsum(losses) / len(losses), self._held_out())
        if not math.isfinite(look.held_out):
            return replace(done, ended="nan", seconds=done.seconds + time.monotonic() - begun)
        done = replace(done.with_look(look), seconds=done.seconds + time.monotonic() - begun)
        if done.best == last:
            self._best = self.stored()
        self._say(look, tokens / trained, best=done.best == last)
        return done if done.ended or last < self.course.steps else replace(done, ended="budget")

    def _say(self, look: Look, speed: float, *, best: bool) -> None:
        self.progress.say(
            f"step {look.step} of {self.course.steps}: loss {look.loss:.4f}, held-out KL {look.held_out:.5f}"
            f"{' (best)' if best else ''}, {speed:,.0f} tokens/s"
        )

    def _order(self, step: int) -> int:
        """Which batch: every pass over them has an order of its own."""
        batches = len(self.samples.fit)
        generator = torch.Generator().manual_seed(seed_of(f"pass {step // batches}", self.course.seed))
        return int(torch.randperm(batches, generator=generator)[step % batches])

    # --- one step -----------------------------------------------------------------------------------------------

    def _step(self, step: int, index: int) -> float:
        """The loss before it; where that is not finite, nothing is changed."""
        for group in self._optimiser.param_groups:
            group["lr"] = group["share"] * self.course.rate_at(step)
        with torch.enable_grad():
            loss = self._loss(self._firsts[index], self.samples.fit[index])
        value = float(loss.detach())
        if math.isfinite(value):
            self._scaler.scale(loss).backward()
            self.weights.take_gradients()
            self._scaler.unscale_(self._optimiser)
            torch.nn.utils.clip_grad_norm_(self.weights.optimised.values(), _LONGEST_GRADIENT)
            self._scaler.step(self._optimiser)
            self._scaler.update()
            self.weights.apply()
        self._optimiser.zero_grad(set_to_none=True)
        return value

    def _loss(self, first: int, batch: Batch) -> torch.Tensor:
        course = self.course
        logits = self._forward(batch)
        loss = torch.zeros((), device=logits.device)
        if course.kl:
            loss = loss + course.kl * self._divergence(first, batch, logits).mean()
        if course.square_head:
            targets = [self._wanted(f"state.{block}", first, batch) for block in self.behind]
            ours = [real_rows(state, batch) for state in self._states]
            loss = loss + course.square_head * square_head(ours, targets)
        if course.next_token:
            loss = loss + course.next_token * _next_token(logits, batch)
        return loss

    def _forward(self, batch: Batch) -> torch.Tensor:
        # The weights are float32 while they are trained.
        mixed = self.model.dtype != torch.float32
        self._states.clear()
        with torch.autocast(self.model.device.type, self.model.dtype) if mixed else nullcontext():
            return self.model.forward(batch).logits

    def _divergence(self, first: int, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        ids, log_p = (self._wanted(name, first, batch) for name in ("ids", "log_p"))
        return divergence(real_rows(logits, batch), ids, log_p)

    def _wanted(self, name: str, first: int, batch: Batch) -> torch.Tensor:
        rows = self.store.rows(name, first, first + len(batch))[:, : batch.length]
        return real_rows(rows, batch).to(self.model.device)

    @torch.no_grad()
    def _held_out(self) -> float:
        """KL in nats per token."""
        fit, total, tokens = len(self.samples.fit), 0.0, 0
        for first, batch in zip(self._firsts[fit:], self.samples.held_out, strict=False):
            found = self._divergence(first, batch, self._forward(batch)).double()
            total, tokens = total + float(found.sum()), tokens + len(found)
        return total / tokens

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The blocks with their activations computed again when the gradients need them, and their states noted."""
        blocks = self.model.blocks
        before = [block.forward for block in blocks]
        hooks = []
        if self.course.recompute:
            for block, forward in zip(blocks, before, strict=True):
                # A module's own method would be found behind it, so what is set here is taken away again.
                block.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        if self.course.square_head:
            hooks = [block.register_forward_hook(self._note) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if self.course.recompute:
                for block in blocks:
                    del block.forward

    def _note(self, _module: object, _inputs: object, output: Any) -> None:
        self._states.append(hidden_states(output))

    # --- what a killed run finds --------------------------------------------------------------------------------

    def _save(self, done: Progression) -> None:
        """In one rename; an earlier state stays where the disk has no room for another."""
        tensors = {f"value:{name}": value.detach() for name, value in self.weights.optimised.items()}
        tensors |= {f"best:{name}": value for name, value in self._best.items()}
        for name, value in self.weights.optimised.items():
            tensors |= {f"{key}:{name}": each for key, each in self._optimiser.state[value].items()}
        head = {"done": asdict(done), "scaler": self._scaler.state_dict()}
        try:
            save_whole(self.folder / _STATE_FILE, tensors, _KEY, head)
        except NOT_WRITTEN as error:
            raise PruneError(
                f"The state of the training at step {done.step} cannot be written to {self.folder} ({error}): make "
                "space, then continue from the state before with --resume."
            ) from error

    def _resumed(self) -> Progression:
        path = self.folder / _STATE_FILE
        if not path.exists():
            return Progression()
        with safe_open(path, framework="pt") as file:
            head = json.loads(file.metadata()[_KEY])
            values = self.weights.optimised
            for full_name in file.keys():  # noqa: SIM118
                kind, _, name = full_name.partition(":")
                tensor = file.get_tensor(full_name)
                if kind == "best":
                    self._best[name] = tensor
                elif kind == "value":
                    values[name].data.copy_(tensor)
                else:
                    self._optimiser.state[values[name]][kind] = tensor.to(values[name].device)
        self.weights.apply()
        self._scaler.load_state_dict(head["scaler"])
        return Progression.from_json(head["done"])


def _firsts(samples: Samples) -> list[int]:
    """The number of the first window of every batch."""
    firsts, seen = [], 0
    for batch in samples.batches:
        firsts.append(seen)
        seen += len(batch)
    return firsts


def _next_token(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    wanted = batch.ids[:, 1:]
    if batch.mask is not None:
        wanted = wanted.masked_fill(~batch.mask[:, 1:], -100)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), wanted.flatten().to(logits.device), ignore_index=-100
    )


def remove_state(folder: Path) -> None:
    """Once the training is over and its result written."""
    (folder / _STATE_FILE).unlink(missing_ok=True)
