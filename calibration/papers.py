"""c4, wikitext2 and ptb as the authors of GPTQ, SparseGPT and Wanda sample them; NAME:paper exactly as they do."""

from __future__ import annotations

import itertools

import torch

from calibration.errors import CalibrationError
from calibration.hub import hub_table
from calibration.opening import NO_OPENING, Opening, find_opening
from calibration.sources import Role
from calibration.token_set import Tokenizer, TokenRequest, TokenSet, token_set, tokenise
from calibration.windows import Cutter, check_room, consecutive, cutter_for

_C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
_C4_VALIDATION = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
_C4_EVALUATION_DOCUMENTS = 1100
_C4_EVALUATION_WINDOWS = 256

_AS_ONE = "the text tokenised as one string with the tokenizer's own special tokens"
_EVALUATION = f"{_AS_ONE}, cut into consecutive windows, the remainder dropped"
_CALIBRATION = f"{_AS_ONE}, windows from random starts drawn with the seed"
_C4_CALIBRATION = (
    "documents longer than a sample picked with the seed, one random window of each, "
    "tokenised with the tokenizer's own special tokens"
)


def paper_windows(want: TokenRequest, tokenizer: Tokenizer) -> TokenSet:
    """The windows of wikitext2, ptb or c4 for either role. Raises CalibrationError if the text cannot be fetched.

    As published, special tokens stand where the tokenizer puts them in the whole text; else before each window.
    """
    opening = NO_OPENING if want.source.as_published else find_opening(tokenizer)
    check_room(want, opening)
    if want.role == "calibration" and want.source.repo == "c4":
        return _c4_samples(want, tokenizer, opening)
    stream = _tokens(want, tokenizer, opening)
    if want.role == "evaluation" and want.source.repo == "c4":
        stream = stream[: _C4_EVALUATION_WINDOWS * (want.length - len(opening.ids))]
    cutter, warnings = cutter_for(want, len(stream), opening)
    draw = want.role == "calibration"
    windows = (_random_windows if draw else consecutive)(want, stream, cutter)
    protocol = _protocol(want, _CALIBRATION if draw else _EVALUATION, opening)
    return token_set(want.source, windows, protocol, len(stream), seed=want.seed if draw else None, warnings=warnings)


def _protocol(want: TokenRequest, how: str, opening: Opening) -> str:
    if want.source.as_published:
        return f"the papers' protocol: {how}, whose windows begin where they are cut, without a BOS of their own"
    return f"the papers' protocol: {how}, with windows {opening.told}"


def _tokens(want: TokenRequest, tokenizer: Tokenizer, opening: Opening) -> torch.Tensor:
    return _without(opening, tokenise(tokenizer, _text(want.source.repo, want.role), special_tokens=True))


def _without(opening: Opening, ids: list[int]) -> torch.Tensor:
    """What the tokenizer puts before the text goes, as every window gets it."""
    tokens = torch.tensor(ids, dtype=torch.int64)
    return tokens[len(opening.ids) :] if opening.begins(tokens) else tokens


def _text(name: str, role: Role) -> str:
    """One string: wikitext2's test rows are joined by empty lines, all else by spaces."""
    split = "train" if role == "calibration" else "test"
    if name == "wikitext2":
        glue = " " if role == "calibration" else "\n\n"
        return glue.join(row["text"] for row in hub_table("Salesforce/wikitext", "wikitext-2-raw-v1", split=split))
    if name == "ptb":
        # The data set is a script, which datasets runs no more; the hub keeps a converted copy in this revision.
        rows = hub_table("ptb-text-only/ptb_text_only", split=split, revision="refs/convert/parquet")
        return " ".join(row["sentence"] for row in rows)
    rows = hub_table("allenai/c4", data_files=_C4_VALIDATION, split="validation")
    return " ".join(row["text"] for row in itertools.islice(rows, _C4_EVALUATION_DOCUMENTS))


def _random_windows(want: TokenRequest, stream: torch.Tensor, cutter: Cutter) -> torch.Tensor:
    starts = torch.randint(0, len(stream) - cutter.step + 1, (want.count,), generator=want.generator()).tolist()
    # One that begins as windows do takes more of the text, of which there may be none left.
    fitting = [start if start + cutter.taken(stream, start) <= len(stream) else start - 1 for start in starts]
    return cutter.windows(stream, fitting)


def _c4_samples(want: TokenRequest, tokenizer: Tokenizer, opening: Opening) -> TokenSet:
    rows = hub_table("allenai/c4", data_files=_C4_TRAIN, split="train")
    generator = want.generator()
    cutter = Cutter(want.length, opening)
    picked: list[torch.Tensor] = []
    seen = 0
    for index in torch.randperm(len(rows), generator=generator).tolist():
        ids = _without(opening, tokenise(tokenizer, rows[index]["text"], special_tokens=True))
        seen += len(ids)
        if len(ids) > want.length:
            start = int(torch.randint(0, len(ids) - want.length, (1,), generator=generator))
            picked.append(cutter.windows(ids, [start])[0])
        if len(picked) == want.count:
            protocol = _protocol(want, _C4_CALIBRATION, opening)
            return token_set(want.source, torch.stack(picked), protocol, seen, seed=want.seed)
    raise CalibrationError(
        f"c4 has only {len(picked)} documents longer than {want.length} tokens, but {want.count} are needed: "
        "ask for fewer --samples or a smaller --seq-len."
    )
