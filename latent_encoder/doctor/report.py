"""The doctor's report, as text for people or as JSON.

The text begins with the findings, the worst first. The checks that found nothing follow in their groups.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import click

from latent_encoder.doctor.check import Check, State

MARKS = {State.TICK: "✓", State.WARNING: "!", State.CROSS: "✗"}
COLOURS = {State.TICK: "green", State.WARNING: "yellow", State.CROSS: "red"}
INDENT = "    "


def worst(checks: Sequence[Check]) -> State:
    return max((check.state for check in checks), key=lambda state: state.severity, default=State.TICK)


def as_json(groups: Mapping[str, Sequence[Check]]) -> str:
    """Return one document: `worst`, and `checks` with their `group`, in order."""
    checks = [{"group": group, **_fields(check)} for group, found in groups.items() for check in found]
    return json.dumps({"worst": worst([check for found in groups.values() for check in found]), "checks": checks}, indent=2)


def _fields(check: Check) -> dict[str, str]:
    return {name: value for name, value in asdict(check).items() if name != "folded"}


def as_text(groups: Mapping[str, Sequence[Check]], *, verbose: bool) -> str:
    """Return all checks as lines: the findings, the others in their groups, and the verdict."""
    checks = [check for found in groups.values() for check in found]
    findings = sorted((check for check in checks if check.state is not State.TICK), key=lambda check: -check.state.severity)
    sections = {"Findings": findings}
    sections |= {group: [check for check in found if check.state is State.TICK] for group, found in groups.items()}
    lines = []
    for title, shown in sections.items():
        if shown:
            lines += [heading(title), *(line(check, verbose=verbose) for check in shown)]
    return "\n".join([*lines, summary(checks)])


def line(check: Check, *, verbose: bool = False) -> str:
    """Return a check as lines that fit the terminal: mark, name and finding, then the advice."""
    mark = MARKS[check.state]
    found = check.folded if check.folded and not verbose else check.found
    lines = _wrapped(f"{mark} {check.name}: {found}", first_indent="  ")
    if check.advice:
        lines += "\n" + _wrapped(check.advice, first_indent=INDENT)
    return lines.replace(mark, click.style(mark, fg=COLOURS[check.state], bold=True), 1)


def heading(group: str) -> str:
    return click.style(group, bold=True)


def summary(checks: Sequence[Check]) -> str:
    """Return the last line: a verdict, and the count of each state."""
    counts = {state: sum(check.state is state for check in checks) for state in reversed(State)}
    verdict = {
        State.TICK: "All is well.",
        State.WARNING: "It works; read the findings marked with !.",
        State.CROSS: f"Something does not work; follow the advice under each {MARKS[State.CROSS]}.",
    }[worst(checks)]
    return f"{verdict} ({', '.join(f'{count} {MARKS[state]}' for state, count in counts.items())})"


def _wrapped(text: str, first_indent: str) -> str:
    """Return lines that break only between words, so that paths and checksums can be copied."""
    width = shutil.get_terminal_size().columns
    return textwrap.fill(
        text, width, initial_indent=first_indent, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
    )
