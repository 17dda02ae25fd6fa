"""The rules of `prune-cli check`: from what was asked and the figures to verdicts. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prune_cli.checks.figures import Figures
from prune_cli.checks.limits import Kind, Limit, parse_limit
from prune_cli.errors import RequestError
from prune_cli.report.format import percent, size


@dataclass(frozen=True)
class CheckResult:
    """One rule: what was asked and what was found, in words and, where there is one, as a number."""

    rule: str
    asked: str
    measured: str
    passed: bool
    limit: float | None = None
    value: float | None = None


@dataclass(frozen=True)
class Rule:
    """`needs` are the figures it is decided on, `more` also those for a limit relative to the dense model."""

    option: str
    kind: Kind
    needs: Sequence[str]
    decide: Callable[[str, Limit, Figures], CheckResult]
    more: Sequence[str] = ()

    def needs_for(self, limit: Limit) -> list[str]:
        return [*self.needs, *(self.more if limit.relative else ())]


def _max_perplexity(rule: str, limit: Limit, figures: Figures) -> CheckResult:
    (value,) = figures.need(rule, "perplexity")
    return CheckResult(rule, f"at most {limit.text}", f"{value:.4f}", value <= limit.value, limit.value, value)


def _max_increase(rule: str, limit: Limit, figures: Figures) -> CheckResult:
    value, dense = figures.need(rule, "perplexity", "dense_perplexity")
    increase = value / dense - 1 if limit.relative else value - dense
    message = f"{100 * increase:+.2f} %" if limit.relative else f"{increase:+.4f}"
    measured = f"{message} ({dense:.4f} to {value:.4f})"
    return CheckResult(rule, f"at most {limit.text}", measured, increase <= limit.value, limit.value, increase)


def _max_kl(rule: str, limit: Limit, figures: Figures) -> CheckResult:
    (value,) = figures.need(rule, "kl")
    return CheckResult(
        rule, f"at most {limit.text}", f"{value:.5f} nats per token", value <= limit.value, limit.value, value
    )


def _min_top1(rule: str, limit: Limit, figures: Figures) -> CheckResult:
    (value,) = figures.need(rule, "top1")
    return CheckResult(rule, f"at least {limit.text}", percent(value), value >= limit.value, limit.value, value)


def _min_sparsity(rule: str, limit: Limit, figures: Figures) -> CheckResult:
    (value,) = figures.need(rule, "sparsity")
    measured = f"{percent(value)} of {figures.sparsity_of}"
    return CheckResult(rule, f"at least {limit.text}", measured, value >= limit.value, limit.value, value)


def _max_size(rule: str, limit: Limit, figures: Figures) -> CheckResult:
    if not limit.relative:
        (value,) = figures.need(rule, "bytes")
        return CheckResult(rule, f"at most {limit.text}", size(int(value)), value <= limit.value, limit.value, value)
    value, dense = figures.need(rule, "bytes", "dense_bytes")
    measured = f"{value / dense:.3f}x ({size(int(dense))} to {size(int(value))})"
    return CheckResult(
        rule, f"at most {limit.text}", measured, value / dense <= limit.value, limit.value, value / dense
    )


RULES = (
    Rule("--max-perplexity", "number", ["perplexity"], _max_perplexity),
    Rule("--max-perplexity-increase", "increase", ["perplexity", "dense_perplexity"], _max_increase),
    Rule("--max-kl", "number", ["kl"], _max_kl),
    Rule("--min-top1", "share", ["top1"], _min_top1),
    Rule("--min-sparsity", "share", ["sparsity"], _min_sparsity),
    Rule("--max-size", "size", ["bytes"], _max_size, more=["dense_bytes"]),
)
REQUIRE_LOADABLE, FILES = "--require-loadable", "files as in the report"


@dataclass(frozen=True)
class Thresholds:
    """The rules that were asked for, each with its limit."""

    limits: Sequence[tuple[Rule, Limit]]
    loadable: bool

    @classmethod
    def parse(
        cls, given: Mapping[str, str | None], *, loadable: bool, beside: Sequence[tuple[Rule, Limit]] = ()
    ) -> Thresholds:
        """`given` maps options to what was typed. Raises RequestError for a limit that makes no sense."""
        limits = [
            (rule, parse_limit(rule.option, text, rule.kind)) for rule in RULES if (text := given.get(rule.option))
        ]
        return cls([*limits, *beside], loadable)

    @property
    def needs(self) -> set[str]:
        needs = {name for rule, limit in self.limits for name in rule.needs_for(limit)}
        return needs | ({"load_failure"} if self.loadable else set())

    def check_decidable(self, missing: dict[str, str]) -> None:
        """Raise RequestError for the first rule that needs one of the `missing` figures (name -> why)."""
        for rule, limit in self.limits:
            for name in rule.needs_for(limit):
                if name in missing:
                    raise RequestError(f"{rule.option} cannot be decided: {missing[name]}.")

    def decide(self, figures: Figures) -> list[CheckResult]:
        """A verdict for every rule; raises RequestError for one that the figures do not decide."""
        verdicts = [rule.decide(rule.option, limit, figures) for rule, limit in self.limits]
        if self.loadable:
            if figures.load_failure is None:
                raise RequestError(f"{REQUIRE_LOADABLE} cannot be decided: {figures.missing['load_failure']}.")
            message = figures.load_failure or "loads and generates"
            verdicts.append(
                CheckResult(REQUIRE_LOADABLE, "loads in plain transformers", message, not figures.load_failure)
            )
        if figures.changed_files is not None:
            message = f"{', '.join(figures.changed_files)} changed" if figures.changed_files else "the same"
            verdicts.append(CheckResult(FILES, "the same", message, not figures.changed_files))
        return verdicts
