"""--compare-calibration: which experts another text uses than the one that decided which of them go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import RunCommand, token_ids
from tests.test_expert_removal import naive_scores
from tests.tiny import VOCABULARY, load_plain, save_tiny


@torch.no_grad()
def test_the_report_tells_both_shares_of_every_expert(tmp_path: Path, command: RunCommand) -> None:
    model, here, there = save_tiny(tmp_path / "model", "mixtral"), token_ids(), torch.full((4, 24), VOCABULARY - 30)
    for name, ids in (("here", here), ("there", there)):
        save_file({"input_ids": ids}, tmp_path / f"{name}.safetensors")
    data = ["--calibration", tmp_path / "here.safetensors", "--compare-calibration", tmp_path / "there.safetensors"]
    done = command("prune", model, tmp_path / "out", "-m", "experts", "-s", "0.5", *data, "-q", "--json")
    assert done.code == 0, done.stderr
    compared = done.json["structure"]["compared"]
    assert compared["text"]["source"] == str(tmp_path / "there.safetensors")
    for block, change in enumerate(done.json["structure"]["blocks"]):
        uses = [use for use in compared["experts"] if use["block"] == block]
        counts = [naive_scores(load_plain(model), ids, block, "frequency") for ids in (here, there)]
        assert [use["share"] for use in uses] == pytest.approx([each / sum(counts[0]) for each in counts[0]])
        assert [use["compared_share"] for use in uses] == pytest.approx([each / sum(counts[1]) for each in counts[1]])
        gone = [str(use["expert"]) for use in uses if not use["kept"]]
        assert change["removed"] == f"experts {', '.join(gone)}"
    shown = max(compared["experts"], key=lambda use: use["compared_share"] - use["share"])
    row = [str(shown["block"]), str(shown["expert"]), "kept" if shown["kept"] else "gone"]
    assert f"| {' | '.join(row)} |" in (tmp_path / "out" / "prune_report.md").read_text()
    assert "Experts by text" in (tmp_path / "out" / "prune_report.html").read_text()


def test_where_it_has_no_use(tmp_path: Path, llama: Path, command: RunCommand) -> None:
    refused = command("prune", llama, tmp_path / "out", "--compare-calibration", "builtin")
    assert (refused.code, "--compare-calibration is for --method experts" in refused.stderr) == (2, True)
    mixture = save_tiny(tmp_path / "model", "mixtral")
    drawn = command(
        "prune", mixture, tmp_path / "out", "-m", "experts", "-o", "score=random", "--compare-calibration", "builtin"
    )
    assert drawn.code == 2
    assert "what -o score=random does not measure" in " ".join(drawn.stderr.split())


def test_a_resumed_run_may_compare_with_another_text(
    tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", "mixtral")
    for name, ids in (("a", token_ids()), ("b", torch.full((4, 24), VOCABULARY - 30)), ("c", token_ids(5))):
        save_file({"input_ids": ids}, tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
    fixed = ("prune", model, "-m", "experts", "-s", "0.5", "--calibration", tmp_path / "a.safetensors", "-q", "--json")

    def compared(out: str, text: str, *more: str) -> object:
        done = command(*fixed, tmp_path / out, "--compare-calibration", tmp_path / f"{text}.safetensors", *more)
        return done.json["structure"]["compared"] if done.code == 0 else done.code

    expected = compared("expected", "c")
    with monkeypatch.context() as patch:
        patch.setattr("prune_cli.structured.run.report_files", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compared("out", "b")
    assert compared("out", "c", "--resume") == expected
