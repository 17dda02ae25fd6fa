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
