"""The inputs of a standalone run: requests made of paths, folders, patterns and lists."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from glob import has_magic
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, BinaryIO

from errors import InvalidRequest, LatentEncoderError, MessageUnusable, RequestError
from latent_encoder.access import ANYWHERE, AllowedFolders, place_of
from latent_encoder.outputs.run_requests import RunRequest, marked, with_lasting_id
from latent_encoder.outputs.stored_names import StoredNames, names_in
from latent_encoder.requests import LONGEST_VALUE, parse_request, read_fields, request_id_of, usable_text
from latent_encoder.standalone.bucket_folders import BucketFolder, FolderRefused, is_folder, with_slash
from latent_encoder.standalone.folders import LeftOut, Walk, shown_counts
from latent_encoder.standalone.naming import NamePattern, NameRefused, Names
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.images import read_from_url
from latent_encoder.storage.locations import ObjectPath, is_url, shown
from latent_encoder.storage.packed import NameDigests
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

LONGEST_LIST = 1 << 30
"""Bytes of a list that is read by its URL, 1 GiB: some millions of requests."""

ANY_IMAGE = AllowedFolders("", urls=AllowedUrls("image_path"))


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

    def with_folders_marked(self, inputs: AllowedFolders) -> ImageSelection:
        """Return the selection with `/` at the end of each URL that stands for a folder in a bucket, which is looked up.

        Raises:
            UnusableInputs: it cannot be looked up.
            AccessDenied, InvalidRequest: a URL is not allowed, or names no place.
        """
        try:
            return replace(self, paths=tuple(with_slash(path, IMAGE_SUFFIXES, inputs.urls) for path in self.paths))
        except FolderRefused as exc:
            raise UnusableInputs(str(exc)) from exc

    @property
    def folders_in_buckets(self) -> tuple[str, ...]:
        """The URLs that stand for folders."""
        return tuple(path for path in self.paths if is_folder(path))

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
    listed: Iterable[tuple[str, str | None]] = ()
    """The images that were found in buckets and on disk, each with its path below its folder, if there is a bucket."""

    @property
    def known_images(self) -> Iterator[str]:
        """The images, as far as they are known before the run."""
        if isinstance(self.items, list):
            return (item.image_path or "" for item in self.items)
        return (path for path, _ in self.listed)


@dataclass(frozen=True)
class Made(Iterable[Input]):
    """Inputs that are made when they are needed, so that a hundred thousand of them take no memory."""

    source: Iterable[Any]
    make: Callable[[Iterable[Any]], Iterator[Input]]

    def __iter__(self) -> Iterator[Input]:
        return self.make(self.source)


def inputs_of(
    selection: ImageSelection,
    fields: Mapping[str, Any],
    defaults: Mapping[str, Any],
    outputs: AllowedFolders = ANYWHERE,
    images: AllowedFolders = ANY_IMAGE,
) -> Inputs:
    """Return the inputs that the command line selects.

    A request without an id gets one made of its fields, so that a repeated run finds the files of the first.

    Args:
        selection: the command line's choice of images.
        fields: the request's fields that the command line gives; None for each that it leaves out.
        defaults: the settings' values for fields that are left out.
        outputs: the folders that files may be written to.
        images: the folders that images may be read from.

    Raises:
        UnusableInputs: a folder or a pattern holds no image, the list cannot be read, a request id is given for several, or
            the names of the output files cannot be used.
    """
    inputs = _selected(selection, fields, defaults, images)
    stored = _stored_names(selection, inputs, fields.get("output_dir") or defaults.get("output_dir"), outputs)
    if selection.name is None:
        return inputs if stored is None else replace(inputs, items=_marked(inputs.items, stored))
    try:
        names = Names(NamePattern.of(selection.name), outputs, stored)
        return replace(inputs, items=_named(inputs.items, names, at_once=selection.input_list != STDIN))
    except NameRefused as exc:
        raise UnusableInputs(str(exc)) from exc


def _stored_names(
    selection: ImageSelection, inputs: Inputs, output_dir: str | None, outputs: AllowedFolders
) -> StoredNames | None:
    """List the output folder if it is in a bucket and the run has several images; by one call for an image at most."""
    if output_dir is None or not is_url(output_dir) or inputs.single or not inputs.total:
        return None
    try:
        place = place_of(output_dir)
    except ValueError:
        return None  # the requests are refused
    if not isinstance(place, ObjectPath) or not outputs.urls.allows(place):
        return None
    return names_in(place, outputs, inputs.total, deep=selection.name is not None)


def _marked(items: Iterable[Input], names: StoredNames) -> Iterable[Input]:
    """Return the inputs, those without files from before marked."""

    def mark(items: Iterable[Input]) -> Iterator[Input]:
        return (marked(item, names) if isinstance(item, RunRequest) else item for item in items)

    return list(mark(items)) if isinstance(items, list) else Made(items, mark)


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


def _selected(
    selection: ImageSelection, fields: Mapping[str, Any], defaults: Mapping[str, Any], images: AllowedFolders
) -> Inputs:
    defaults = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
    if len(selection.paths) == 1 and not _stands_for_several(selection.paths[0]):
        return Inputs([_lasting_item({**fields, "image_path": selection.paths[0]}, defaults)], total=1, single=True)
    refuse_shared_id(selection, fields)
    if selection.input_list is not None:
        return _of_list(selection.input_list, defaults, images)
    walk = Walk(IMAGE_SUFFIXES, recursive=selection.recursive)
    if selection.folders_in_buckets:
        return _of_buckets(
            selection, walk, images, lambda path, inside: _lasting_item({**fields, "image_path": path}, defaults, inside)
        )
    found = find_images(selection.paths, walk)
    items = list(_with_rivals_marked(_lasting_item({**fields, "image_path": path}, defaults, found[path]) for path in found))
    return Inputs(items, total=len(items), single=False, left_out=walk.counts, unreadable=walk.unreadable)


def _of_buckets(
    selection: ImageSelection, walk: Walk, images: AllowedFolders, make: Callable[[str, str | None], Input]
) -> Inputs:
    """Return the images in folders of buckets, and those of the other paths beside them."""
    found: list[Collection[tuple[str, str | None]]] = []
    taken, left_out = NameDigests(), Counter[str]()
    for path in selection.paths:
        if not is_folder(path):
            found.append([each for each in _images_of(path, walk).items() if _is_new(each[0], taken, left_out)])
            continue
        try:
            folder = BucketFolder(path, IMAGE_SUFFIXES, images.urls, recursive=selection.recursive)
            inside = folder.images()
        except FolderRefused as exc:
            raise UnusableInputs(str(exc)) from exc
        left_out.update(folder.left_out)
        found.append(inside if len(selection.paths) == 1 else inside.only(lambda url: _is_new(url, taken, left_out)))
    left_out.update(walk.counts)
    listed = Listed(found)

    def items(listed: Iterable[tuple[str, str | None]]) -> Iterator[Input]:
        made = (make(path, inside) for path, inside in listed)
        return _with_rivals_marked(made) if len(found) > 1 else made

    total = sum(map(len, found))
    return Inputs(Made(listed, items), total, single=False, left_out=left_out, unreadable=walk.unreadable, listed=listed)


@dataclass(frozen=True)
class Listed(Iterable[tuple[str, str | None]]):
    """The images of several places, one place after the other."""

    places: Sequence[Collection[tuple[str, str | None]]]

    def __iter__(self) -> Iterator[tuple[str, str | None]]:
        return chain.from_iterable(self.places)


def _is_new(url: str, taken: NameDigests, left_out: Counter[str]) -> bool:
    """Return whether an image in a bucket is taken for the first time. Files on disk were compared before."""
    if not is_url(url):
        return True
    if url in taken:
        left_out[LeftOut.SEEN] += 1
        return False
    taken.add(url)
    return True


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
        found |= _images_of(path, walk)
    if not found:
        raise UnusableInputs(f"Cannot read {'; '.join(f'{path} ({reason})' for path, reason in walk.unreadable.items())}")
    return found


def _images_of(path: str, walk: Walk) -> dict[str, str | None]:
    """Return the files that one path stands for.

    Raises:
        UnusableInputs: a folder or a pattern holds no image.
    """
    if not _stands_for_several(path):
        return dict.fromkeys([path] if is_url(path) or walk.take(Path(path)) else [])
    before = walk.counts
    images = walk.images_in(Path(path)) if Path(path).is_dir() else walk.matching(path)
    if not images and str(Path(path)) not in walk.unreadable:
        raise UnusableInputs(_nothing_in(path, walk, before))
    root = _root_of(path)
    return {str(image): str(image.relative_to(root)) for image in sorted(filter(walk.take, images))}


def _root_of(path: str) -> Path:
    """Return the folder that a path stands for; of a pattern, the part before its first magic character."""
    place = Path(path)
    return place if place.is_dir() else Path(*takewhile(lambda part: not has_magic(part), place.parts))


def _with_rivals_marked(items: Iterable[Input]) -> Iterator[Input]:
    """Mark each image that has the id of one before it, because both have the same path below two folders."""
    seen = NameDigests()
    for item in items:
        rival = isinstance(item, RunRequest) and item.request_id in seen
        yield item.model_copy(update={"contested": True}) if isinstance(item, RunRequest) and rival else item
        if isinstance(item, EncodeRequest):
            seen.add(item.request_id)


def _stands_for_several(path: str) -> bool:
    """Return whether the path is a folder or a pattern. A file whose name looks like a pattern is that file: `[1].png`."""
    if is_url(path):
        return is_folder(path)
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


def _of_list(name: str, defaults: Mapping[str, Any], images: AllowedFolders) -> Inputs:
    with _readable(name):
        if name == STDIN:
            return Inputs(_items_of_lines("standard input", sys.stdin.buffer, defaults), total=None, single=False)
        lines = (read_from_url(name, images.urls, LONGEST_LIST) if is_url(name) else Path(name).read_bytes()).splitlines()
    return Inputs(_items_of_lines(shown(name), lines, defaults), total=sum(map(bool, map(bytes.strip, lines))), single=False)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except RequestError as exc:
        raise UnusableInputs(f"Cannot read the list. {exc}") from exc
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
