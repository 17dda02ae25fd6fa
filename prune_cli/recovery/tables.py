"""The figures of a recovery as sentences and rows, for the terminal, Markdown and the page. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_cli.report.format import duration, percent, size, text_name

if TYPE_CHECKING:
    from prune_cli.recovery.report import RecoveryReport, TrainingRun

BLOCKS, TRAINING = "Blocks", "Training"
_LOSS_HEADER = ("", "perplexity", "loss (nats per token)")
_TRAINING_HEADER = ("step", "tokens", "loss trained", "held-out KL (nats per token)", "")
_BLOCK_HEADER = ("block", "teacher's blocks", "error before", "error after", "best epoch", "seconds")


def lead(report: RecoveryReport) -> str:
    """What came of it, in a sentence or two."""
    losses = report.losses
    name = text_name(losses.text)
    told = (
        f"The loss on {name} was {losses.dense.loss:.4f} nats per token before pruning, {losses.before.loss:.4f} after "
        f"it, and is {losses.after.loss:.4f} now"
    )
    if losses.won_back is None:
        return f"{told}."
    return f"{told}: {percent(losses.won_back)} of the increase is gone. Every zero is where it was."


def sections(report: RecoveryReport) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, header and rows of each table of figures: the losses, and what was trained."""
    trained = (
        (BLOCKS, _BLOCK_HEADER, _block_rows(report))
        if report.training is None
        else (TRAINING, _TRAINING_HEADER, _training_rows(report.training))
    )
    return [("Loss", _LOSS_HEADER, loss_rows(report)), trained]


def loss_rows(report: RecoveryReport) -> list[tuple[str, ...]]:
    losses = report.losses
    return [
        (name, f"{each.perplexity:.3f}", f"{each.loss:.5f} ± {each.loss_standard_error:.5f}")
        for name, each in (("dense", losses.dense), ("pruned", losses.before), ("recovered", losses.after))
    ]


def _training_rows(training: TrainingRun) -> list[tuple[str, ...]]:
    """One for each look at the held-out samples."""
    return [
        (
            str(look.step),
            f"{look.tokens:,}",
            "" if look.loss is None else f"{look.loss:.4f}",
            f"{look.held_out:.5f}",
            "kept" if look.step == training.best_step else "",
        )
        for look in training.looks
    ]


def _block_rows(report: RecoveryReport) -> list[tuple[str, ...]]:
    return [
        (
            str(block.block),
            _range(block.teacher_blocks),
            f"{block.error_before:.5f}",
            f"{block.error_after:.5f}",
            f"{block.best_epoch} of {len(block.epochs)}" if block.best_epoch else "none: as it was",
            f"{block.seconds:.1f}",
        )
        for block in report.blocks
    ]


def _how(report: RecoveryReport) -> str:
    request, training = report.request, report.training
    told = f"{request.how}, rate {request.learning_rate:g}, seed {request.seed}"
    if training is None:
        return f"{told}, {request.passes} epochs"
    losses = ", ".join(f"{name.replace('_', ' ')} {weight:g}" for name, weight in request.weights.items() if weight)
    last = training.looks[-1]
    ended = {"budget": "", "early": ", ended early: no better any more", "nan": ", ended in NaN"}[training.ended]
    return (
        f"{told}; {last.step} of {training.steps} steps, {last.tokens:,} tokens{ended}; losses: {losses}; "
        f"{training.teacher_bytes:,} bytes of the teacher a token"
    )


def _range(blocks: tuple[int, ...]) -> str:
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"


def facts(report: RecoveryReport) -> list[tuple[str, str]]:
    """(name, text) of how it was done."""
    fitted = report.calibration
    samples = fitted.text.samples - fitted.held_out
    return [
        ("model", report.model.given + (f" at {report.model.revision}" if report.model.revision else "")),
        ("teacher", report.teacher.given + (f" at {report.teacher.revision}" if report.teacher.revision else "")),
        ("how", _how(report)),
        ("trained", f"{report.trained_parameters:,} of {report.parameters:,} parameters, zeros among them left out"),
        ("zeros", f"{report.zeros:,}, before and after"),
        (
            "text",
            f"{fitted.text.source}: {samples} samples of {fitted.text.seq_len} tokens fitted, {fitted.sampled} more "
            f"sampled by the teacher, {fitted.held_out} held out",
        ),
        ("judged on", f"{report.losses.text.source}: {report.losses.text.samples} windows; {report.losses.protocol}"),
        ("time", duration(report.seconds)),
        ("peak memory", size(report.peak_host_bytes)),
        ("made", f"{report.created} by {report.tool.name} {report.tool.version}, on {report.environment.device}"),
    ]
