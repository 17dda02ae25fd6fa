"""Builds the sdist, and the wheel from it; installs each in an environment of its own and does the main job with it.

The environments lie outside of the checkout and have only the dependencies of the running Python in common with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("prune_cli", "methods", "calibration")
NEEDED = (
    "prune_cli/report/report.schema.json",
    "prune_cli/report/html/page.css",
    "calibration/builtin.jsonl.gz",
    "calibration/SOURCES.md",
)
WHERE = (
    "import prune_cli, methods, calibration as c; print(*(m.__file__ for m in (prune_cli, methods, c)), sep=chr(10))"
)


def run(*words: str | Path, cwd: Path) -> str:
    """What a program says. Neither PYTHONPATH nor the user's own packages may lend it this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONNOUSERSITE": "1"}
    return subprocess.run(words, cwd=cwd, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def tracked() -> list[str]:
    """The files of the checkout that git knows: leftovers of earlier builds would hide what is missing."""
    return subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()


def build(scratch: Path) -> tuple[Path, Path]:
    """The sdist of a clean copy of the checkout, and the wheel that is built from this sdist."""
    source, built = scratch / "source", scratch / "built"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", built, source, cwd=scratch)
    return next(built.glob("*.tar.gz")), next(built.glob("*.whl"))


def check_contents(sdist: Path, wheel: Path) -> None:
    """All that is in the packages, and in the wheel nothing else (tests, examples)."""
    # What a newcomer reads beside the code is for the checkout.
    ours = {name for name in tracked() if name.split("/")[0] in PACKAGES and not name.endswith("/README.md")}
    assert ours.issuperset(NEEDED), sorted(set(NEEDED) - ours)
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert installed == ours, f"the wheel lacks {sorted(ours - installed)} and has beside {sorted(installed - ours)}"
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ours | {"pyproject.toml", "README.md", "LICENSE"}
    assert packed >= wanted, f"the sdist lacks {sorted(wanted - packed)}"


def install(package: Path, place: Path) -> Path:
    """The folder of programs of a new environment with `package`; its dependencies are those of this Python."""
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place.parent)
    programs = place / "bin"
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", package, cwd=place.parent)
    # A folder named in a .pth file is no site folder: .pth files in it, as that of an editable install, do nothing.
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    own = sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)})
    (Path(own) / "dependencies.pth").write_text("\n".join(shared) + "\n")
    # The extras are as if they were not there: the main job does without.
    hidden = ", ".join(f"{name}=None" for name in ("datasets", "pandas", "pyarrow", "vl_convert"))
    (Path(own) / "sitecustomize.py").write_text(f"import sys\nsys.modules.update({hidden})\n")
    return programs


def prune(programs: Path, work: Path) -> None:
    """Prune and look, by the installed program, away from the checkout."""
    for file in run(programs / "python", "-c", WHERE, cwd=work).splitlines():
        assert Path(file).is_relative_to(programs.parent), f"{file} is not the installed one"
    shutil.copytree(ROOT / "examples" / "demo-model", work / "model")
    sized = ("--samples", "8", "--seq-len", "128", "--sparsity", "0.5", "--eval", "builtin", "--json")
    report = json.loads(run(programs / "prune-cli", "prune", "model", "out", *sized, cwd=work))
    assert report["totals"]["sparsity_of_pruned"] == 0.5, report["totals"]
    assert (work / "out" / "prune_report.html").stat().st_size > 0
    run(programs / "prune-cli", "verify", "out", "--against", "model", cwd=work)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        sdist, wheel = build(scratch)
        check_contents(sdist, wheel)
        for package, name in ((wheel, "wheel"), (sdist, "sdist")):
            work = scratch / f"work-{name}"
            work.mkdir()
            prune(install(package, scratch / f"environment-{name}"), work)
            print(f"{package.name} runs the main job")


main()
