"""The inputs of a standalone run: requests made of paths, folders, patterns and lists."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from errors import InvalidRequest, LatentEncoderError, MessageUnusable, RequestError
from latent_encoder.access import ANYWHERE, AllowedFolders
from latent_encoder.outputs.run_requests import RunRequest, with_lasting_id
from latent_encoder.requests import LONGEST_VALUE, parse_request, read_fields, request_id_of, usable_text
from latent_encoder.standalone.folders import Walk, shown_counts
from latent_encoder.standalone.naming import NamePattern, NameRefused, Names
from latent_encoder.storage.locations import is_url, shown
from latent_encoder.user_paths import expanded, expanded_file
from models import EncodeRequest, ErrorResponse

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".jfi",
    ".jif",
    ".pjpeg",
    ".pjp",
    ".mpo",
    ".jpg_large",
    ".jpg-large",
    ".png",
)
"""Endings of the images in a folder: those of browsers, phones and Twitter too. A file that is named may have any."""
STDIN = "-"


@dataclass(frozen=True)
class ImageSelection:
    """The command line's choice of images."""

    paths: tuple[str, ...] = ()
    """Files, folders and patterns."""
    recursive: bool = False
    input_list: str | None = None
    """A file of requests as JSON Lines; `-` is standard input."""
    name: str | None = None
    """The pattern of the output files' names; None for stem and id."""

    @property
    def single(self) -> bool:
        """The choice of one image, named by its own path."""
        return self.input_list is None and len(self.paths) == 1 and self.named_images == self.paths

    @property
    def named_images(self) -> tuple[str, ...]:
        """The images that are named by their own paths, which need not exist."""
        return tuple(path for path in self.paths if not _stands_for_several(path))


@dataclass(frozen=True)
class RefusedInput:
    """The error response to an input that is no valid request."""

    response: ErrorResponse
    image_path: str | None = None
    correlation_id: str | None = None

    @classmethod
    def of(cls, error: RequestError, fields: Mapping[str, Any]) -> RefusedInput:
        response = ErrorResponse.of(error, request_id_of(fields), datetime.now(UTC))
        image_path = fields.get("image_path")
        return cls(response, shown(image_path) if isinstance(image_path, str) else None, usable_text(fields, "correlation_id"))


Input = EncodeRequest | RefusedInput


class UnusableInputs(LatentEncoderError):
    """A folder or a pattern without images, a list that cannot be read, or one id for several images; the text names it."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, in order."""

    items: Iterable[Input]
    total: int | None
    """None if it is not known before the last one is read."""
    single: bool
    """The input is one image, named by its own path."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """The counts of files and folders that were left out, by reason."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """The folders that could not be read, with the system's reasons."""


def inputs_of(
    selection: ImageSelection, fields: Mapping[str, Any], defaults: Mapping[str, Any], outputs: AllowedFolders = ANYWHERE
) -> Inputs:
    """Return the inputs that the command line selects.

    A request without an id gets one made of its fields, so that a repeated run finds the files of the first.

    Args:
        selection: the command line's choice of images.
        fields: the request's fields that the command line gives; None for each that it leaves out.
        defaults: the settings' values for fields that are left out.
        outputs: the folders that files may be written to.

    Raises:
        UnusableInputs: a folder or a pattern holds no image, the list cannot be read, a request id is given for several, or
            the names of the output files cannot be used.
    """
    inputs = _selected(selection, fields, defaults)
    if selection.name is None:
        return inputs
    try:
        names = Names(NamePattern.of(selection.name), outputs)
        return replace(inputs, items=_named(inputs.items, names, at_once=selection.input_list != STDIN))
    except NameRefused as exc:
        raise UnusableInputs(str(exc)) from exc


def _named(items: Iterable[Input], names: Names, *, at_once: bool) -> Iterable[Input]:
    """Return the inputs with the names of their files.

    Raises:
        NameRefused: `at_once`, and a name cannot be used. Otherwise its input becomes an error response when it is read.
    """
    return [_with_name(*item, names) for item in enumerate(items, 1)] if at_once else _named_as_read(items, names)


def _named_as_read(items: Iterable[Input], names: Names) -> Iterator[Input]:
    for index, item in enumerate(items, 1):
        try:
            yield _with_name(index, item, names)
        except NameRefused as exc:
            fields = item.model_dump() if isinstance(item, EncodeRequest) else {}
            yield RefusedInput.of(InvalidRequest(f"Invalid request: {exc}"), fields)


def _with_name(index: int, item: Input, names: Names) -> Input:
    if isinstance(item, RefusedInput):
        return item
    try:
        return names.named(item, index)
    except RequestError as exc:
        return RefusedInput.of(exc, item.model_dump())


