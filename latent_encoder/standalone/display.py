"""The content of standard output: text for people if it is a terminal, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Protocol

from errors import in_utf8
from latent_encoder.standalone.inputs import Inputs
from latent_encoder.standalone.ordering import Outcome
from latent_encoder.standalone.screen import Screen
from latent_encoder.storage.locations import shown


class Display(Protocol):
    """The text for standard output. Each method returns whole lines, or nothing."""

    for_people: bool
    """The text is for people, who need no log event beside it."""

    def outcome(self, outcome: Outcome) -> str:
        """Return the text for one image."""

    def end(self, summary: str) -> str:
        """Return the text at the end of the run; `summary` has its counts in words."""

    def encoded(self, text: str) -> bytes:
        """Return the text in the encoding of standard output."""


class JsonDisplay:
    """JSON: one document for a single image, one line for each of several."""

    for_people = False

    def __init__(self, *, single: bool) -> None:
        self._single = single

    def outcome(self, outcome: Outcome) -> str:
        fields = _document(outcome, single=self._single)
        return json.dumps(fields, indent=2 if self._single else None, ensure_ascii=False) + "\n"

    def end(self, summary: str) -> str:  # noqa: ARG002  # standard output has responses only
        return ""

    def encoded(self, text: str) -> bytes:
        return text.encode()


def display_for(stdout: int, inputs: Inputs, *, as_json: bool) -> Display:
    """Return the display for the file descriptor of standard output."""
    if as_json or not os.isatty(stdout):
        return JsonDisplay(single=inputs.single)
    # Imported here, because a program in a pipe does not wait for Pillow.
    from latent_encoder.standalone.terminal_display import TerminalDisplay

    return TerminalDisplay(Screen(stdout, sys.stdout.encoding), inputs)


def _document(outcome: Outcome, *, single: bool) -> dict[str, Any]:
    """Return the fields of the response, first the image in a run over many, last the correlation id of a request with one."""
    fields = outcome.response.model_dump(mode="json")
    if not single:
        fields = {"image_path": outcome.image_path and in_utf8(shown(outcome.image_path)), **fields}
    return fields if outcome.correlation_id is None else {**fields, "correlation_id": outcome.correlation_id}
