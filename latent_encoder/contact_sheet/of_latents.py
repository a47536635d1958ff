"""The contact sheet of latent files and of folders of them, in inspect mode."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from tqdm import tqdm

from config import Settings
from errors import LatentUnreadable, RequestError
from latent_encoder.contact_sheet.place import check_place
from latent_encoder.contact_sheet.sheet import ContactSheet
from latent_encoder.exits import EXIT_ERROR_RESPONSE, end_by_signal, stop_on_signals
from latent_encoder.inspection.copies import Reading, fetched_ahead, place_of_latents, storage_errors
from latent_encoder.outputs.names import SUFFIXES
from latent_encoder.storage.listing import listed
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.locations import shown as without_query
from latent_encoder.terminal import complain, printable


def run(settings: Settings, paths: Sequence[str], place: Path, *, as_json: bool, echo: Callable[[str], None]) -> int:
    """Write the contact sheet of latents, and report it by `echo` in one line.

    Returns:
        The exit status: 0 without problems, 1 if a latent or a file beside it has one, or the sheet cannot be written.

    Raises:
        SheetRefused: the sheet cannot be written to that place.
    """
    check_place(place, settings)
    sheet = ContactSheet(settings, place, lambda text: complain(f"Warning: {printable(text)}"))
    faulty = 0

    def cannot_read(exc: OSError) -> None:
        nonlocal faulty
        faulty += 1
        sheet.add_failure(str(exc.filename), "unreadable folder", exc.strerror or str(exc))

    reading = Reading.of(settings)
    latents = list(latents_in(paths, reading, cannot_read))
    sheet.expect(len(latents))
    done = 0
    with (
        _signals() as signals,
        closing(fetched_ahead(latents, reading)) as fetched,
        tqdm(fetched, total=len(latents), unit="latent", disable=None, leave=False) as bar,
    ):
        for copies in bar:
            if signals:
                copies.close()
                break
            inspection = sheet.add_latent(copies)
            done += 1
            faulty += inspection is None or bool(inspection.problems)
    left = len(latents) - done
    unfinished = f"Interrupted: {left} of {len(latents)} latents are not in this sheet." if left else None
    if not sheet.count and not signals:
        sheet.write()  # nothing; it removes the thumbnails
        complain(f"Error: No latents ({', '.join(SUFFIXES.values())}) in {printable(', '.join(paths))}.")
        return EXIT_ERROR_RESPONSE
    try:
        sheet.write(unfinished)
    except RequestError as exc:
        complain(f"Error: {printable(str(place))}: no contact sheet was written. {exc}")
        return EXIT_ERROR_RESPONSE
    echo(_report(place, done, faulty, as_json=as_json))
    if signals:
        complain(f"Error: Interrupted. {left} of {len(latents)} latents are left.")
        end_by_signal(signals[0])
    return EXIT_ERROR_RESPONSE if faulty else 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yield a list that gets the first SIGINT or SIGTERM inside. A second one ends the process."""
    signals: list[int] = []
    restore = stop_on_signals(signals.append, end_by_signal)
    try:
        yield signals
    finally:
        restore()


def latents_in(paths: Sequence[str], reading: Reading, cannot_read: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield the named files, and of each folder the latents in it and below, sorted; links to folders are not followed."""
    seen: set[Path] = set()
    for path in paths:
        for found in _named_by(path, reading, cannot_read):
            if found not in seen:
                seen.add(found)
                yield found


def _named_by(path: str, reading: Reading, cannot_read: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield the latents that a path or a URL stands for. A URL that does not end like a latent is a folder."""
    try:
        place = place_of_latents(path)
    except LatentUnreadable as exc:
        cannot_read(OSError(errno.EINVAL, str(exc), without_query(path)))
        return
    if isinstance(place, ObjectPath):
        is_file = place.key and place.suffix in SUFFIXES.values() and not path.endswith("/")
        yield from (place,) if is_file else _in_bucket(place, reading, cannot_read)
    else:
        yield from _in_folder(str(place), cannot_read) if place.is_dir() else (place,)


def _in_bucket(top: ObjectPath, reading: Reading, cannot_read: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield the latents in a folder of a bucket and below, in the order of the storage."""
    length = len(top.parts)
    try:
        with storage_errors(top):
            for found in listed(top, reading.urls, recursive=True):
                if found.key.endswith(tuple(SUFFIXES.values())):
                    latent = ObjectPath(f"{top.scheme}://{top.bucket}/{found.key}")
                    if not any(name.startswith(".") for name in latent.parts[length:-1]):
                        yield latent
    except OSError as exc:
        cannot_read(exc)


def _in_folder(top: str, cannot_read: Callable[[OSError], None]) -> Iterator[Path]:
    for folder, folders, files in os.walk(top, onerror=cannot_read):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(tuple(SUFFIXES.values())))


def _report(place: Path, latents: int, faulty: int, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"page": str(place), "latents": latents, "faulty": faulty})
    return f"{printable(str(place))}: {latents} latent{'' if latents == 1 else 's'}, {faulty or 'none'} with problems"