def _selected(selection: ImageSelection, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> Inputs:
    defaults = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
    if len(selection.paths) == 1 and not _stands_for_several(selection.paths[0]):
        return Inputs([_lasting_item({**fields, "image_path": selection.paths[0]}, defaults)], total=1, single=True)
    refuse_shared_id(selection, fields)
    if selection.input_list is not None:
        return _of_list(selection.input_list, defaults)
    walk = Walk(IMAGE_SUFFIXES, recursive=selection.recursive)
    found = find_images(selection.paths, walk)
    items = list(_with_rivals_marked(_lasting_item({**fields, "image_path": path}, defaults, found[path]) for path in found))
    return Inputs(items, total=len(items), single=False, left_out=walk.counts, unreadable=walk.unreadable)


def refuse_shared_id(selection: ImageSelection, fields: Mapping[str, Any]) -> None:
    """Refuse one request id for several images.

    Raises:
        UnusableInputs: an id is given, and the selection is not a single image.
    """
    if fields.get("request_id") is not None and not selection.single:
        raise UnusableInputs("--request-id is for one image; leave it out, and each image gets an id of its own.")


def find_images(paths: Iterable[str], walk: Walk) -> dict[str, str | None]:
    """Return the files that the paths stand for, each once. Those of a folder or a pattern are sorted by name.

    The value of each is its path below the folder, or below the part of the pattern that stands for one folder. It is None
    for a file that is named. Own outputs are left out of folders and patterns; a file that is named is taken as it is.

    Raises:
        UnusableInputs: a folder or a pattern holds no image.
    """
    found: dict[str, str | None] = {}
    for path in paths:
        if not _stands_for_several(path):
            found |= dict.fromkeys([path] if is_url(path) or walk.take(Path(path)) else [])
            continue
        before = walk.counts
        images = walk.images_in(Path(path)) if Path(path).is_dir() else walk.matching(path)
        if not images and str(Path(path)) not in walk.unreadable:
            raise UnusableInputs(_nothing_in(path, walk, before))
        root = _root_of(path)
        found |= {str(image): str(image.relative_to(root)) for image in sorted(filter(walk.take, images))}
    if not found:
        raise UnusableInputs(f"Cannot read {'; '.join(f'{path} ({reason})' for path, reason in walk.unreadable.items())}")
    return found


def _root_of(path: str) -> Path:
    """Return the folder that a path stands for; of a pattern, the part before its first magic character."""
    place = Path(path)
    return place if place.is_dir() else Path(*takewhile(lambda part: not has_magic(part), place.parts))


def _with_rivals_marked(items: Iterable[Input]) -> Iterator[Input]:
    """Mark each image that has the id of one before it, because both have the same path below two folders."""
    seen: set[str] = set()
    for item in items:
        rival = isinstance(item, RunRequest) and item.request_id in seen
        yield item.model_copy(update={"contested": True}) if isinstance(item, RunRequest) and rival else item
        if isinstance(item, EncodeRequest):
            seen.add(item.request_id)


def _stands_for_several(path: str) -> bool:
    """Return whether the path is a folder or a pattern. A file whose name looks like a pattern is that file: `[1].png`."""
    if is_url(path):
        return False
    place = Path(path)
    try:
        return place.is_dir() or (has_magic(path) and not place.exists())
    except (OSError, ValueError):
        return False  # too long a name, or a NUL byte: the request fails, and its response has the reason


def _nothing_in(path: str, walk: Walk, before: Mapping[str, int]) -> str:
    """Return the reason why a folder or a pattern gave nothing, with the counts that were left out there."""
    counts = {reason: count - before.get(reason, 0) for reason, count in walk.counts.items()}
    left_out = f" ({text})" if (text := shown_counts(counts)) else ""
    if not Path(path).is_dir():
        return f"No file matches {path}{left_out}"
    hint = "" if walk.recursive else "; --recursive looks in the folders below it too"
    return f"No JPEG or PNG in the folder {path}{left_out}{hint}"


def _of_list(name: str, defaults: Mapping[str, Any]) -> Inputs:
    with _readable(name):
        if name == STDIN:
            return Inputs(_items_of_lines("standard input", sys.stdin.buffer, defaults), total=None, single=False)
        lines = Path(name).read_bytes().splitlines()
    return Inputs(_items_of_lines(name, lines, defaults), total=sum(map(bool, map(bytes.strip, lines))), single=False)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as exc:
        raise UnusableInputs(f"Cannot read {name} ({getattr(exc, 'strerror', None) or exc})") from exc


def _items_of_lines(name: str, lines: Iterable[bytes] | BinaryIO, defaults: Mapping[str, Any]) -> Iterator[Input]:
    """Yield the input of each line that is not empty, as it is read."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = read_fields(line)
        except MessageUnusable as exc:
            yield RefusedInput.of(MessageUnusable(f"Line {number} of {name}: {exc}"), {})
        else:
            yield _item_of_line(fields, defaults)


def _item_of_line(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> Input:
    """Return the input of a line, in which `~` stands for a home folder, as it does on the command line."""
    try:
        return _lasting_item({**fields, **_places(fields)}, defaults)
    except InvalidRequest as exc:
        return RefusedInput.of(exc, fields)


def _places(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the paths of a request with `~` expanded.

    Raises:
        InvalidRequest: a home folder is not known.
    """
    places = {}
    for name, expand in (("image_path", expanded_file), ("output_dir", expanded)):
        if isinstance(given := fields.get(name), str):
            try:
                places[name] = expand(given)
            except ValueError as exc:
                raise InvalidRequest(f"Invalid request: {name}: {exc} (got {shown(given)[:LONGEST_VALUE]!r})") from exc
    return places


def _item(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> Input:
    try:
        return parse_request(fields, defaults)
    except RequestError as exc:
        return RefusedInput.of(exc, fields)


def _lasting_item(fields: Mapping[str, Any], defaults: Mapping[str, Any], inside: str | None = None) -> Input:
    """Return the input of these fields. An absent id is replaced by one that is the same for every equal request."""
    item = _item(fields, defaults)
    if isinstance(item, RefusedInput) or fields.get("request_id") is not None:
        return item
    return with_lasting_id(item, inside)
