"""Whole pipelines on the bundled model, from the example files: recipe, prune, check, push, download, check again."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import constants

from tests.conftest import RunCommand
from tests.documents import ROOT, scratch
from tests.hub_server import serve
from tests.hub_uploads import WRITER, UploadHandler, UploadHub
from tests.programs import programs
from tests.workflows import Script, clean_environment, github_scripts, gitlab_commands, run_script

EXAMPLES = ROOT / "examples" / "ci"
# What a machine without a network, and without an hour, puts in place of the example's.
INSTEAD = {
    "Qwen/Qwen3-0.6B": "examples/demo-model",
    "c4": "small.txt",
    "wikitext2": "small.txt",
    "128": "8",
    "2048": "64",
}
REPO = "my-org/qwen3-0.6b-half"
# httpx says this to huggingface_hub; a process of its own does not show it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@dataclass
class Runner:
    """A machine of a CI service: a checkout with the recipe, and a hub that user `me` of `my-org` may write to."""

    folder: Path
    hub: UploadHub

    def run(self, script: Script) -> subprocess.CompletedProcess[str]:
        temporary = self.folder.with_name("runner-temp")
        temporary.mkdir(exist_ok=True)
        settings = {
            "PATH": f"{programs()}:{clean_environment()['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RUNNER_TEMP": str(temporary),
            "GITHUB_ACTIONS": "true",
            "GITHUB_OUTPUT": str(self.folder.with_name("outputs")),
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_STEP_SUMMARY": str(self.folder.with_name("summary.md")),
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.folder.with_name("home")),
            "HF_HUB_DISABLE_XET": "1",
        }
        return run_script(script, self.folder, {**clean_environment(), **settings})

    def scripts(self, **inputs: str) -> dict[str, Script]:
        secrets = {"HF_TOKEN": WRITER}
        scripts = github_scripts(EXAMPLES / "github.yml", ROOT / "action.yml", secrets, **inputs)
        return {script.name: script for script in scripts}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    base = tmp_path_factory.mktemp("runner")
    (base / "work").mkdir()
    folder = scratch(base / "work")
    recipe = (EXAMPLES / "recipe.yaml").read_text()
    for word, instead in INSTEAD.items():
        assert f" {word}\n" in recipe, "the example has changed: change INSTEAD too"
        recipe = recipe.replace(f" {word}\n", f" {instead}\n")
    (folder / "recipe.yaml").write_text(recipe)
    with serve(UploadHub(base / "hub", organizations=("my-org",)), UploadHandler) as hub:
        yield Runner(folder, hub)


@pytest.fixture(scope="module")
def pruned(runner: Runner) -> Path:
    scripts = runner.scripts()
    assert scripts["Install"].text.startswith("python -m pip install "), "the one step that needs a network"
    done = runner.run(scripts["Prune"])
    assert done.returncode == 0, done.stderr
    return runner.folder / "pruned"


def test_recipe_prune_check_push_download_check(
    runner: Runner, pruned: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = runner.scripts()
    assert list(scripts) == ["Keys", "Install", "Prune", "Figures", "Check", "Push"]
    for name in ("Check", "Push"):
        done = runner.run(scripts[name])
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"{runner.hub.endpoint}/{REPO}" in done.stdout
    summary = runner.folder.with_name("summary.md").read_text()
    assert "| `--require-loadable` | loads in plain transformers | loads and generates | pass |" in summary
    assert ElementTree.parse(runner.folder / "prune-check.xml").getroot().get("failures") == "0"

    download = "import sys, huggingface_hub as hub; hub.snapshot_download(sys.argv[1], local_dir='downloaded')"
    fetched = runner.run(Script("Download", f'"{sys.executable}" -c "{download}" {REPO}', {"HF_TOKEN": WRITER}))
    assert fetched.returncode == 0, fetched.stderr
    monkeypatch.chdir(runner.folder)
    rules = ("--max-perplexity-increase", "100%", "--min-sparsity", "49%", "--against", "examples/demo-model")
    again = command("check", "downloaded", *rules, "--json")
    assert again.code == 0, again.stdout + again.stderr
    assert [verdict["rule"] for verdict in again.json["verdicts"]][-1] == "files as in the report"
    assert (runner.folder / "downloaded" / "model.safetensors").read_bytes() == (
        pruned / "model.safetensors"
    ).read_bytes()


def test_every_output_of_the_action_is_a_figure_of_the_report(runner: Runner, pruned: Path) -> None:
    outputs = runner.folder.with_name("outputs")
    outputs.unlink(missing_ok=True)
    done = runner.run(runner.scripts()["Figures"])
    assert done.returncode == 0, done.stderr
    told = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
    declared = yaml.safe_load((ROOT / "action.yml").read_text())["outputs"]
    named = {
        re.findall(r"steps.figures.outputs.([\w-]+)", each["value"])[0]
        for each in declared.values()
        if "steps." in each["value"]
    }
    assert told.keys() == named
    report = json.loads((pruned / "prune_report.json").read_text())
    assert float(told["perplexity"]) == report["evaluation"]["after"]["perplexity"]
    assert int(told["bytes"]) == report["totals"]["bytes_after"]


def test_caches_go_by_the_contents_of_the_recipe(runner: Runner) -> None:
    def keys(**inputs: str) -> dict[str, str]:
        outputs = runner.folder.with_name("outputs")
        outputs.unlink(missing_ok=True)
        assert runner.run(runner.scripts(**inputs)["Keys"]).returncode == 0
        return dict(line.split("=", 1) for line in outputs.read_text().splitlines())

    recipe = runner.folder / "keyed.yaml"
    recipe.write_text("model: a\n")
    first = keys(recipe="keyed.yaml")
    assert keys(recipe="keyed.yaml") == first
    recipe.write_text("model: b\n")
    second = keys(recipe="keyed.yaml")
    assert (second["pip"], second["hub"] == first["hub"]) == (first["pip"], False)
    assert keys(recipe="keyed.yaml", package="prune-cli==9")["pip"] != first["pip"]


def test_a_gate_that_fails_ends_the_job_and_names_the_rule(runner: Runner, pruned: Path) -> None:
    scripts = runner.scripts(check="--min-sparsity 60% --max-size 1x", junit="failed.xml")
    done = runner.run(scripts["Check"])
    assert done.returncode == 1
    assert "::error title=prune-cli check%3A --min-sparsity::--min-sparsity: asked at least 60%25, found" in done.stderr
    assert "Failed: --min-sparsity (1 of 3 rules)." in done.stdout
    cases = ElementTree.parse(runner.folder / "failed.xml").iter("testcase")
    assert [case.get("name") for case in cases if case.find("failure") is not None] == ["--min-sparsity"]


def test_inputs_are_never_run_as_code(runner: Runner) -> None:
    hostile = '"; touch owned; $(touch owned) `touch owned`'
    words = "--exclude 'a b' --exclude \"$(touch owned)\" --exclude '*;touch owned'"
    script = runner.scripts(recipe="", model=hostile, out=hostile, arguments=words)["Prune"]
    done = runner.run(Script("Prune", script.text.replace("prune-cli prune", "printf '<%s>'"), script.variables))
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == f"<--exclude><a b><--exclude><$(touch owned)><--exclude><*;touch owned><--><{hostile}><{hostile}>"
    )
    assert not (runner.folder / "owned").exists()
    nothing = runner.scripts(recipe="r.yaml", arguments="")["Prune"]
    done = runner.run(Script("Prune", nothing.text.replace("prune-cli prune", "printf '<%s>'"), nothing.variables))
    assert done.stdout == "<--recipe><r.yaml><--><pruned>"


def test_the_pipeline_of_gitlab(
    runner: Runner, pruned: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runner.folder)
    monkeypatch.setattr(constants, "ENDPOINT", runner.hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    jobs = gitlab_commands(EXAMPLES / "gitlab.yml")
    assert list(jobs) == ["before_script", "prune", "check", "publish"]
    assert jobs.pop("before_script") == ['python -m pip install --quiet "$PRUNE_CLI"']
    for job, (line,) in jobs.items():
        # Pruned already, by the same recipe: only that it would run is tried. Loading is tried above.
        extra = ["--dry-run", "--overwrite"] if job == "prune" else []
        words = [word for word in shlex.split(line) if word != "--require-loadable"]
        assert words[0] == "prune-cli"
        outcome = command(*words[1:], *extra)
        assert outcome.code == 0, f"{job}: {line}\n{outcome.stdout}\n{outcome.stderr}"
    assert ElementTree.parse(runner.folder / "prune-check.xml").getroot().get("tests") == "3"
