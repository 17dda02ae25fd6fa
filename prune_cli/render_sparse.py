"""What `convert` and `verify` tell on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from prune_cli.commands.terminal import size

if TYPE_CHECKING:
    from prune_cli.checks.verify import Verification
    from prune_cli.sparse.convert import Conversion


def show_conversion(console: Console, done: Conversion) -> None:
    saved = 1 - done.bytes_after / done.bytes_before
    change = f"{saved:.1%} less" if saved >= 0 else f"{-saved:.1%} more"
    what = "encoded" if done.format == "sparse" else "decoded"
    console.print(
        f"{done.model} as {done.format} safetensors: {size(done.bytes_before)} became {size(done.bytes_after)} "
        f"({change}), {done.encoded_tensors} of {done.tensors} tensors {what}.",
        highlight=False,
        soft_wrap=True,
    )
    for name in done.not_copied:
        console.print(f"{name} was not copied: it holds weights in another form.", highlight=False, soft_wrap=True)
    console.print(f"Written to {done.out}", highlight=False, soft_wrap=True)


def show_verification(console: Console, found: Verification) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    for text in found.checked:
        say(f"Checked: {text}.")
    for text in found.skipped:
        say(f"Not checked: {text}.")
    for problem in found.problems:
        say(f"Wrong: {problem.problem}")
    say(f"{found.model} has {len(found.problems)} problem(s)." if found.problems else f"{found.model} is sound.")
