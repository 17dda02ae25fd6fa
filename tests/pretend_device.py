"""A GPU without a GPU: tensors whose memory is the host's, and that torch takes for those of another device.

What would fail on a real one fails on it: a tensor of the host beside one of the device, and float64 where there is
none. What would make the host wait for the device is counted by the line of ours that asks.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from typer.testing import CliRunner

from calibration import statistics
from methods import _precision
from prune_cli.cli import app
from prune_cli.engine import open_model
from tests.drawing import draw_charts

NAME = "pretend"
_ROOMS = ("prune_cli", "methods", "calibration")
_OURS = tuple(str(Path(__file__).parents[1] / room) for room in _ROOMS)
# They are imported when a command runs, and hold what is replaced by name.
_LAZY = ("prune_cli.run", "prune_cli.evaluation.perplexity")
# Besides copies to the host: their results, or their sizes, are known only once the device has got there.
_WAIT = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"})
# They take tensors of both sides; an index may lie on the host.
_COPIES, _INDEXED = frozenset({"_to_copy", "copy_", "_copy_from"}), frozenset({"index", "index_put", "index_put_"})


class DeviceTensor(torch.Tensor):
    """On the device; `held` has its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: torch.Tensor) -> None:
        DEVICE.check_dtype(held.dtype)
        self.held = held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return DEVICE.run(function, args, dict(kwargs or {}))


class PretendDevice:
    """What the device has and has seen; `waits` counts by line of ours how often the host waited for it."""

    def __init__(self) -> None:
        self.float64 = True
        self.waits: Counter[str] = Counter()

    def check_dtype(self, dtype: torch.dtype) -> None:
        if dtype == torch.float64 and not self.float64:
            raise TypeError("The pretended device has no float64.")

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`function` by the host, checked as the device would."""
        name = function.overloadpacket.__name__
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        to_host = device is not None and device.type == "cpu"
        self._check_devices(name, args, kwargs)
        self._count_waits(name, args, to_host=to_host)
        wrapped = {id(each.held): each for each in _tensors((args, kwargs.values())) if isinstance(each, DeviceTensor)}
        before = [(each.shape, each.stride()) for each in wrapped.values()]
        output = function(*_mapped(_held, _widened(name, args)), **_mapped(_held, kwargs))
        after = [(each.held.shape, each.held.stride()) for each in wrapped.values()]
        assert before == after, f"{name} changes a shape in place"
        if to_host or (name in ("copy_", "_copy_from") and not isinstance(args[name == "_copy_from"], DeviceTensor)):
            return output
        return _mapped(lambda each: wrapped[id(each)] if id(each) in wrapped else DeviceTensor(each), output)

    def _check_devices(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if name in _COPIES:
            return
        given = [args[0], *args[2:]] if name in _INDEXED else [args, kwargs.values()]
        on_host = [each for each in _tensors(given) if not isinstance(each, DeviceTensor)]
        if any(each.ndim for each in on_host):
            shapes = [list(each.shape) for each in on_host]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but {shapes} are on the host.")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: a generator of the host cannot draw numbers on the device.")

    def _count_waits(self, name: str, args: tuple[Any, ...], *, to_host: bool) -> None:
        masked = name in _INDEXED and any(
            isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        to_host = to_host or (name == "copy_" and not isinstance(args[0], DeviceTensor))
        if (to_host or masked or name in _WAIT) and (line := _line_of_ours()) is not None:
            self.waits[line] += 1


def _widened(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """CUDA counts integers too, the host does not."""
    return (args[0].float(), *args[1:]) if name == "histc" and not args[0].is_floating_point() else args


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, DeviceTensor) else tensor


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    """Within lists of lists; torch's own walk through them takes longer than all the rest."""
    for each in given:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return change(given)
    if isinstance(given, list | tuple):
        return type(given)(_mapped(change, each) for each in given)
    if isinstance(given, dict):
        return {key: _mapped(change, each) for key, each in given.items()}
    return given


def _line_of_ours() -> str | None:
    """Of the call under way, unless code of others within ours makes it."""
    frame = sys._getframe(1)
    here, torch_folder = __file__, str(Path(torch.__file__).parent)
    while frame is not None and (frame.f_code.co_filename == here or frame.f_code.co_filename.startswith(torch_folder)):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(_OURS):
        return None
    file = Path(frame.f_code.co_filename).relative_to(Path(__file__).parents[1])
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


DEVICE = PretendDevice()


def _empty(size: Iterable[int], dtype: Any = None, *_: Any, **__: Any) -> torch.Tensor:
    return DeviceTensor(torch.empty(list(size), dtype=dtype))


def _empty_strided(size: Iterable[int], stride: Iterable[int], dtype: Any = None, *_: Any, **__: Any) -> torch.Tensor:
    return DeviceTensor(torch.empty_strided(list(size), list(stride), dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return DEVICE.run(torch.ops.aten._copy_from.default, (source, target, non_blocking), {})


def _made_by(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def on_device(*args: Any, **kwargs: Any) -> torch.Tensor:
        return DeviceTensor(make(*args, **{**kwargs, "device": torch.device("cpu")}))

    return on_device


def install() -> torch.device:
    """For the rest of this process there is such a device."""
    # A thread of its own would do the backward passes, out of sight.
    torch.autograd.set_multithreading_enabled(False)
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    install.library = library  # pyright: ignore[reportFunctionMemberAccess]
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    # Torch's own begin with an empty tensor, which grows.
    for name in ("arange", "arange.start", "arange.start_step", "eye", "eye.m"):
        packet, _, overload = name.partition(".")
        library.impl(name, _made_by(getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1")
    return torch.device(NAME, 0)


def _replace(original: Callable[..., Any], new: Callable[..., Any]) -> None:
    """In every module of ours that has it."""
    for module in [module for name, module in sys.modules.items() if name.startswith(_ROOMS)]:
        if getattr(module, original.__name__, None) is original:
            setattr(module, original.__name__, new)


def watched(commands: Sequence[tuple[bool, Sequence[str]]]) -> list[dict[str, Any]]:
    """Run each of prune-cli's `commands` on the device, with or without float64, in this process that ends thereafter.

    Of each: code, stdout, stderr, what it raised, and the waits.
    """
    device = install()
    draw_charts(really=False)
    for name in _LAZY:
        importlib.import_module(name)
    _replace(open_model.pick_device, lambda _: device)
    _replace(open_model.pick_dtype, lambda *_: torch.float32)
    for original in (statistics.sum_dtype, _precision.widest):
        _replace(original, lambda where: torch.float64 if DEVICE.float64 or where != device else torch.float32)
    return [_watched(command, float64=float64) for float64, command in commands]


def _watched(command: Sequence[str], *, float64: bool) -> dict[str, Any]:
    DEVICE.float64 = float64
    DEVICE.waits.clear()
    done = CliRunner().invoke(app, command)
    raised = "" if done.exception is None else "".join(traceback.format_exception(done.exception)[-6:])
    return {"code": done.exit_code, "stdout": done.stdout, "told": done.stderr + raised, "waits": dict(DEVICE.waits)}
