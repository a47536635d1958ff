"""The buckets of object storage, by obstore, the Python face of Rust's object_store.

obstore is imported with the first URL. It takes its credentials, its endpoint and the like from the environment. Each call has
a time-out. The repetitions are ours, so that they are counted and logged, and so that a conditional write is repeated only by
code that knows how to read its outcome.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from errors import SetupError, one_line
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.credentials import mask_secrets, profile_options
from latent_encoder.storage.locations import OBJECT_SCHEMES, ObjectPath
from latent_encoder.storage.retrying import Unavailable, nothing, repeated

if TYPE_CHECKING:
    from obstore.store import ObjectStore

CHUNK_BYTES = 1 << 20
"""Bytes of a body that are read at a time. An image has some megabytes; a larger one is refused without the rest of it."""

CONNECT_S = 10.0
"""Longest wait for a connection, in seconds. A server that is there accepts one within a round trip."""

SHA256 = "sha256"
"""The key, in the metadata of an object, of its checksum. It is written in one step with the object's bytes."""

PERMANENT = re.compile(r"status code: (4(?!08|09|25|29)\d\d|501)")
"""Statuses in obstore's texts that a repetition does not change. A 409 of S3 means that another write is in progress."""

Version = Mapping[str, str | None]
"""The version of an object that a conditional write expects: its ETag, and its generation in Google Cloud Storage."""

R = TypeVar("R")


class NotThere(Exception):
    """There is no such object, or no such bucket."""


class Refused(Exception):
    """The credentials are missing, wrong, or lack the permission."""


class Conflict(Exception):
    """The object has another version than a conditional write expects."""


class Unusable(Exception):
    """The storage refuses the call for another reason."""


@dataclass(frozen=True)
class Facts:
    """The facts about an object that one call gives."""

    size: int
    version: Version
    sha256: str | None
    """The checksum that its writer stated; None if the writer was another program."""


@dataclass(frozen=True)
class Content:
    """An object that was read whole."""

    data: bytes
    facts: Facts


