"""A gate's result for people and machines: a table, Markdown, JUnit XML, annotations of GitHub. No torch here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from prune_cli.checks.request import GateResult
from prune_cli.checks.rules import CheckResult
from prune_cli.errors import RequestError
from prune_cli.report.format import table as markdown_table

_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SUMMARY = "GITHUB_STEP_SUMMARY"


def message(result: GateResult) -> str:
    """Where the figures come from, as one sentence."""
    if result.source == "report":
        return f"Figures as {result.target} states them; nothing was measured."
    beside = f", beside {result.against}" if result.against else ""
    return f"Measured on {result.text}{beside}." if result.text else f"Measured in the files of {result.target}."


def verdict_of(result: GateResult) -> str:
    failed = [verdict.rule for verdict in result.failed]
    if not failed:
        return f"Passed: {len(result.verdicts)} rule(s)."
    return f"Failed: {', '.join(failed)} ({len(failed)} of {len(result.verdicts)} rules)."


def show_gate(console: Console, result: GateResult) -> None:
    table = Table(title=f"Check of {result.target}", title_justify="left")
    for name in ("rule", "asked", "measured" if result.source == "measured" else "in the report", ""):
        table.add_column(name, overflow="fold", no_wrap=name in ("rule", ""))
    for verdict in result.verdicts:
        table.add_row(verdict.rule, verdict.asked, verdict.measured, "pass" if verdict.passed else "FAIL")
    console.print(table)
    console.print(message(result), highlight=False, soft_wrap=True)
    for warning in result.warnings:
        console.print(f"Warning: {warning}", highlight=False, soft_wrap=True)
    console.print(verdict_of(result), highlight=False, soft_wrap=True)


def check_junit_path(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise RequestError(f"--junit {path} is no file that can be written: its folder must exist.")


def to_junit(result: GateResult, seconds: float) -> str:
    """JUnit XML: a test case per rule. The form is that of https://github.com/testmoapp/junitxml."""
    counts = {"tests": str(len(result.verdicts)), "failures": str(len(result.failed)), "errors": "0"}
    suites = ElementTree.Element("testsuites", {"name": "prune-cli check", **counts, "time": f"{seconds:.3f}"})
    suite = ElementTree.SubElement(
        suites, "testsuite", {"name": _xml(result.target), **counts, "skipped": "0", "time": f"{seconds:.3f}"}
    )
    for verdict in result.verdicts:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "prune-cli check", "name": _xml(verdict.rule), "time": "0"}
        )
        if not verdict.passed:
            failure = ElementTree.SubElement(case, "failure", {"message": _xml(_sentence(verdict)), "type": "rule"})
            failure.text = _xml(f"{_sentence(verdict)}. {message(result)}")
        ElementTree.SubElement(case, "system-out").text = _xml(f"asked {verdict.asked}, found {verdict.measured}")
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def on_github(result: GateResult) -> Iterator[str]:
    """Workflow commands that annotate the run, for stderr, which the runner reads too; the step summary is appended."""
    for verdict in result.failed:
        yield f"::error title={_property(f'prune-cli check: {verdict.rule}')}::{_data(_sentence(verdict))}"
    if _SUMMARY in os.environ:
        with Path(os.environ[_SUMMARY]).open("a", encoding="utf-8") as summary:
            summary.write(to_markdown(result))
    where = "the table is in the step summary" if _SUMMARY in os.environ else f"{_SUMMARY} is not set: no step summary"
    yield f"GitHub: {len(result.failed)} annotation(s), {where}."


def to_markdown(result: GateResult) -> str:
    rows = [(f"`{v.rule}`", v.asked, v.measured, "pass" if v.passed else "**FAIL**") for v in result.verdicts]
    found = "measured" if result.source == "measured" else "in the report"
    title = f"### Check of `{result.target}`"
    warnings = "".join(f"\n\n**Warning:** {warning}" for warning in result.warnings)
    rules = markdown_table(("rule", "asked", found, ""), rows)
    return f"{title}\n\n{rules}\n\n{message(result)} {verdict_of(result)}{warnings}\n"


def _sentence(verdict: CheckResult) -> str:
    return f"{verdict.rule}: asked {verdict.asked}, found {verdict.measured}"


def _xml(text: str) -> str:
    return _NOT_IN_XML.sub("�", text)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
