"""`prune-cli eval --tasks`: the harness on a task of our own over a local file, and what is told without it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import RunCommand
from tests.tiny import load_plain, save_tiny

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm_eval is not installed (pip install 'prune-cli[eval]')")

QUESTIONS = [
    {"question": "ab", "choices": ["c", "x"], "answer": 0},
    {"question": "1, ", "choices": ["9", "2"], "answer": 1},
    {"question": "xy", "choices": ["z", "a"], "answer": 0},
    {"question": "hello worl", "choices": ["q", "d"], "answer": 1},
]
YAML = """\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one multiple-choice task over a local JSON file."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (folder / "local_choice.yaml").write_text(YAML.format(data=data))
    return folder


@torch.no_grad()
def _accuracy(folder: Path, questions: list[dict[str, Any]]) -> float:
    """The share of questions whose right choice the model finds most likely; every choice is one character."""
    from transformers import AutoTokenizer

    model, tokenizer = load_plain(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for each in questions:
        ids = tokenizer(each["question"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        last = model(input_ids=ids).logits[0, -1]
        choices = [last[tokenizer.convert_tokens_to_ids(choice)] for choice in each["choices"]]
        right += int(torch.stack(choices).argmax()) == each["answer"]
    return right / len(questions)


@needs_harness
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_local_task_on_two_models(llama: Path, task: Path, tmp_path: Path, command: RunCommand) -> None:
    other = save_tiny(tmp_path / "other", "llama-untied", seed=5)
    asked = ("eval", other, "--against", llama, "--tasks", "local_choice", "--include-path", task)
    outcome = command(*asked, "--json", "-q")
    assert outcome.code == 0, outcome.stderr
    document = outcome.json
    assert document["evaluation"] is None
    assert document["tasks"]["harness"].startswith("lm-eval ")
    (score,) = document["tasks"]["scores"]
    assert (score["task"], score["metric"], score["examples"]) == ("local_choice", "acc", 4)
    assert score["higher_is_better"] is True
    assert score["score"] == _accuracy(other, QUESTIONS)
    assert score["against"] == _accuracy(llama, QUESTIONS)
    assert score["difference"] == score["score"] - score["against"]
    limited = command(*asked, "--limit", 2, "--json", "-q").json["tasks"]["scores"][0]
    assert limited["examples"] == 2
    assert limited["score"] == _accuracy(other, QUESTIONS[:2])


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_tasks_and_perplexity_in_one_table(llama: Path, task: Path, tokens_file: Path, command: RunCommand) -> None:
    asked = ("eval", llama, "--tasks", "local_*", "--include-path", task, "--data", tokens_file)
    shown = command(*asked)
    assert shown.code == 0, shown.stderr
    assert "perplexity" in shown.stdout
    assert "local_choice" in shown.stdout
    document = command(*asked, "--json", "-q").json
    assert document["evaluation"]["windows"] == 6
    assert document["tasks"]["scores"][0]["against"] is None


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_what_the_harness_does_not_know_is_told(llama: Path, task: Path, tmp_path: Path, command: RunCommand) -> None:
    refused = command("eval", llama, "--tasks", "local_choise", "--include-path", task)
    assert refused.code == 2
    assert "--tasks names 'local_choise', which lm-eval does not know" in refused.stderr
    (task / "questions.jsonl").unlink()
    failed = command("eval", llama, "--tasks", "local_choice", "--include-path", task)
    assert failed.code == 1
    assert "The task local_choice failed on" in failed.stderr
    silent = save_tiny(tmp_path / "silent", "llama-untied", tokenizer=False)
    assert "has no tokenizer, and tasks are texts" in command("eval", silent, "--tasks", "arc_easy").stderr


def test_without_the_harness_the_install_command_is_told(
    llama: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused = command("eval", llama, "--tasks", "arc_easy")
    assert refused.code == 2
    assert refused.stderr.endswith("which is not installed: pip install 'prune-cli[eval]'\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "eval needs --data SOURCE, for perplexity, or --tasks NAMES"),
        (["--tasks", "arc_easy,"], "--tasks names no task"),
        (["--tasks", "arc_easy", "--limit", 0], "--limit is 0"),
        (["--tasks", "arc_easy", "--include-path", "/nowhere"], "--include-path is /nowhere, which is no folder"),
        (["--tasks", "arc_easy", "--eval-windows", 3], "--eval-windows belongs to --data"),
        (["--tasks", "arc_easy", "--seq-len", 3], "--seq-len belongs to --data"),
        (["--data", "builtin", "--limit", 3], "--limit belongs to --tasks"),
        (["--data", "builtin", "--include-path", "."], "--include-path belongs to --tasks"),
    ],
)
def test_what_cannot_be_asked(arguments: list[Any], words: str, llama: Path, command: RunCommand) -> None:
    refused = command("eval", llama, *arguments)
    assert refused.code == 2
    assert words in refused.stderr