class TooLarge(Exception):
    """The object has more bytes than were asked for at most."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size


@dataclass
class Store:
    """One bucket. Each method may be called from any thread.

    Raises, in each method:
        NotThere, Refused, Conflict, Unusable, Unavailable: the call failed, also when it was repeated.
    """

    place: ObjectPath
    limits: AllowedUrls
    bucket: ObjectStore
    proved: set[str] = field(default_factory=set)
    """Facts about the server that were found out by trying."""

    def read(self, key: str, max_bytes: int | None = None) -> Content:
        """Return an object.

        Raises:
            TooLarge: it has more than `max_bytes`. The rest of it is not read.
        """
        return self._call(key, lambda: _whole(self.bucket.get(key), max_bytes))

    def facts(self, key: str) -> Facts:
        """Return the facts about an object, without its bytes."""
        return self._call(key, lambda: _facts(self.bucket.get(key, options={"head": True})))

    def beginning(self, key: str, size: int) -> bytes:
        """Return the first bytes of an object, at most `size`."""
        return self._call(key, lambda: bytes(self.bucket.get_range(key, start=0, length=size)))

    def put(
        self, key: str, data: bytes, sha256: str, expected: Version | None, before: Callable[[], None] = nothing
    ) -> Version:
        """Write an object in one step, if it has the `expected` version; None stands for no object at all.

        `before` is called before a repetition, which raises Conflict if it finds the object that the first
        attempt wrote.
        """
        mode: Any = "create" if expected is None else {name: value for name, value in expected.items() if value is not None}
        attributes = {SHA256: sha256}

        def call() -> Version:
            return {**self.bucket.put(key, data, attributes=attributes, mode=mode, use_multipart=False)}  # type: ignore[dict-item]

        return self._call(key, call, before)

    def remove(self, key: str) -> None:
        """Remove an object if it exists."""
        with suppress(NotThere):
            self._call(key, lambda: self.bucket.delete(key))

    def remove_once(self, key: str) -> None:
        """Remove an object, without a repetition that could come late."""
        _translated(lambda: self.bucket.delete(key))

    def names_from(self, folder: str, beginning: str) -> Iterator[tuple[str, datetime]]:
        """Yield the name of each object in a folder that begins so, with the time of its last change. One call is made."""
        start = f"{folder}/{beginning}" if folder else beginning

        def first_page() -> list[Any]:
            return list(next(iter(self.bucket.list(folder or None, offset=start, chunk_size=1000)), []))

        for found in self._call(start, first_page):
            if not found["path"].startswith(start):
                return
            yield found["path"].rpartition("/")[2], found["last_modified"]

    def _call(self, key: str, call: Callable[[], R], before: Callable[[], None] = nothing) -> R:
        return repeated(lambda: _translated(call), self.limits, f"{self.place}/{key}", before)


_stores: dict[tuple[str, str, AllowedUrls], Store] = {}
_opening = threading.Lock()


def store_of(place: ObjectPath, limits: AllowedUrls) -> Store:
    """Return the bucket of a place; it is opened once.

    Raises:
        SetupError: obstore is not installed.
        Unusable: the environment lacks a setting that it needs.
    """
    key = (place.scheme, place.bucket, limits)
    with _opening:
        if key not in _stores:
            root = ObjectPath(f"{place.scheme}://{place.bucket}")
            _stores[key] = Store(root, limits, _opened(root, limits))
        return _stores[key]


def require_packages_for(*places: str) -> None:
    """Raise SetupError if one of the places is a URL of object storage, and obstore is not installed."""
    if any(place.lower().startswith(tuple(f"{scheme}://" for scheme in OBJECT_SCHEMES)) for place in places):
        require_obstore()


def require_obstore() -> None:
    """Raise SetupError if obstore is not installed."""
    try:
        import obstore  # noqa: F401
    except ImportError as exc:
        raise SetupError(
            f"Object storage needs the package obstore ({one_line(exc)}); install it: ./setup_comfyui.sh --object-storage"
        ) from exc


def _opened(place: ObjectPath, limits: AllowedUrls) -> ObjectStore:
    require_obstore()
    from obstore.store import AzureStore, GCSStore, S3Store

    mask_secrets()
    try:
        common: dict[str, Any] = {"client_options": _client_options(limits), "retry_config": {"max_retries": 0}}
        if place.scheme == "s3":
            # One object is removed at a time, and some servers do not implement the call for many.
            return S3Store(place.bucket, disable_bulk_delete=True, **common, **cast(dict[str, Any], profile_options()))
        return (GCSStore if place.scheme == "gs" else AzureStore)(place.bucket, **common)
    except Exception as exc:
        raise Unusable(_reason(exc)) from None


def _client_options(limits: AllowedUrls) -> dict[str, Any]:
    """Return the options of the HTTP client. Given options replace those that obstore would take from the environment."""
    options: dict[str, Any] = {
        "timeout": f"{round(limits.timeout_s * 1000)}ms",
        "connect_timeout": f"{round(min(CONNECT_S, limits.timeout_s) * 1000)}ms",
    }
    if any(os.environ.get(f"{cloud}_ALLOW_HTTP", "").lower() in ("1", "true", "yes") for cloud in ("AWS", "GOOGLE", "AZURE")):
        options["allow_http"] = True
    if authorities := os.environ.get("AWS_CA_BUNDLE"):
        options["root_certificate"] = Path(authorities).read_bytes()
    return options


def _whole(result: Any, max_bytes: int | None) -> Content:
    facts = _facts(result)
    if max_bytes is not None and facts.size > max_bytes:
        raise TooLarge(facts.size)
    parts, length = [], 0
    for part in result.stream(min_chunk_size=CHUNK_BYTES):
        parts.append(bytes(part))
        length += len(part)
        if max_bytes is not None and length > max_bytes:
            raise TooLarge(None)
    if length != facts.size:
        raise Unavailable(f"{length} of {facts.size} bytes came")
    return Content(b"".join(parts), facts)


def _facts(result: Any) -> Facts:
    meta = result.meta
    version = {"e_tag": meta["e_tag"], "version": meta["version"]}
    return Facts(meta["size"], version, result.attributes.get(SHA256))


def _translated(call: Callable[[], R]) -> R:
    """Return the result of a call of obstore, whose errors become ours. Theirs quote the whole request over many lines."""
    from obstore import exceptions

    try:
        return call()
    except FileNotFoundError as exc:
        raise NotThere(_reason(exc)) from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as exc:
        raise Refused(_reason(exc)) from None
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as exc:
        raise Conflict(_reason(exc)) from None
    except ValueError as exc:  # a name that obstore does not take
        raise Unusable(one_line(exc)) from None
    except exceptions.BaseError as exc:
        reason = _reason(exc)
        if "builder error" in reason:
            raise Unusable("the endpoint is not reached by TLS; AWS_ALLOW_HTTP=true allows that") from None
        raise (Unusable if PERMANENT.search(str(exc)) else Unavailable)(reason) from None


def next_page(pages: Iterator[Any]) -> list[Any]:
    """Return the next page of a listing, an empty one at the end. obstore has no classes for the errors of this call.

    Raises:
        NotThere: there is no such bucket.
        Refused, Unusable, Unavailable: the call failed.
    """
    from obstore.exceptions import BaseError, InvalidPathError

    try:
        return list(next(pages, ()))
    except InvalidPathError as exc:
        found = re.search(r'Path "(.*?)"(?: contained|: )', str(exc))
        raise Unusable(
            f"the object {found[1] if found else '(unknown)'} has an empty name, '.' or '..' between its slashes; rename it"
        ) from None
    except BaseError as exc:
        status = re.search(r"status code: (\d{3})", str(exc))
        if status and status[1] in ("401", "403"):
            raise Refused(_reason(exc)) from None
        if status and status[1] == "404":
            raise NotThere(_reason(exc)) from None
        return _translated(partial(_raise, exc))


def _raise(exc: BaseException) -> NoReturn:
    raise exc


def _reason(exc: BaseException) -> str:
    """Return the text of an error of obstore without its debug output, and with the code of S3 in place of its XML."""
    text = str(exc).partition("\n\nDebug source")[0]
    code = re.search(r"<Code>(\w+)</Code>", text)
    status = re.search(r"status code: (\d{3} [A-Za-z ]+)", text)
    if status:
        return f"{status[1].strip()}{f', {code[1]}' if code else ''}"
    cause = re.search(r"(?:error trying to connect|tcp connect error|dns error|operation timed out)[^\n\"]*", str(exc))
    return one_line(Exception(cause[0] if cause else text.rpartition(" - ")[2] or text), limit=200)
