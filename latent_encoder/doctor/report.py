"""The doctor's report, as text for people or as JSON."""

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
PLAIN = str.maketrans({"✓": "+", "✗": "x", "…": "..."})
INDENT = "    "


def worst(checks: Sequence[Check]) -> State:
    return max((check.state for check in checks), key=lambda state: state.severity, default=State.TICK)


def as_json(groups: Mapping[str, Sequence[Check]]) -> str:
    """Return one document: `worst`, and `checks` with their `group`, in order."""
    checks = [{"group": group, **asdict(check)} for group, found in groups.items() for check in found]
    return json.dumps({"worst": worst([check for found in groups.values() for check in found]), "checks": checks}, indent=2)


def as_text(check: Check) -> str:
    """Return a check as lines that fit the terminal: mark, name and finding, then the advice."""
    mark = MARKS[check.state]
    lines = _wrapped(f"{mark} {check.name}: {check.found}", first_indent="  ")
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
        State.WARNING: "It works; read the checks marked with !.",
        State.CROSS: f"Something does not work; follow the advice under each {MARKS[State.CROSS]}.",
    }[worst(checks)]
    return f"{verdict} ({', '.join(f'{count} {MARKS[state]}' for state, count in counts.items())})"


def encodable(text: str, encoding: str) -> str:
    """Return the text with characters that the encoding lacks written in ASCII."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


def _wrapped(text: str, first_indent: str) -> str:
    """Return lines that break only between words, so that paths and checksums can be copied."""
    width = shutil.get_terminal_size().columns
    return textwrap.fill(
        text, width, initial_indent=first_indent, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
    )
