"""The names of the files of a run, by the pattern of `--name`: parsed, filled in, and checked before anything is encoded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from string import Formatter

from errors import AccessDenied, InvalidRequest, LatentEncoderError, in_utf8
from latent_encoder.access import ANYWHERE, AllowedFolders, place_of
from latent_encoder.outputs.names import OutputFiles, longest_name, part_limit, safe_id, safe_name, safe_stem
from latent_encoder.outputs.owners import Owner, owners_in
from latent_encoder.outputs.places import Folder, existing_place
from latent_encoder.outputs.run_requests import RunRequest, files_of, marked, source_of
from latent_encoder.outputs.stored_names import StoredNames
from latent_encoder.storage.locations import is_url, shown
from latent_encoder.suggestions import closest
from models import IMAGE_FILES, EncodeRequest

FIELDS = ("stem", "id", "index", "folder")
SUBFOLDERS = "{folder}/"
"""The beginning of a pattern that asks for sub-folders, as one without `{folder}` does."""

LONGEST_AROUND = len("latent_") + len(".safetensors.json")  # bytes around the name in the longest file name
MOST_DIGITS = re.compile(r"(0[1-9])?")  # the width of an index: `{index:04}`
NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f\x7f]")
DIFFERENT = "give them different names, for example with {id} or {index}"


class NameRefused(LatentEncoderError):
    """A pattern or a name that cannot be used; the text says why and names it."""


@dataclass(frozen=True)
class NamePattern:
    """The pattern of `--name`: the literal text before each field, and the field with its width; None behind the last."""

    parts: tuple[tuple[str, str | None, str], ...]

    @classmethod
    def of(cls, text: str) -> NamePattern:
        """Return the pattern that a text stands for.

        Raises:
            NameRefused: it has an unknown field, a path separator or a control character, or nothing in it.
        """
        text = text.removeprefix(SUBFOLDERS)
        try:
            parsed = [(literal, name, spec or "", conversion) for literal, name, spec, conversion in Formatter().parse(text)]
        except ValueError as exc:
            raise NameRefused(f"--name: {exc} in {text!r}; write {{{{ and }}}} for braces.") from exc
        for literal, name, spec, conversion in parsed:
            _check_literal(literal, text)
            if name is not None:
                _check_field(name, spec, conversion)
        if not text.strip():
            raise NameRefused("--name: the pattern is empty; {stem}_{id} is the usual one.")
        return cls(tuple((literal, name, spec) for literal, name, spec, _ in parsed))

    @property
    def is_flat(self) -> bool:
        """The folder is a part of the name, so all files lie in the output folder."""
        return any(name == "folder" for _, name, _ in self.parts)

    def filled(self, values: Mapping[str, str | int]) -> str:
        """Return the name with these values of the fields."""
        return "".join(literal + (format(values[name], spec) if name else "") for literal, name, spec in self.parts)


def _check_literal(literal: str, text: str) -> None:
    if found := NOT_IN_NAMES.search(literal):
        raise NameRefused(
            f"--name: {found[0]!r} in {text!r} cannot be in a name; {SUBFOLDERS} at the beginning makes sub-folders, and "
            "--output_dir names the folder."
        )
    if in_utf8(literal) != literal:
        raise NameRefused(f"--name: {in_utf8(text)!r} is not UTF-8, so no response can hold it.")


def _check_field(name: str, spec: str, conversion: str | None) -> None:
    if name not in FIELDS:
        meant = closest(name, FIELDS)
        hint = f"; did you mean {{{meant}}}?" if meant else ""
        raise NameRefused(f"--name: {{{name}}} is no field; there are {', '.join(f'{{{known}}}' for known in FIELDS)}{hint}")
    if conversion is not None or not MOST_DIGITS.fullmatch(spec) or (spec and name != "index"):
        raise NameRefused(f"--name: {{{name}}} takes no format, except {{index:04}} for leading zeros.")


@dataclass
class Names:
    """The names that the images of a run get, one after the other."""

    pattern: NamePattern
    allowed: AllowedFolders = ANYWHERE
    """The folders in which files of other requests are looked for."""
    stored: StoredNames | None = None
    """The names in the output folder, if it was listed."""
    _taken: dict[Path, tuple[str, str]] = field(default_factory=dict)
    """The scaled images so far, each with the request id and the image."""

    def named(self, request: EncodeRequest, index: int) -> RunRequest:
        """Return the request with the name of its files; it is number `index` of the run.

        Raises:
            NameRefused: the name cannot be used, or is that of another image's or another request's files.
            InvalidRequest: no response can hold it.
        """
        request = request if isinstance(request, RunRequest) else RunRequest(**request.model_dump())
        named = self._with_name(request, index)
        files = files_of(named)
        owner, image = self._taken.setdefault(files.scaled_image, (named.request_id, named.image_path))
        if (owner, source_of(image)) != (named.request_id, source_of(named.image_path)):
            raise NameRefused(f"{shown(image)} and {shown(named.image_path)} would both get {files.latent}; {DIFFERENT}.")
        return self._with_stored_id(named, files)

    def _with_name(self, request: RunRequest, index: int) -> RunRequest:
        below = PurePath(request.inside or "").parent
        flat = self.pattern.is_flat
        try:
            place = place_of(request.output_dir)
        except ValueError as exc:
            raise InvalidRequest(f"Invalid request: output_dir: {exc} (got {shown(request.output_dir)!r})") from None
        if not flat:
            place /= below
        folder = request.output_dir if flat else _below(request.output_dir, below)
        limit = part_limit(place)
        name = self.pattern.filled(
            {
                "stem": safe_stem(place, request.image_path),
                "id": safe_id(request.request_id, limit),
                "index": index,
                "folder": "_".join(safe_name(part, limit) for part in below.parts),
            }
        )
        if not name.strip():
            raise NameRefused(f"--name gives {shown(request.image_path)} an empty name; add {{stem}}.")
        if (length := len(name.encode()) + LONGEST_AROUND) > (longest := longest_name(place)):
            raise NameRefused(
                f"--name gives {shown(request.image_path)} a file name of {length} bytes, and {place} takes {longest}; "
                "choose a shorter one."
            )
        return request.model_copy(update={"output_name": name, "output_dir": folder})

    def _with_stored_id(self, request: RunRequest, files: OutputFiles) -> RunRequest:
        """Return the request with the id of its files, if there are some.

        Raises:
            NameRefused: they are not its own.
        """
        if self.stored is not None and self.stored.cover(files.folder) and not self.stored.have(files):
            return marked(request, self.stored)
        with suppress(OSError, AccessDenied), existing_place(files.folder, self.allowed) as folder:
            owners = owners_in(folder, files)
            if not owners:
                _refuse_files_of_nobody(folder, files)
            for owner in owners:
                if owner.source_id is not None and owner.source_id == request.source_id:
                    return request.with_id(owner.request_id or request.request_id)
                _refuse_another(request, owner, files, partial(_checksum, request.image_path))
        return request


def _below(folder: str, below: PurePath) -> str:
    """Return a folder below another one, which may be a URL."""
    return str(place_of(folder) / below) if is_url(folder) else str(Path(folder) / below)


def _refuse_another(request: RunRequest, owner: Owner, files: OutputFiles, image_sha256: Callable[[], str | None]) -> None:
    """Refuse files that belong to another request, or to an image at another place and of other content."""
    is_same = owner.request_id == request.request_id
    if is_same and (
        owner.source_id in (None, request.source_id) or not owner.has_other_image(request.source_id, image_sha256())
    ):
        return
    of_whom = f"of {owner.image_path}" if owner.image_path else f"of the request {owner.request_id}"
    raise NameRefused(
        f"{shown(request.image_path)} would get {files.latent}, which is there and belongs to another request, "
        f"{of_whom}; choose another --name or --output_dir, or move those files."
    )


def _refuse_files_of_nobody(folder: Folder, files: OutputFiles) -> None:
    """Refuse names of files that no metadata describe: they may be a person's."""
    names = (files.latent.name, *(getattr(files, name).name for name in IMAGE_FILES), *files.metadata_of_all_formats)
    for name in names:
        if folder.has(name):
            raise NameRefused(
                f"{files.folder / name} is there, and no metadata beside it say that the service wrote it; choose another "
                "--name or --output_dir, or move that file."
            )


def _checksum(path: str) -> str | None:
    if is_url(path) or not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
