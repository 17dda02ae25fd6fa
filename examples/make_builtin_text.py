"""Write `calibration/builtin.jsonl.gz`, the frozen text that `builtin` names, and print its hash.

    apt-get download dict-devil dict-jargon
    python examples/make_builtin_text.py dict-devil_1.0-13.1_all.deb dict-jargon_4.4.7-3.1_all.deb

Code and documentation come from this repository at a fixed commit, prose from two dictionaries in the public domain.
The same inputs make the same text; others are refused. Another text needs a new SHA256 in `calibration/builtin.py`,
and makes every figure on `builtin` anew.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMIT = "3cbf452"
OWN = ("README.md", "CONTRIBUTING.md", "docs", "methods", "calibration", "prune_cli", "benchmarks")
PACKAGES = {
    "devil": "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
    "jargon": "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
}
CHARACTERS_OF_A_DICTIONARY = 430_000
CHARACTERS_OF_A_DOCUMENT = 3_000
# Entries that one would not print in a test's output.
LEFT_OUT = re.compile(
    r"nigg|negro|\bkike|\bjap\b|fuck|shit|cunt|\brap(e|ing|ist)|fag|bitch|whore|slut|piss|\bass\b", re.I
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devil", type=Path)
    parser.add_argument("jargon", type=Path)
    given = parser.parse_args()
    documents = dict(own_documents())
    for name in PACKAGES:
        documents |= dictionary_documents(name, getattr(given, name))
    # By hash, so that prose and code alternate and neighbours have nothing to do with each other.
    names = sorted(documents, key=lambda name: hashlib.sha256(f"order {name}".encode()).digest())
    lines = [json.dumps({"name": name, "text": documents[name]}, ensure_ascii=False) + "\n" for name in names]
    text = "".join(lines).encode()
    (ROOT / "calibration/builtin.jsonl.gz").write_bytes(gzip.compress(text, 9, mtime=0))
    print(f"{len(lines)} documents, {len(text)} bytes, SHA256 = {hashlib.sha256(text).hexdigest()}")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def own_documents() -> Iterator[tuple[str, str]]:
    for path in git("ls-tree", "-r", "--name-only", COMMIT, *OWN).splitlines():
        text = git("show", f"{COMMIT}:{path}") if path.endswith((".py", ".md")) else ""
        if text.strip():
            yield path, text


def dictionary_documents(name: str, package: Path) -> dict[str, str]:
    """Entries in their order, some thousand characters a document."""
    documents: list[str] = []
    text = ""
    for entry in entries(name, unpacked(name, package)):
        if sum(map(len, documents)) >= CHARACTERS_OF_A_DICTIONARY:
            break
        text += entry + "\n\n"
        if len(text) >= CHARACTERS_OF_A_DOCUMENT:
            documents.append(text)
            text = ""
    return {f"{name}/{number:04}": text for number, text in enumerate(documents)}


def unpacked(name: str, package: Path) -> str:
    content = package.read_bytes()
    if hashlib.sha256(content).hexdigest() != PACKAGES[name]:
        sys.exit(f"{package} is another version of dict-{name} than the text was made of.")
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        file = files.extractfile(f"./usr/share/dictd/{name}.dict.dz")
        assert file is not None
        return gzip.decompress(file.read()).decode()


def entries(name: str, text: str) -> Iterator[str]:
    """One entry after the other, from the first that is none about the dictionary itself."""
    blocks = re.split(r"\n\n(?=\S)", text)
    begin = next(
        at
        for at, block in enumerate(blocks)
        if block.lstrip().startswith({"devil": "_The Devil", "jargon": "/dev"}[name])
    )
    for block in blocks[begin:]:
        if not LEFT_OUT.search(block):
            yield block.rstrip() if name == "devil" else jargon_entry(block)


def jargon_entry(block: str) -> str:
    """The headword, then its paragraphs, each on one line and without the marks of links."""
    head, *rest = block.splitlines()
    body = "\n".join(line for line in rest if not re.match(r" \S", line))
    return "\n\n".join([head, *paragraphs(body)])


def paragraphs(body: str) -> Sequence[str]:
    found = (re.sub(r"\s+", " ", part).strip() for part in body.split("\n\n"))
    return [re.sub(r"\{ ?([^{}]*)\}", r"\1", part) for part in found if part]


if __name__ == "__main__":
    main()
