"""The names of a request's files: one name for one pair of image stem and request id."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from errors import InvalidRequest, in_utf8
from latent_encoder.access import place_of
from latent_encoder.outputs.folder import reported
from latent_encoder.storage.locations import LONGEST_NAME, ObjectPath, stem_of
from latent_encoder.storage.locations import shown as without_query
from models import IMAGE_FILES, FileFormat

SUFFIXES: dict[FileFormat, str] = {"pt": ".pt", "safetensors": ".safetensors", "comfy": ".latent"}
"""The ending of a latent's file in each format."""

LATENT_NAME = re.compile(rf"latent_.+(?:{'|'.join(map(re.escape, SUFFIXES.values()))})", re.DOTALL)
"""The name of a latent's file."""

LONGEST_FRAME = len("latent_") + len("_") + len(".safetensors.json")  # bytes around stem and request id in the longest name

STEM_DIGITS = 8  # hexadecimal digits of a stem's checksum: two stems that share it still differ by their request ids
ID_DIGITS = 16  # of a request id's checksum; with 8, two of 100,000 ids would probably share it, and the second were refused

ENDS_LIKE_CHECKSUM = re.compile(rf"-[0-9a-f]{{{ID_DIGITS}}}\Z")  # no UUID does: its last group has 12 digits


@dataclass(frozen=True)
class OutputFiles:
    """Absolute paths of the files of one request, all in one folder."""

    latent: Path
    scaled_image: Path
    metadata: Path
    preview: Path
    roundtrip: Path

    @property
    def folder(self) -> Path:
        return self.latent.parent

    @property
    def shared_name(self) -> str:
        """Name of the file that the request has in every format of its latent."""
        return self.scaled_image.name

    @property
    def metadata_of_all_formats(self) -> tuple[str, ...]:
        """Names of the metadata files of the request in each format of its latent; the formats share the images."""
        return tuple(f"{self.latent.stem}{suffix}.json" for suffix in SUFFIXES.values())

    @classmethod
    def of(cls, latent: Path) -> OutputFiles:
        """Return the paths of all files of a request by its latent's path: `latent_X.pt` has `preview_X.png`."""
        unique = latent.stem.removeprefix("latent_")
        images = {name: latent.with_name(f"{name}_{unique}.png") for name in IMAGE_FILES}
        return cls(latent=latent, metadata=latent.with_name(f"{latent.name}.json"), **images)


def output_files(
    output_dir: str, image_path: str, request_id: str, latent_format: FileFormat = "pt", name: str | None = None
) -> OutputFiles:
    """Return the paths of a request's files: `latent_<stem>_<request_id>.pt`, with the suffix of the format, and the others.

    `stem` is the name of the image file without its suffix, made safe by `safe_name`; `safe_id` makes the request id safe.
    Another `name` may stand in the place of both.

    Raises:
        InvalidRequest: the URL names no folder; or the folder is relative, and the working folder has a name that no response
            can hold.
    """
    try:
        folder = place_of(output_dir)
    except ValueError as exc:
        raise InvalidRequest(f"Invalid request: output_dir: {exc} (got {without_query(output_dir)[:200]!r})") from None
    if (shown := in_utf8(str(folder))) != str(folder):
        raise InvalidRequest(
            f"Invalid request: output_dir: its absolute path is not UTF-8, so no response can hold it (got {shown}); "
            "give an absolute path, or start the service in another folder"
        )
    return OutputFiles.of(folder / f"latent_{name or usual_name(folder, image_path, request_id)}{SUFFIXES[latent_format]}")


def usual_name(folder: Path, image_path: str, request_id: str) -> str:
    """Return the part that the names of a request's files have in common, if nothing else is asked for."""
    return f"{safe_stem(folder, image_path)}_{safe_id(request_id, part_limit(folder))}"


def safe_stem(folder: Path, image_path: str) -> str:
    """Return the name of an image without its suffix, as a part of names in that folder."""
    return safe_name(stem_of(image_path), part_limit(folder))


def part_limit(folder: Path) -> int:
    """Return the most characters that stem and id may each have in the names of files in a folder."""
    return (longest_name(folder) - LONGEST_FRAME) // 2


def safe_name(text: str, limit: int) -> str:
    """Return `text` as a part of a file name: ASCII letters, digits, `.`, `_` and `-`, at most `limit` (10 or more).

    If a character had to be replaced or cut off, 8 hexadecimal digits of the text's SHA-256 end the name. Without them `a/b`
    and `a b` would give the same name.
    """
    safe = _safe_characters(text)
    return text if safe == text and len(text) <= limit else _with_checksum(safe, text, limit, STEM_DIGITS)


def safe_id(request_id: str, limit: int) -> str:
    """Return a request id as the last part of a file name, at most `limit` characters (18 or more).

    An id that is safe and has no `_` stays, as each UUID does: it is the text after the last `_` of the name. Any other id
    ends in 16 hexadecimal digits of its SHA-256. For example, `a_b` after `photo` would give the name of `b` after `photo_a`.
    An id that ends like such a checksum gets one too.
    """
    safe = _safe_characters(request_id)
    stays = safe == request_id and len(safe) <= limit and "_" not in safe and not ENDS_LIKE_CHECKSUM.search(safe)
    return safe if stays else _with_checksum(safe, request_id, limit, ID_DIGITS)


def _safe_characters(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)


def _with_checksum(safe: str, text: str, limit: int, digits: int) -> str:
    checksum = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:digits]
    return f"{safe[: limit - digits - 1]}-{checksum}"


def longest_name(folder: Path) -> int:
    """Return the longest file name, in bytes, that the file system of the folder takes. The folder need not exist yet."""
    if isinstance(folder, ObjectPath):
        return LONGEST_NAME
    with reported(folder):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        return os.pathconf(existing, "PC_NAME_MAX")
