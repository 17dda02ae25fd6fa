"""ours.py MODEL TOKENS BATCH OUT [OPTIONS]: 50 % with prune-cli's Python API, torch and transformers imported before.

OPTIONS is a JSON object of what `prune()` takes beside those; Wanda if it says nothing.

Prints one line of JSON with the seconds of `prune()`: everything from the checks to the finished folder.
"""

from __future__ import annotations

import json
import sys
import time

import prune_cli
import prune_cli.run


def main(model_folder: str, tokens: str, batch: str, out: str, options: str = "{}") -> None:
    begun = time.monotonic()
    given = {"method": "wanda", "sparsity": 0.5, **json.loads(options)}
    prune_cli.prune(model_folder, out, calibration=tokens, batch_size=int(batch), device="cpu", **given)
    print(json.dumps({"work": time.monotonic() - begun}))


if __name__ == "__main__":
    main(*sys.argv[1:])
