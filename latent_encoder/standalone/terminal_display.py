"""A run as people see it on a terminal: a line for each image, its picture, and the failures at the end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from PIL import Image

from errors import RequestError
from latent_encoder.access import place_of
from latent_encoder.columns import padded, width, wrapped
from latent_encoder.drawing import drawing
from latent_encoder.images.pillow import quiet_pillow
from latent_encoder.standalone.inputs import Inputs
from latent_encoder.standalone.ordering import Outcome
from latent_encoder.standalone.outcome_lines import Line, failure_line, reason_of, success_line
from latent_encoder.standalone.screen import Screen
from latent_encoder.storage.locations import shown as without_query
from models import ErrorResponse, SuccessResponse

MOST_FAILURES = 10
"""Failures that are shown again at the end: a usual window has room for them. Their counts are always complete."""

LEAST_COLUMNS_OF_PICTURE = 24
"""A narrower picture is not recognisable: a preview has the image and its latent beside each other."""

THUMBNAIL = (50, 8)
"""The most columns and lines of a picture in a run over many: three of them fit on a usual window."""
PICTURE = (66, 32)
"""The most columns and lines of the picture of a single image, as large as the inspection's."""


class TerminalDisplay:
    """Lines of text, cut to the window as it is when each is written."""

    for_people = True

    def __init__(self, screen: Screen, inputs: Inputs) -> None:
        self._screen = screen
        self._single = inputs.single
        self._common = _common_folder(inputs.known_images)
        self._longest = max((width(self._name(path or None)) for path in inputs.known_images), default=None)
        self._failures: dict[tuple[str, str], list[str | None]] = {}
        """The images of the first failures, by code and reason."""
        self._failed = 0
        self._folders: set[Path] = set()

    def outcome(self, outcome: Outcome) -> str:
        name = self._name(outcome.image_path)
        if isinstance(outcome.response, ErrorResponse):
            path = outcome.image_path and without_query(outcome.image_path)
            return self._failure(name, path, outcome.response)
        return self._success(name, outcome.response, stored=outcome.stored)

    def end(self, summary: str) -> str:
        if self._single:
            return ""
        lines = [*self._failure_list(), *wrapped(self._screen.shown(summary), self._screen.columns), *self._place()]
        return "".join(f"{line}\n" for line in lines)

    def encoded(self, text: str) -> bytes:
        return text.encode(self._screen.encoding, "backslashreplace")

    def _success(self, name: str, response: SuccessResponse, *, stored: bool) -> str:
        line = Line(name, self._longest, self._screen, with_latent=not self._single)
        text = success_line(line, response, stored=stored) + "\n"
        if self._single:
            text += "".join(f"  {label}  {self._screen.shown(path)}\n" for label, path in _files(response))
        elif len(self._folders) <= 1:  # of more, only the fact that there are several counts
            self._folders.add(place_of(response.latent_file_path).parent)
        return text + self._picture(response.preview_path)

    def _failure(self, name: str, path: str | None, response: ErrorResponse) -> str:
        line = Line(name, self._longest, self._screen, with_latent=not self._single)
        if self._single:
            return f"{failure_line(line, response, '')}\n{self._indented(response.error_message)}"
        self._failed += 1
        reason = reason_of(response.error_message, path)
        if self._failed <= MOST_FAILURES:
            self._failures.setdefault((response.error_code, reason), []).append(path)
        return f"{failure_line(line, response, reason)}\n"

    def _failure_list(self) -> Iterator[str]:
        """Yield the first failures, those with the same reason together, with their whole reasons."""
        if not self._failures:
            return
        yield from ("", "1 image failed:" if self._failed == 1 else f"{self._failed} images failed:")
        mark = self._screen.styled(self._screen.shown("✗"), fg="red")
        for (code, reason), paths in self._failures.items():
            yield from (f"{mark} {self._screen.shown(path or NO_NAME)}" for path in paths)
            yield self._indented(f"{code}: {reason}").rstrip("\n")
        if (more := self._failed - MOST_FAILURES) > 0:
            yield f"{self._screen.dots} and {more} more"
        yield ""

    def _indented(self, text: str) -> str:
        lines = wrapped(self._screen.shown(text), self._screen.columns - 2)
        return "".join(f"  {line}\n" for line in lines)

    def _picture(self, preview: str | None) -> str:
        """Return a drawing of the preview, if there is one and the terminal can show it."""
        columns, lines = PICTURE if self._single else THUMBNAIL
        columns, lines = min(columns, self._screen.columns), min(lines, self._screen.lines - 2)
        if preview is None or not self._screen.draws or columns < LEAST_COLUMNS_OF_PICTURE:
            return ""
        with suppress(OSError, ValueError, RequestError, Image.DecompressionBombError), quiet_pillow():
            with Image.open(preview) as image:
                pixels = image.convert("RGB")
            return f"{drawing(pixels, columns, lines)}\n"
        return ""

    def _name(self, path: str | None) -> str:
        """Return the name of an image for its line: its path, without the folder that all images have in common."""
        if path is None:
            return NO_NAME
        path = without_query(path)
        return self._screen.shown(path.removeprefix(self._common) or path)

    def _place(self) -> Iterator[str]:
        """Yield a line with the folder that has the files. A long path is not broken, so that it can be copied."""
        if len(self._folders) == 1:
            yield f"Files: {self._screen.shown(str(*self._folders))}"
        elif self._folders:
            yield "Files: in several folders"


NO_NAME = "(no image)"


def _common_folder(paths: Iterable[str]) -> str:
    """Return the beginning that the paths of all images have in common, up to the end of a folder's name."""
    common: str | None = None
    for path in map(without_query, paths):
        common = path if common is None else os.path.commonprefix((common, path))  # noqa: RUF071  # cut at a `/` below
    if common is None:
        return ""
    folder = common[: common.rfind("/") + 1]
    return folder if folder != "/" else ""


def _files(response: SuccessResponse) -> Iterator[tuple[str, str]]:
    """Yield a label and a path for each file of a response."""
    files = {
        "latent": response.latent_file_path,
        "metadata": f"{response.latent_file_path}.json",
        "scaled image": response.scaled_image_path,
        "preview": response.preview_path,
        "roundtrip": response.roundtrip_path,
    }
    for label, path in files.items():
        if path is not None:
            yield padded(label, max(map(len, files))), path
