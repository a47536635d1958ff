"""The files of a latent on this machine: the files themselves, or copies of objects in a bucket."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from config import Settings
from errors import LatentUnreadable
from latent_encoder.outputs.names import SUFFIXES, OutputFiles
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import ObjectPath, WebUrl, is_url, location_of, path_of_file_url
from latent_encoder.storage.locations import shown as without_query
from latent_encoder.storage.retrying import Unavailable
from latent_encoder.storage.stores import NoBucket, NotThere, Refused, TooLarge, Unusable, store_of
from models import Metadata

AHEAD = 8
"""Latents that are fetched while an earlier one is shown, each in a thread. Their four calls take 0.2 s at 50 ms each, and the
thumbnails of a latent 0.03 s or more, so eight suffice."""

FETCHING = ThreadPoolExecutor(max_workers=AHEAD, thread_name_prefix="fetch")
"""Threads are made when they are needed: none for local files."""


@dataclass(frozen=True)
class Reading:
    """The limits on files that are only looked at. Every URL may be read: the person at the command line decides."""

    urls: AllowedUrls
    most_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        urls = replace(AllowedUrls.of_inputs(settings), prefixes=None)
        return cls(urls, 2 * settings.max_image_bytes)  # a preview has two images beside each other


class Copies:
    """The files of one latent. An object is fetched once, when it is first asked for, and its copy removed by `close`."""

    def __init__(self, latent: Path, reading: Reading) -> None:
        self.files = OutputFiles.of(latent)
        self._reading = reading
        self._found: dict[Path, Path | OSError] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._ahead: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def is_ready(self) -> bool:
        """Nothing is being fetched at the moment."""
        return self._ahead is None or self._ahead.done()

    def here(self, place: Path) -> Path:
        """Return the file on this machine with the content of that place.

        Raises:
            OSError: the object cannot be fetched; its `strerror` has the reason.
        """
        if not isinstance(place, ObjectPath):
            return place
        if self._ahead is not None:
            self._ahead.result()
        return self._fetched(place)

    def fetch_ahead(self) -> None:
        """Begin to fetch the objects that an inspection needs: the latent, its metadata, and the files that these name."""
        if isinstance(self.files.latent, ObjectPath) and self.files.latent.suffix in SUFFIXES.values():
            self._ahead = FETCHING.submit(self._fetch)

    def close(self) -> None:
        """Remove the copies."""
        if self._ahead is not None and not self._ahead.cancel():
            self._ahead.result()
        if self._folder is not None:
            self._folder.cleanup()

    def _fetch(self) -> None:
        try:
            self._fetched(self.files.latent)
            metadata = Metadata.model_validate_json(self._fetched(self.files.metadata).read_bytes())
            for name in metadata.sha256_by_file:
                self._fetched(getattr(self.files, name))
        except (OSError, ValidationError):
            return  # found again by the inspection, which reports it

    def _fetched(self, place: Path) -> Path:
        if place not in self._found:
            try:
                self._found[place] = self._copied(place)
            except OSError as exc:
                self._found[place] = exc
        found = self._found[place]
        if isinstance(found, OSError):
            raise found
        return found

    def _copied(self, place: Path) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="latent-encoder-inspect-")
        # The name of an object may be too long for a file.
        copy = Path(self._folder.name, f"{len(self._found)}{place.suffix}")
        with storage_errors(place):
            assert isinstance(place, ObjectPath)
            copy.write_bytes(store_of(place, self._reading.urls).read(place.key, self._reading.most_bytes).data)
        return copy


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn a fault of the storage inside into the OSError that a file on disk would give, with the reason as its text."""
    try:
        yield
    except NotThere as exc:
        reason = "the bucket does not exist" if isinstance(exc, NoBucket) else os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, reason, str(place)) from None
    except Refused as exc:
        raise PermissionError(errno.EACCES, f"the storage refuses to read it: {exc}", str(place)) from None
    except TooLarge:
        raise OSError(errno.EFBIG, "it has more bytes than twice MAX_IMAGE_BYTES", str(place)) from None
    except Unusable as exc:
        raise OSError(errno.EINVAL, str(exc), str(place)) from None
    except Unavailable as exc:
        raise OSError(errno.EIO, f"the storage cannot be reached: {exc}", str(place)) from None


def place_of_latents(text: str) -> Path:
    """Return the place of a latent, or of a folder of latents, that a path or a URL names.

    Raises:
        LatentUnreadable: the URL names none.
    """
    try:
        path = path_of_file_url(text)
        place: Path | WebUrl = location_of(path) if is_url(path) else Path(path)
        if isinstance(place, WebUrl):
            raise ValueError("must be of object storage, not of a web server; download the latent and its JSON first")  # noqa: TRY004
    except ValueError as exc:
        raise LatentUnreadable(f"Cannot read {without_query(text)} as a latent: the URL {exc}.") from None
    return place


def fetched_ahead(latents: Iterable[Path], reading: Reading) -> Generator[Copies]:
    """Yield the files of each latent, in order, while those of the next ones are fetched. Close each after its use."""
    waiting: list[Copies] = []
    try:
        for latent in latents:
            waiting.append(Copies(latent, reading))
            waiting[-1].fetch_ahead()
            if len(waiting) > AHEAD:
                yield waiting.pop(0)
        while waiting:
            yield waiting.pop(0)
    finally:
        for copies in waiting:
            copies.close()
