"""Reads the commands of a Markdown page and runs them, so that no page tells what does not work.

The convention for pages in `docs/`:

- Every line of a ```sh block is a command, run in the order of the page in one scratch folder where `examples/` is the
  repository's. A trailing backslash continues a line; a comment may say `# exit code 1`, else 0 is expected.
- Every ```python block is a program of its own, run in that folder and in this process.
- `<!-- file: recipe.yaml -->` right before a block (of any language) writes the block to that file.
- `<!-- with: Qwen/Qwen3-0.6B=tiny-model c4=small.txt 128=4 -->` replaces words in all that follows on the page: hub ids
  by `tiny-model` (a Llama that takes 64 positions; lies there), `tiny-moe` (a Mixtral) or `examples/demo-model`, texts
  of the network by `small.txt` (some kilobytes; lies there), large numbers by small ones.
- `<!-- quick: prune --samples 4 --seq-len 64 -->` adds these options to every `prune-cli prune` that follows and does
  not say them, so that it ends soon. Once per command.
- ```sh network marks what cannot be run without a network or an account (`pip install`, `git push`); nothing of ours
  may stand there. Blocks of other languages are not run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.conftest import RunCommand
from tests.programs import programs
from tests.tiny import save_tiny

ROOT = Path(__file__).parent.parent
_SMALL = 6000
_COMMENT = re.compile(r"<!-- (with|quick|file): (.*?) -->\s*")
_FENCE = re.compile(r"```(\S*) ?(.*)")
_EXIT_CODE = re.compile(r"#.*exit code (\d+)")
_NEEDS_SHELL = re.compile(r"[|&;<>$`(){}~]|\*(?=\S*\s)")


@dataclass(frozen=True)
class Step:
    """One thing that a page does: `kind` tells how `text` is run; `code` is the expected exit code of a command."""

    kind: Literal["command", "python", "file", "network"]
    text: str
    where: str
    code: int = 0
    file: str = ""


@dataclass
class _Page:
    """What the comments read so far say."""

    words: dict[str, str] = field(default_factory=dict)
    quick: dict[str, list[str]] = field(default_factory=dict)
    file: str = ""

    def note(self, kind: str, text: str) -> None:
        if kind == "with":
            self.words |= dict(pair.split("=", 1) for pair in shlex.split(text))
        elif kind == "quick":
            command, *options = shlex.split(text)
            self.quick[command] = options
        else:
            self.file = text

    def replaced(self, text: str) -> str:
        for word, instead in self.words.items():
            text = re.sub(rf"(?<![\w./-]){re.escape(word)}(?![\w/-])", instead, text)
        return text

    def quickened(self, line: str) -> str:
        for command, options in self.quick.items():
            if re.match(rf"prune-cli {command}\b", line):
                pairs = zip(options[::2], options[1::2], strict=True)
                added = [f"{name} {value}" for name, value in pairs if name not in line.split()]
                line = " ".join([f"prune-cli {command}", *added]) + line.removeprefix(f"prune-cli {command}")
        return line


def steps_of(path: Path) -> list[Step]:
    """Everything that the page `path` does, in its order."""
    page, steps, lines = _Page(), [], path.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        where = f"{path.name}:{number + 1}"
        if found := _COMMENT.fullmatch(lines[number]):
            page.note(found[1], found[2])
        elif found := _FENCE.fullmatch(lines[number]):
            end = lines.index("```", number + 1)
            steps += _steps_of_block(page, found[1], found[2], page.replaced("\n".join(lines[number + 1 : end])), where)
            number = end
        number += 1
    return steps


def _steps_of_block(page: _Page, language: str, mark: str, text: str, where: str) -> Iterator[Step]:
    if page.file:
        yield Step("file", text + "\n", where, file=page.file)
        page.file = ""
    elif language == "python":
        yield Step("python", text, where)
    elif language == "sh":
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            expected = _EXIT_CODE.search(line)
            command = " ".join(shlex.split(line, comments=True)) and re.sub(r"(^|\s)#.*", "", line).strip()
            if command:
                code = int(expected[1]) if expected else 0
                yield Step("network" if mark == "network" else "command", page.quickened(command), where, code)


def run_step(step: Step, folder: Path, command: RunCommand, settings: dict[str, str]) -> None:
    """Run one step in `folder`, the working folder of this process; plain calls of `prune-cli` in this process."""
    if step.kind == "network":
        assert not step.text.startswith("prune-cli"), f"{step.where}: our own commands are run, not marked network"
    elif step.kind == "file":
        (folder / step.file).write_text(step.text)
    elif step.kind == "command" and step.text.startswith("prune-cli ") and not _NEEDS_SHELL.search(step.text):
        outcome = command(*shlex.split(step.text)[1:])
        assert outcome.code == step.code, f"{step.where}: {step.text}\n{outcome.stdout}\n{outcome.stderr}"
    elif step.kind == "python":
        exec(compile(step.text, step.where, "exec"), {"__name__": "__main__"})
    else:
        words = ["bash", "-euo", "pipefail", "-c", step.text]
        done = subprocess.run(words, cwd=folder, env=_environment() | settings, capture_output=True, text=True)
        assert done.returncode == step.code, f"{step.where}: {step.text}\n{done.stdout}\n{done.stderr}"


def scratch(folder: Path) -> Path:
    """An empty folder with the repository's `examples`, a tiny model and a small text, as the pages expect it."""
    save_tiny(folder / "tiny-model", "llama-untied")
    save_tiny(folder / "tiny-moe", "mixtral")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "small.txt").write_text((ROOT / "LICENSE").read_text(encoding="utf-8")[:_SMALL], encoding="utf-8")
    return folder


def _environment() -> dict[str, str]:
    """A shell in which `prune-cli` and `python` are those of these tests."""
    return {**os.environ, "PATH": f"{programs()}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
