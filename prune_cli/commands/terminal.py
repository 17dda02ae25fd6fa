"""The results of the commands as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from prune_cli.checkpoint.file_names import why_not_copied
from prune_cli.report.continuations import Continuation, agreement, one_line
from prune_cli.report.figures import FIGURES, figures_of, fitted_into
from prune_cli.report.format import duration_range, method_name, percent, size
from prune_cli.report.structure_tables import (
    BLOCKS,
    NOT_LOADED,
    SIZES,
    block_rows,
    not_loaded_rows,
    share_text,
    size_rows,
)
from prune_cli.report.task_scores import TaskScores
from prune_cli.report.tasks import header_of, rows_of, title_of

# Only their types: `inspect` and `methods` answer without importing transformers.
if TYPE_CHECKING:
    from prune_cli.checks.verify import Verification
    from prune_cli.evaluation.perplexity import EvaluationResult
    from prune_cli.hub.push import Push
    from prune_cli.report.types import NotLoaded, Report, StructureReport
    from prune_cli.sparse.convert import Conversion
    from prune_cli.structured.dry_run import StructuredDryRun
    from prune_cli.structured.moe.list_only import ExpertList
    from prune_cli.unstructured.dry_run import DryRun


# A table's own lines, and the fewest characters that a name is told with.
_FRAME, _SHORTEST_NAME = 4, 20
# Stages of a run shorter than this share are not told.
_WORTH_TELLING = 0.05


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        longest = max(map(len, column.split()), default=0)
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold", min_width=longest)
    return table


def elided(console: Console, name: str, cells: Sequence[str]) -> str:
    """`name` beside `cells` on a line of the terminal, without its middle where it is too long. Never broken."""
    room = max(_SHORTEST_NAME, console.width - sum(len(cell) + 3 for cell in cells) - _FRAME)
    if len(name) <= room:
        return name
    return f"{name[: (room - 1) // 2]}…{name[len(name) - room // 2 :]}"


def show_report(console: Console, report: Report, *, verbose: bool) -> None:
    table = table_of(f"{report.request.model} pruned with {method_name(report)}", *FIGURES)
    for figure in figures_of(report):
        table.add_row(*figure.cells())
    console.print(table)
    structure = report.structure
    if verbose and structure is None:
        _show_tensors(console, report)
    elif verbose and structure is not None:
        console.print(_blocks(structure))
    if report.request.preset is not None:
        console.print(f"{report.method.summary}.", highlight=False)
    console.print(_what_was_done(report), highlight=False)
    if report.tasks is not None:
        show_tasks(console, report.tasks)
    show_continuations(console, report.continuations)
    show_not_loaded(console, report.not_loaded)
    console.print(report.gain, highlight=False)
    for kind, texts in (("Warning", report.warnings), ("Note", structure.notes if structure else ())):
        for text in texts:
            console.print(f"{kind}: {text}", highlight=False, soft_wrap=True)
    written = f"Written to {report.output.folder}; prune_report.html there shows it."
    console.print(written, highlight=False, soft_wrap=True)


def show_continuations(console: Console, found: Sequence[Continuation]) -> None:
    """What the dense and the pruned model said after each prompt."""
    for each in found:
        console.print(f"{one_line(each.prompt)}  ({agreement(each)})", highlight=False, soft_wrap=True, style="bold")
        console.print(f"  dense:  {one_line(each.dense)}", highlight=False, soft_wrap=True)
        console.print(f"  pruned: {one_line(each.pruned)}", highlight=False, soft_wrap=True)


def _blocks(structure: StructureReport) -> Table:
    blocks = table_of("Blocks", *BLOCKS)
    for row in block_rows(structure.blocks):
        blocks.add_row(*row)
    return blocks


def show_not_loaded(console: Console, found: Sequence[NotLoaded]) -> None:
    """What transformers leaves out when it loads the model."""
    if not found:
        return
    table = table_of("Not loaded by transformers", *NOT_LOADED)
    for row in not_loaded_rows(found):
        table.add_row(*row)
    console.print(table)


def _show_tensors(console: Console, report: Report) -> None:
    """Every pruned tensor: rows of a table on a terminal, lines with tabs in a pipe."""
    table = table_of("Pruned tensors", "tensor", "sparsity", "output error")
    for tensor in report.tensors:
        if tensor.action == "pruned":
            cells = [percent(tensor.sparsity), "–" if tensor.output_error is None else f"{tensor.output_error:.4f}"]
            if console.is_terminal:
                table.add_row(elided(console, tensor.name, [*cells, " " * 8]), *cells)
            else:
                console.print("\t".join([tensor.name, *cells]), highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(table)


def _what_was_done(report: Report) -> str:
    structure = report.structure
    if structure is not None:
        asked = f"Asked for: {structure.asked}; removed {share_text(structure)}"
        return f"{asked} (each block and why in prune_report.md)."
    kept = sum(tensor.action == "kept" for tensor in report.tensors)
    return f"{len(report.tensors) - kept} tensors pruned, {kept} kept (reasons in prune_report.md)."


def show_dry_run(console: Console, plan: DryRun) -> None:
    console.print(
        f"{plan.model} ({plan.architecture}): {plan.method}, {plan.pattern}, on {plan.device} in {plan.compute_dtype}",
        highlight=False,
        soft_wrap=True,
    )
    table = table_of("What would happen", "role", "action", "tensors", "parameters", "reason")
    for item in plan.classes:
        table.add_row(item.role, item.action, str(item.tensors), f"{item.parameters:,}", item.reason)
    console.print(table)
    table = table_of("Figures", "", "")
    table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row("in pruned tensors", f"{plan.pruned_parameters:,}")
    table.add_row("zeros to be made", f"{plan.zeros:,}")
    table.add_row("read", size(plan.bytes_read))
    table.add_row("written", size(plan.bytes_written))
    tokens = "none needed" if plan.calibration_tokens is None else f"{plan.calibration_tokens:,} tokens"
    sampled = f", {plan.sampled_tokens:,} of them sampled by the dense model" if plan.sampled_tokens else ""
    table.add_row("calibration", tokens + sampled)
    _add_costs(table, plan)
    console.print(table)
    show_not_loaded(console, plan.not_loaded)
    if plan.packed is not None:
        console.print(plan.packed, highlight=False)
    console.print(plan.gain, highlight=False)
    for warning in plan.warnings:
        console.print(f"Warning: {warning}", highlight=False, soft_wrap=True)


def _add_costs(table: Table, plan: DryRun | StructuredDryRun) -> None:
    """Memory, and the time of the whole run and of the stages that make it long."""
    table.add_row("peak memory, estimated", size(plan.peak_host_bytes))
    if plan.peak_device_bytes is not None:
        table.add_row(f"peak memory of {plan.device}, estimated", size(plan.peak_device_bytes))
    if plan.memory is not None:
        table.add_row("fitted into", fitted_into(plan.memory))
    seconds = plan.seconds
    table.add_row("time, estimated", duration_range(seconds.low, seconds.high))
    whole = sum(seconds.stages.values())
    for title, spent in seconds.stages.items():
        if spent >= _WORTH_TELLING * whole:
            table.add_row(f"  of which: {title[0].lower()}{title[1:]}", f"about {100 * spent / whole:.0f} %")


def show_structured_dry_run(console: Console, plan: StructuredDryRun) -> None:
    console.print(
        f"{plan.model} ({plan.architecture}): {plan.method}, {plan.asked}, on {plan.device} in {plan.compute_dtype}",
        highlight=False,
        soft_wrap=True,
    )
    table = table_of("What it would become", *SIZES)
    for row in size_rows(plan.before, plan.after):
        table.add_row(*row)
    console.print(table)
    table = table_of("What it would take", "", "")
    _add_costs(table, plan)
    console.print(table)
    show_not_loaded(console, plan.not_loaded)
    if plan.packed is not None:
        console.print(plan.packed, highlight=False)
    console.print(plan.how, highlight=False)
    console.print(plan.gain, highlight=False)
    for note in plan.notes:
        console.print(f"Warning: {note}", highlight=False, soft_wrap=True)


def show_expert_list(console: Console, written: ExpertList) -> None:
    """How many experts stay, by layer where the numbers differ."""
    whole = written.experts * len(written.counts)
    console.print(f"{written.file}: {written.kept} of {whole} experts of {written.model} stay", soft_wrap=True)
    if len(set(written.counts.values())) > 1:
        table = table_of("", "layer", "stay", "of")
        for layer, count in written.counts.items():
            table.add_row(str(layer), str(count), str(written.experts))
        console.print(table)


def show_evaluation(console: Console, result: EvaluationResult) -> None:
    table = table_of(f"{result.text.samples} windows of {result.text.seq_len} tokens of {result.text.source}", "", "")
    evaluation = result.evaluation
    table.add_row("perplexity", f"{evaluation.perplexity:.4f}")
    table.add_row("loss (nats per token)", f"{evaluation.loss:.5f} ± {evaluation.loss_standard_error:.5f}")
    if result.comparison is not None:
        other = result.comparison
        table.add_row(f"perplexity of {result.against}", f"{other.dense.perplexity:.4f}")
        table.add_row("loss increase", f"{other.loss_increase:+.5f} ± {other.loss_increase_standard_error:.5f}")
        table.add_row("KL divergence from it", f"{other.kl_from_dense:.5f}")
        table.add_row("same first choice", percent(other.top1_agreement))
    if result.memory is not None:
        table.add_row("memory", fitted_into(result.memory))
    console.print(table)
    console.print(f"{result.protocol}. {result.text.protocol}", highlight=False)
    for warning in result.warnings:
        console.print(f"Warning: {warning}", highlight=False, soft_wrap=True)


def show_methods(console: Console, described: Sequence[Mapping[str, Any]]) -> None:
    """All about each."""
    for facts in described:
        table = table_of(facts["option"], "", "")
        table.columns[1].justify = "left"
        table.add_row("what it does", facts["summary"])
        table.add_row("needs", ", ".join(facts["needs"]) or "nothing but the weights")
        table.add_row("costs", facts["cost"])
        table.add_row("paper", facts["paper"])
        for option in facts["options"]:
            table.add_row(f"-o {option['name']}=...", f"{option['help']} (default: {option['default']})")
        console.print(table)


def show_choices(console: Console, groups: Mapping[str, Sequence[tuple[str, str, str]]]) -> None:
    """What can be asked for, with what it does and costs, group by group."""
    for title, rows in groups.items():
        table = table_of(title, "", "what it does", "costs")
        for column in table.columns:
            column.justify = "left"
        table.columns[0].no_wrap = True
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("prune-cli methods NAME tells needs, options and paper.", highlight=False)


def show_push(console: Console, push: Push) -> None:
    table = table_of(f"{push.repo}, branch {push.revision}", "file", "size")
    for file in push.files:
        table.add_row(file.path, size(file.bytes))
    table.add_row("all", size(push.bytes))
    console.print(table)
    if push.dry_run:
        console.print(f"Nothing was sent: {push.url} would get this as one commit.", highlight=False, soft_wrap=True)
        return
    for path in push.removed:
        console.print(f"Removed there: {path}", highlight=False, soft_wrap=True)
    console.print(f"Pushed to {push.pull_request or push.url}", highlight=False, soft_wrap=True)


def show_tasks(console: Console, scores: TaskScores) -> None:
    table = table_of(title_of(scores), *header_of(scores))
    for row in rows_of(scores):
        table.add_row(*row)
    console.print(table)


def show_conversion(console: Console, done: Conversion) -> None:
    saved = 1 - done.bytes_after / done.bytes_before
    change = f"{saved:.1%} less" if saved >= 0 else f"{-saved:.1%} more"
    what = "encoded" if done.format == "sparse" else "decoded"
    console.print(
        f"{done.model} as {done.format} safetensors: {size(done.bytes_before)} became {size(done.bytes_after)} "
        f"({change}), {done.encoded_tensors} of {done.tensors} tensors {what}.",
        highlight=False,
        soft_wrap=True,
    )
    for name in done.not_copied:
        console.print(why_not_copied(name), highlight=False, soft_wrap=True)
    console.print(f"Written to {done.out}", highlight=False, soft_wrap=True)


def show_verification(console: Console, found: Verification) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    for text in found.checked:
        say(f"Checked: {text}.")
    for text in found.skipped:
        say(f"Not checked: {text}.")
    for problem in found.problems:
        say(f"Wrong: {problem.problem}")
    say(f"{found.model} has {len(found.problems)} problem(s)." if found.problems else f"{found.model} is sound.")
