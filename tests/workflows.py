"""A small runner of GitHub Actions and GitLab CI files: enough to execute the steps of ours as their runners would."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_EXPRESSION = re.compile(r"\$\{\{ *([\w.-]+) *\}\}")
_NOT_EMPTY = re.compile(r"([\w.-]+) != ''")


@dataclass(frozen=True)
class Script:
    """One step that runs a shell, with the variables that its `env` gives."""

    name: str
    text: str
    variables: Mapping[str, str]


def github_scripts(workflow: Path, action: Path, secrets: Mapping[str, str], **inputs: str) -> Iterator[Script]:
    """The scripts of a workflow with one job, our action's in its place; `inputs` replace what `with` says.

    Steps that use actions of others (checkout, caches, artifacts) are the runner's own and left out.
    """
    (job,) = yaml.safe_load(workflow.read_text())["jobs"].values()
    for step in job["steps"]:
        if step.get("uses", "").startswith("prune-cli/"):
            known = yaml.safe_load(action.read_text())
            assert step["with"].keys() | inputs.keys() <= known["inputs"].keys()
            values = {name: each.get("default", "") for name, each in known["inputs"].items()} | step["with"] | inputs
            context = {f"secrets.{name}": value for name, value in secrets.items()}
            context = {f"inputs.{name}": _filled(value, context) for name, value in values.items()}
            yield from _scripts_of_action(known, context)
        else:
            assert step["uses"].startswith("actions/"), step


def _scripts_of_action(action: Mapping[str, Any], context: Mapping[str, str]) -> Iterator[Script]:
    for step in action["runs"]["steps"]:
        if "uses" in step:
            continue
        assert "${{" not in step["run"], "an expression in a script is how inputs become code"
        condition = _NOT_EMPTY.fullmatch(step.get("if", ""))
        assert ("if" in step) == (condition is not None), step
        if condition is None or context[condition[1]]:
            yield Script(step["name"], step["run"], {k: _filled(v, context) for k, v in step["env"].items()})


def _filled(text: str, context: Mapping[str, str]) -> str:
    return _EXPRESSION.sub(lambda found: context[found[1]], text)


def run_script(script: Script, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """As the runner calls `shell: bash`."""
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script.text],
        cwd=folder,
        env={**environment, **script.variables},
        capture_output=True,
        text=True,
    )


def gitlab_commands(path: Path) -> dict[str, list[str]]:
    """The commands of each job, stage by stage; what installs stands under `before_script`."""
    document = yaml.safe_load(path.read_text())
    jobs = {name: job for name, job in document.items() if isinstance(job, dict) and "script" in job}
    ordered = sorted(jobs, key=lambda name: document["stages"].index(jobs[name]["stage"]))
    return {"before_script": document["default"]["before_script"]} | {name: jobs[name]["script"] for name in ordered}


def clean_environment() -> dict[str, str]:
    """Of this process, without what speaks of a hub or a CI."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "GITHUB_", "CI"))}
