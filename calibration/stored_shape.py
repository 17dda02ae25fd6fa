"""How many samples stored tokens hold, told from the headers of their files: no torch here."""

from __future__ import annotations

from calibration.errors import CalibrationError
from calibration.sources import Source


def stored_shape(source: Source) -> tuple[int, int] | None:
    """(samples, length of the longest) of a source of stored tokens; None where the files are not as they must be."""
    from safetensors import SafetensorError, safe_open

    shapes: list[list[int]] = []
    for path in source.files:
        try:
            with safe_open(path, framework="numpy") as file:
                shapes.append(file.get_slice("input_ids").get_shape())
        except (SafetensorError, OSError):
            return None  # who reads the tokens tells what is wrong with them
    if not all(len(shape) == 2 for shape in shapes):
        return None
    return sum(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


def check_stored(given: str, shape: tuple[int, int], samples: int | None, seq_len: int | None) -> None:
    """Raise CalibrationError for a `samples` or `seq_len` that stored tokens of this shape do not have."""
    held, length = shape
    if seq_len is not None and seq_len != length:
        raise CalibrationError(
            f"{given} holds samples of {length} tokens, which are used as they are: leave out --seq-len {seq_len}."
        )
    if samples is not None and samples > held:
        raise CalibrationError(
            f"{given} holds {held} samples, but --samples asks for {samples}: ask for {held} at most."
        )
