"""The command line: parse, make the request, call, render. No torch at import time, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from methods import method_names
from prune_cli import __version__
from prune_cli.errors import RequestError
from prune_cli.failures import told_failures

_MOST_DIGITS = 10
_RUN, _TEXT, _MACHINE, _OUTPUT = "What to prune", "Calibration and evaluation", "Machine", "Output"

app = typer.Typer(
    name="prune-cli",
    help="Make a language model sparser in one shot, without training it, and tell what it cost.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _complete_method(incomplete: str) -> list[str]:
    return [name for name in method_names() if name.startswith(incomplete)]


Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or a model id of the hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table; errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="List every tensor; show tracebacks and library logs.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel=_MACHINE)]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.", rich_help_panel=_MACHINE),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=_MACHINE)]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the forward pass: auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16.",
        rich_help_panel=_MACHINE,
    ),
]
BatchSize = Annotated[str, typer.Option(help="Samples per forward pass, or auto.", rich_help_panel=_MACHINE)]
SeqLen = Annotated[
    int | None,
    typer.Option(help="Tokens per sample [default: 2048, or what the model takes].", rich_help_panel=_TEXT),
]


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"prune-cli {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="fast (wanda), balanced (admm) or best (admm, dense target); what else is said wins.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="See prune-cli methods [default: wanda].",
            autocompletion=_complete_method,
            rich_help_panel=_RUN,
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", "-s", help="Share of each tensor to remove [default: 0.5].", rich_help_panel=_RUN),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M instead: keep N of every M inputs, as 2:4.", rich_help_panel=_RUN)
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(metavar="STEP", help="Improve the mask afterwards: swaps or dsnot.", rich_help_panel=_RUN),
    ] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Fit the kept weights by least squares.", rich_help_panel=_RUN)
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="KEY=VALUE",
            help="An option of the method, or of a step as swaps.rounds=8.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Glob on tensor names. One that matches linear maps of the blocks narrows the run to them; any other "
            "adds what it names (embeddings, head, norms, routers, biases).",
            rich_help_panel=_RUN,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Glob on tensor names to keep as they are.", rich_help_panel=_RUN),
    ] = None,
    allow_unsupported: Annotated[
        bool,
        typer.Option("--allow-unsupported", help="Keep tensors that cannot be pruned (experts).", rich_help_panel=_RUN),
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Text: builtin, c4, wikitext2, ptb, hf:REPO[:CONFIG][:SPLIT][:COLUMN], a file or a folder "
            "[default: builtin].",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration samples [default: 128].", rich_help_panel=_TEXT)
    ] = None,
    seq_len: SeqLen = None,
    seed: Annotated[int, typer.Option(help="Of samples and of random choices.", rich_help_panel=_TEXT)] = 0,
    calibrate_by: Annotated[
        str,
        typer.Option(
            help="sublayer: one pass, a map sees the maps before it pruned; block: two passes, like the authors.",
            rich_help_panel=_TEXT,
        ),
    ] = "sublayer",
    target: Annotated[
        str | None,
        typer.Option(
            help="What sparsegpt and admm solve for. pruned: what the dense map gives on its inputs now; dense: what "
            "it gave in the dense model (a second stream of hidden states; much better) [default: pruned].",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval", metavar="SOURCE", help="Perplexity on this text, before and after.", rich_help_panel=_TEXT
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run, if there is one.", rich_help_panel=_OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, or an interrupted run.", rich_help_panel=_OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would happen and stop.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prune MODEL and write OUT with a report.

    The linear maps of the decoder blocks are pruned; embeddings, output head, norms, routers and biases stay.
    Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted (continue with --resume).
    """
    with told_failures(as_json=as_json, verbose=verbose, out=out):
        from prune_cli.presets import with_preset
        from prune_cli.request import PruneRequest

        options = with_preset(
            {
                "preset": preset,
                "model": model,
                "out": out,
                "method": method,
                "sparsity": sparsity,
                "pattern": pattern,
                "refine": refine,
                "reconstruct": reconstruct or None,
                "options": _key_values(option or []),
                "calibration": calibration,
                "samples": samples,
                "seq_len": seq_len,
                "seed": seed,
                "device": device,
                "dtype": _checked_later(dtype),
                "batch_size": _batch_size(batch_size),
                "include": tuple(include or ()),
                "exclude": tuple(exclude or ()),
                "calibrate_by": _checked_later(calibrate_by),
                "target": target,
                "eval": evaluation,
                "resume": resume,
                "overwrite": overwrite,
                "allow_unsupported": allow_unsupported,
                "trust_remote_code": trust_remote_code,
                "revision": revision,
            }
        )
        request = PruneRequest(**options)
        request.check()
        _calm_libraries(verbose=verbose)
        if dry_run:
            from prune_cli.estimate import dry_run as estimate
            from prune_cli.render import show_dry_run

            plan = estimate(request)
            _print(plan.to_json(), as_json=as_json, quiet=quiet, show=lambda console: show_dry_run(console, plan))
            return
        from prune_cli.progress import progress_on
        from prune_cli.render import show_report
        from prune_cli.run import prune as run

        with progress_on(Console(stderr=True), quiet=quiet) as progress:
            report = run(request, progress)
        _print(
            report.to_json(),
            as_json=as_json,
            quiet=quiet,
            show=lambda console: show_report(console, report, verbose=verbose),
        )


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(metavar="SOURCE", help="Text, as for --calibration of prune.")],
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="The dense model to compare with.")] = None,
    samples: Annotated[int | None, typer.Option(help="Only the first windows [default: all].")] = None,
    seq_len: SeqLen = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Perplexity of MODEL; against a dense model also KL divergence, agreement and the difference of the losses.

    The text is cut into consecutive windows of --seq-len tokens; each is predicted on its own. One block of weights is
    in memory at a time.
    """
    with told_failures(as_json=as_json, verbose=verbose):
        from prune_cli.measure import EvaluationRequest, measure
        from prune_cli.progress import progress_on
        from prune_cli.render import show_evaluation

        _calm_libraries(verbose=verbose)
        request = EvaluationRequest(
            model=model,
            data=data,
            against=against,
            samples=samples,
            seq_len=seq_len,
            device=device,
            dtype=_checked_later(dtype),
            batch_size=_batch_size(batch_size),
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        with progress_on(Console(stderr=True), quiet=quiet) as progress:
            result = measure(request, progress)
        _print(result.to_json(), as_json=as_json, quiet=quiet, show=lambda console: show_evaluation(console, result))


@app.command()
def inspect(
    model: Model,
    revision: Revision = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Per tensor: shape, dtype, zeros and the N:M pattern found; totals of embeddings, blocks and head."""
    with told_failures(as_json=as_json, verbose=verbose):
        from prune_cli.inspection import inspect_model
        from prune_cli.render import show_inspection

        inspection = inspect_model(model, revision)
        _print(
            inspection.to_json(),
            as_json=as_json,
            quiet=False,
            show=lambda console: show_inspection(console, inspection),
        )


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Only this one.", autocompletion=_complete_method)] = None,
    as_json: Json = False,
) -> None:
    """What each method and each step after it does, needs and costs, its options and its paper."""
    with told_failures(as_json=as_json, verbose=False):
        from methods.steps import step_names
        from prune_cli.describe import describe
        from prune_cli.pipeline import find_method
        from prune_cli.render import show_methods

        if name is not None and name not in step_names():
            find_method(name)
        names = [name] if name is not None else list(dict.fromkeys((*method_names(), *step_names())))
        described = [facts for each in names for facts in describe(each)]
        text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
        _print(text, as_json=as_json, quiet=False, show=lambda console: show_methods(console, described))


def _key_values(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise RequestError(f"-o {pair!r} is no KEY=VALUE: prune-cli methods lists each method's options.")
    return dict(pair.split("=", 1) for pair in pairs)


def _batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise RequestError(f"--batch-size is {text!r}, but must be a whole number or auto.")
    return int(text)


def _checked_later(text: str) -> Any:
    """For the words of a Literal: the request checks them, with the rest."""
    return text


def _print(document: str, *, as_json: bool, quiet: bool, show: Any) -> None:
    if as_json:
        sys.stdout.write(document)
    elif not quiet:
        show(Console(markup=False))  # names may hold brackets


def _calm_libraries(*, verbose: bool) -> None:
    if not verbose:
        from prune_cli.architecture import calm_libraries

        calm_libraries()
