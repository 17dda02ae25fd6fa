"""Every command in `docs/` is executed, page by page; `tests/documents.py` has the convention."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.conftest import RunCommand
from tests.documents import ROOT, Step, run_step, scratch, steps_of
from tests.hub_server import serve
from tests.hub_uploads import UploadHandler, UploadHub, point_at

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # httpx to huggingface_hub
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(scratch(folder))
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    with serve(UploadHub(tmp_path / "hub"), UploadHandler) as hub:
        settings = point_at(hub, monkeypatch)
        for step in steps_of(page):
            run_step(step, folder, command, settings)


def test_the_convention(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- with: org/model=examples/demo-model 128=4 -->\n"
        "<!-- quick: prune --samples 2 --seq-len 64 -->\n"
        "```sh\n"
        "prune-cli prune org/model out \\\n"
        "    --seq-len 32   # a comment\n"
        "# only a comment\n"
        "prune-cli check org/model --max-kl 0   # fails: exit code 1\n"
        "```\n"
        "<!-- file: recipe.yaml -->\n"
        "```yaml\nmodel: org/model\nsamples: 128\n```\n"
        "```yaml\nnot: written\n```\n"
        "```sh network\npip install prune-cli\n```\n"
        "```python\nprint(1)\n```\n"
    )
    assert steps_of(page) == [
        Step("command", "prune-cli prune --samples 2 examples/demo-model out --seq-len 32", "page.md:3"),
        Step("command", "prune-cli check examples/demo-model --max-kl 0", "page.md:3", 1),
        Step("file", "model: examples/demo-model\nsamples: 4\n", "page.md:10", file="recipe.yaml"),
        Step("network", "pip install prune-cli", "page.md:17"),
        Step("python", "print(1)", "page.md:20"),
    ]


def test_links_of_the_readme_work_where_it_stands_alone() -> None:
    absolute = runpy.run_path(str(ROOT / ".ci" / "absolute_links.py"))["absolute"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("https:", "#"))]
    assert len(relative) > 10
    assert [link for link in relative if not (ROOT / link.partition("#")[0]).exists()] == []
    words = re.findall(r'id="([^"]+)"', (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))
    explained = [link.partition("#")[2] for link in relative if link.startswith("docs/glossary.md#")]
    assert len(explained) > 10
    assert [word for word in explained if word not in words] == []
    links = re.findall(r"\]\(([^)]+)\)", absolute(text, "1.2.3"))
    assert [link for link in links if not link.startswith(("https:", "#"))] == []
    assert "](https://github.com/prune-cli/prune-cli/blob/v1.2.3/docs/ci.md)" in absolute(text, "1.2.3")
