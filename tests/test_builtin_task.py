"""`--tasks builtin`: items that are the same everywhere, scores against a naive loop, and where they are told."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from calibration.builtin import builtin_documents
from prune_cli.engine.activation_budget import Batching
from prune_cli.engine.open_model import pick_device
from prune_cli.evaluation.builtin_task import CHOICES, builtin_items
from prune_cli.evaluation.choices import answered_right
from prune_cli.evaluation.perplexity import open_evaluated
from prune_cli.evaluation.requests import EvaluationRequest
from prune_cli.evaluation.tasks import paired_score
from prune_cli.model.architecture import load_tokenizer
from prune_cli.progress import Silent
from tests.conftest import RunCommand
from tests.tiny import load_plain, save_tiny


def test_only_the_answer_goes_on_from_its_context() -> None:
    items, texts = builtin_items(), list(builtin_documents("test"))
    assert len(items) > 100
    for item in items:
        assert len(set(item.choices)) == CHOICES
        goes_on = [any(item.context + choice in text for text in texts) for choice in item.choices]
        assert goes_on == [place == item.answer for place in range(CHOICES)]
    assert len({item.answer for item in items}) == CHOICES


@torch.no_grad()
@pytest.mark.parametrize("positions", [64, 1024])
def test_answers_are_those_of_a_naive_loop(positions: int, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama-untied", max_position_embeddings=positions)
    items, plain = builtin_items()[:5], load_plain(folder)
    _, model = open_evaluated(str(folder), None, EvaluationRequest(str(folder), ""), pick_device("cpu"))
    tokenizer = load_tokenizer(folder, False)
    assert tokenizer is not None
    expected = []
    for item in items:
        scores = []
        for choice in item.choices:
            ids = tokenizer(item.context + choice, add_special_tokens=False)["input_ids"][-positions:]
            new = len(tokenizer(choice, add_special_tokens=False)["input_ids"])
            log_p = plain(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            first = max(len(ids) - new, 1)
            scores.append(sum(float(log_p[at - 1, ids[at]]) for at in range(first, len(ids))) / len(choice.encode()))
        expected.append(scores.index(max(scores)) == item.answer)
    assert answered_right(model, tokenizer, items, Batching(3), Silent()) == expected


def test_recovery_and_its_error_know_that_both_answered_the_same_items() -> None:
    draw = random.Random(0)
    theirs = [float(draw.random() < 0.7) for _ in range(400)]
    ours = [each if draw.random() < 0.8 else float(draw.random() < 0.5) for each in theirs]
    found = paired_score(ours, theirs)
    assert found.recovery == pytest.approx(sum(ours) / sum(theirs))
    ratios = []
    for _ in range(1000):
        rows = draw.choices(range(400), k=400)
        ratios.append(sum(ours[row] for row in rows) / sum(theirs[row] for row in rows))
    middle = sum(ratios) / len(ratios)
    bootstrap = math.sqrt(sum((each - middle) ** 2 for each in ratios) / len(ratios))
    assert found.recovery_standard_error == pytest.approx(bootstrap, rel=0.15)
    same = paired_score(theirs, theirs)
    assert (same.recovery, same.recovery_standard_error) == (1, pytest.approx(0, abs=1e-9))


def test_scores_go_into_report_page_and_card(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    assert command("prune", llama, out, "-m", "magnitude", "-q").code == 0
    asked = ("eval", out, "--against", llama, "--tasks", "builtin", "--limit", 4)
    shown = command(*asked, "--add-to-report")
    assert shown.code == 0, shown.stderr
    assert "recovery" in shown.stdout
    tasks = json.loads((out / "prune_report.json").read_text())["tasks"]
    assert command(*asked, "--json", "-q").json["tasks"] == tasks
    (score,) = tasks["scores"]
    assert (score["task"], score["examples"], tasks["against"]) == ("builtin", 4, str(llama))
    for file in ("prune_report.md", "prune_report.html", "README.md"):
        text = (out / file).read_text()
        assert "Tasks" in text, file
        assert f"{score['score']:.4f} ± {score['standard_error']:.4f}" in text, file
    assert "accuracy, pruned" in (out / "README.md").read_text().split("---")[1]
    assert command("verify", out, "-q").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--against", "MODEL"), "has no prune_report.json"), ((), "add --against DENSE")],
)
def test_where_no_report_can_be_added_to(
    arguments: tuple[str, ...], words: str, llama: Path, command: RunCommand
) -> None:
    given = [llama if each == "MODEL" else each for each in arguments]
    refused = command("eval", llama, "--tasks", "builtin", "--add-to-report", *given)
    assert refused.code == 2
    assert words in refused.stderr
