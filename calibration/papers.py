"""c4, wikitext2 and ptb exactly as the authors of GPTQ, SparseGPT and Wanda sample them, to compare with papers."""

from __future__ import annotations

import itertools

import torch

from calibration.errors import CalibrationError
from calibration.hub import hub_table
from calibration.sources import Role
from calibration.token_set import Tokenizer, TokenRequest, TokenSet, token_set, tokenise
from calibration.windows import consecutive, window_length

_C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
_C4_VALIDATION = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
_C4_EVALUATION_DOCUMENTS = 1100
_C4_EVALUATION_WINDOWS = 256

_AS_ONE = "tokenised as one string with the tokenizer's own special tokens"
_EVALUATION = f"the papers' protocol: the text {_AS_ONE}, cut into consecutive windows, the remainder dropped"
_CALIBRATION = f"the papers' protocol: the text {_AS_ONE}, windows from random starts drawn with the seed"
_C4_CALIBRATION = (
    "the papers' protocol: documents longer than a sample picked with the seed, one random window of each, "
    "tokenised with the tokenizer's own special tokens"
)


def paper_windows(want: TokenRequest, tokenizer: Tokenizer) -> TokenSet:
    """The windows of wikitext2, ptb or c4 for either role. Raises CalibrationError if the text cannot be fetched."""
    if want.role == "calibration":
        return _c4_samples(want, tokenizer) if want.source.given == "c4" else _random_windows(want, tokenizer)
    stream = _tokens(want, tokenizer)
    if want.source.given == "c4":
        stream = stream[: _C4_EVALUATION_WINDOWS * want.length]
    length, warnings = window_length(want, len(stream))
    windows = consecutive(want, stream, length)
    return token_set(want.source, windows, _EVALUATION, len(stream), seed=None, warnings=warnings)


def _tokens(want: TokenRequest, tokenizer: Tokenizer) -> torch.Tensor:
    text = _text(want.source.given, want.role)
    return torch.tensor(tokenise(tokenizer, text, special_tokens=True), dtype=torch.int64)


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


def _random_windows(want: TokenRequest, tokenizer: Tokenizer) -> TokenSet:
    stream = _tokens(want, tokenizer)
    length, warnings = window_length(want, len(stream))
    starts = torch.randint(0, len(stream) - length + 1, (want.count,), generator=want.generator())
    ids = torch.stack([stream[start : start + length] for start in starts.tolist()])
    return token_set(want.source, ids, _CALIBRATION, len(stream), seed=want.seed, warnings=warnings)


def _c4_samples(want: TokenRequest, tokenizer: Tokenizer) -> TokenSet:
    rows = hub_table("allenai/c4", data_files=_C4_TRAIN, split="train")
    generator = want.generator()
    picked: list[torch.Tensor] = []
    seen = 0
    for index in torch.randperm(len(rows), generator=generator).tolist():
        ids = tokenise(tokenizer, rows[index]["text"], special_tokens=True)
        seen += len(ids)
        if len(ids) > want.length:
            start = int(torch.randint(0, len(ids) - want.length, (1,), generator=generator))
            picked.append(torch.tensor(ids[start : start + want.length], dtype=torch.int64))
        if len(picked) == want.count:
            return token_set(want.source, torch.stack(picked), _C4_CALIBRATION, seen, seed=want.seed)
    raise CalibrationError(
        f"c4 has only {len(picked)} documents longer than {want.length} tokens, but {want.count} are needed: "
        "ask for fewer --samples or a smaller --seq-len."
    )
