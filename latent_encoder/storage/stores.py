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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from errors import SetupError, StorageFault, one_line
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.credentials import NoCredentials, Profile, mask_secrets
from latent_encoder.storage.locations import OBJECT_SCHEMES, ObjectPath
from latent_encoder.storage.retrying import Unavailable, nothing, repeated
from latent_encoder.storage.watching import CallFailed, Operation, received, sent, watched

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

PASSING_CODES = {"RequestTimeout", "OperationTimedOut"}
"""Codes of S3 and Azure, with one of these statuses, for a call that may succeed when it is repeated."""

AWAY = re.compile(r"status code: (429|502|503|504)|\bConnectError\(|\bkind: Connect\b|\bIncompleteMessage\b")
"""Signs in obstore's texts of a storage that is out of reach or overloaded, whichever object is asked for."""

CLOUDS = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
"""The beginnings of the variables of each storage."""

METADATA_SERVICE = re.compile(r"token request|//169\.254\.169\.254/|//169\.254\.170\.|//metadata\.google\.internal/")
"""Signs in obstore's texts that it looked for credentials in vain: it asks the machine's service last."""

PROVIDER = "External AWS credential provider: NoCredentials: "

NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestTimeTooSkewed", "InvalidAccessKeyId"}
WRONG_CREDENTIALS = {*EXPIRED, "InvalidToken", "SignatureDoesNotMatch", "AuthenticationFailed", "InvalidAuthenticationInfo"}
"""Codes of S3 and Azure for credentials that the service has to change. Those of EXPIRED cannot come from a request; a name
that the server encodes in another way may lead to the others."""

REFUSAL = re.compile(r"status code: 40[13]")

Version = Mapping[str, str | None]
"""The version of an object that a conditional write expects: its ETag, and its generation in Google Cloud Storage."""

R = TypeVar("R")


class NotThere(CallFailed):
    """There is no such object, or no such bucket."""

    outcome = "absent"


class NoBucket(NotThere):
    """There is no such bucket."""


class Refused(CallFailed):
    """The credentials are missing, wrong, or lack the permission."""

    outcome = "refused"


class WrongCredentials(Refused):
    """The storage does not know the credentials, or they have expired."""

    def __init__(self, reason: str, *, certain: bool) -> None:
        super().__init__(reason)
        self.certain = certain
        """No request can be the cause."""


class Away(Unavailable):
    """The storage is out of reach or overloaded."""


class Conflict(CallFailed):
    """The object has another version than a conditional write expects."""

    outcome = "conflict"


class Unusable(CallFailed):
    """The storage refuses the call for another reason."""

    outcome = "unusable"


@dataclass(frozen=True)
class Facts:
    """The facts about an object that one call gives."""

    size: int
    version: Version
    sha256: str | None
    """The checksum that its writer stated; None if the writer was another program."""


class Listed(NamedTuple):
    """An object of a listing."""

    name: str
    changed: datetime
    e_tag: str | None


@dataclass(frozen=True)
class Content:
    """An object that was read whole."""

    data: bytes
    facts: Facts


class TooLarge(CallFailed):
    """The object has more bytes than were asked for at most."""

    outcome = "too_large"

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
    proving: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """Held while one of them is found out, so that several threads do so once."""
    sightings: dict[str, tuple[str | None, float]] = field(default_factory=dict, repr=False, compare=False)
    """The claims that were seen, by their keys: the ETag of each, and the time since when it has had it."""

    def read(self, key: str, max_bytes: int | None = None) -> Content:
        """Return an object.

        Raises:
            TooLarge: it has more than `max_bytes`. The rest of it is not read.
        """
        return self._call("get", key, lambda: _whole(self.bucket.get(key), max_bytes))

    def facts(self, key: str) -> Facts:
        """Return the facts about an object, without its bytes."""
        return self._call("head", key, lambda: _facts(self.bucket.get(key, options={"head": True})))

    def beginning(self, key: str, size: int) -> bytes:
        """Return the first bytes of an object, at most `size`."""
        return self._call("get", key, lambda: bytes(self.bucket.get_range(key, start=0, length=size)))

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
            sent(len(data))
            return {**self.bucket.put(key, data, attributes=attributes, mode=mode, use_multipart=False)}  # type: ignore[dict-item]

        return self._call("put", key, call, before)

    def remove(self, key: str) -> None:
        """Remove an object if it exists."""
        with suppress(NotThere):
            self._call("delete", key, lambda: self.bucket.delete(key))

    def remove_once(self, key: str) -> None:
        """Remove an object, without a repetition that could come late."""
        with watched("delete", f"{self.place}/{key}"):
            _translated(lambda: self.bucket.delete(key))

    def names_from(self, folder: str, beginning: str) -> Iterator[Listed]:
        """Yield each object in a folder whose name begins so. One call is made."""
        start = f"{folder}/{beginning}" if folder else beginning

        def first_page() -> list[Any]:
            return list(next(iter(self.bucket.list(folder or None, offset=start, chunk_size=1000)), []))

        for found in self._call("list", start, first_page):
            if found["path"] < start:  # a server that does not know the offset, as Azurite
                continue
            if not found["path"].startswith(start):
                return
            yield Listed(found["path"].rpartition("/")[2], found["last_modified"], found["e_tag"])

    def _call(self, operation: Operation, key: str, call: Callable[[], R], before: Callable[[], None] = nothing) -> R:
        place = f"{self.place}/{key}"

        def attempt(repetition: int) -> R:
            with watched(operation, place, repetition):
                return _translated(call)

        return repeated(attempt, self.limits, place, before)


_stores: dict[tuple[str, str, AllowedUrls], Store] = {}
_opening = threading.Lock()


def store_of(place: ObjectPath, limits: AllowedUrls) -> Store:
    """Return the bucket of a place; it is opened once.

    Raises:
        SetupError: obstore is not installed.
        WrongCredentials: the environment lacks a setting or the credentials that it needs.
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
        common: dict[str, Any] = {"client_options": _client_options(place, limits), "retry_config": {"max_retries": 0}}
        if place.scheme == "s3":
            # One object is removed at a time, and some servers do not implement the call for many.
            return S3Store(place.bucket, disable_bulk_delete=True, **common, **_profile_options())
        return (GCSStore if place.scheme == "gs" else AzureStore)(place.bucket, **common)
    except NoCredentials as exc:
        raise WrongCredentials(str(exc), certain=True) from None
    except Exception as exc:
        raise WrongCredentials(_reason(exc), certain=True) from None


def _profile_options() -> dict[str, Any]:
    profile = Profile()
    options: dict[str, Any] = {"credential_provider": profile} if profile.is_used else {}
    return options | ({"region": region} if (region := profile.region) else {})


def _client_options(place: ObjectPath, limits: AllowedUrls) -> dict[str, Any]:
    """Return the options of the HTTP client. Given options replace those that obstore would take from the environment."""
    options: dict[str, Any] = {
        "timeout": f"{round(limits.timeout_s * 1000)}ms",
        "connect_timeout": f"{round(min(CONNECT_S, limits.timeout_s) * 1000)}ms",
    }
    if os.environ.get(f"{CLOUDS[place.scheme]}_ALLOW_HTTP", "").lower() in ("1", "true", "yes"):
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
        received(len(part))
        if max_bytes is not None and length > max_bytes:
            raise TooLarge(None)
    if length != facts.size:
        raise Unavailable(f"{length} of {facts.size} bytes came")
    return Content(b"".join(parts), facts)


def _facts(result: Any) -> Facts:
    meta = result.meta
    version = {"e_tag": meta["e_tag"], "version": meta["version"]}
    return Facts(meta["size"], version, result.attributes.get(SHA256))


def fault_of_storage(exc: BaseException | None, place: ObjectPath) -> StorageFault | None:
    """Return the fault of the storage itself that a failed call shows; None if the request may be at fault alone."""
    name = f"{place.scheme}://{place.bucket}"
    match exc:
        case WrongCredentials():
            return StorageFault(name, exc.certain)
        case Unavailable():
            return StorageFault(name, isinstance(exc, Away))
    return None


def _translated(call: Callable[[], R]) -> R:
    """Return the result of a call of obstore, whose errors become ours. Theirs quote the whole request over many lines."""
    from obstore import exceptions

    try:
        return call()
    except FileNotFoundError as exc:
        raise (NoBucket if _code(exc) in NO_BUCKET else NotThere)(_reason(exc)) from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as exc:
        raise _refused(exc) from None
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as exc:
        raise Conflict(_reason(exc)) from None
    except ValueError as exc:  # a name that obstore does not take
        raise Unusable(one_line(exc)) from None
    except exceptions.BaseError as exc:
        # For the errors of a listing, obstore has no classes.
        raise (_refused if REFUSAL.search(str(exc)) else _other_fault)(exc) from None


def _refused(exc: Exception) -> Refused:
    code, text = _code(exc), str(exc).partition("\n\nDebug source")[0]
    if PROVIDER in text:
        return WrongCredentials(text.partition(PROVIDER)[2], certain=True)
    if code in WRONG_CREDENTIALS or "status code: 401" in str(exc):
        return WrongCredentials(_reason(exc), certain=code in EXPIRED)
    return Refused(_reason(exc))


def _other_fault(exc: Exception) -> Exception:
    text, code, reason = str(exc), _code(exc), _reason(exc)
    if advice := _setting_at_fault(text, reason):
        return Unusable(advice)
    if METADATA_SERVICE.search(text):
        reason = f"the environment has no credentials, and the machine's metadata service gives none: {reason}"
        return WrongCredentials(reason, certain=True)
    if code in WRONG_CREDENTIALS:
        return WrongCredentials(reason, certain=code in EXPIRED)
    if code in NO_BUCKET or "status code: 404" in text:
        return NoBucket(reason)
    if PERMANENT.search(text) and code not in PASSING_CODES:
        return Unusable(reason)
    return (Away if AWAY.search(text) else Unavailable)(reason)


def _setting_at_fault(text: str, reason: str) -> str | None:
    if "builder error" in reason:
        return "the endpoint is not reached by TLS; AWS_ALLOW_HTTP=true allows that (GOOGLE_ALLOW_HTTP for gs://, AZURE_… for az://)"
    if "incorrectly configured region" in text:
        return "the bucket is in another region than AWS_REGION states"
    return None


def next_page(pages: Iterator[Any]) -> list[Any]:
    """Return the next page of a listing, an empty one at the end.

    Raises:
        NotThere: there is no such bucket.
        Refused, Unusable, Unavailable: the call failed.
    """
    from obstore.exceptions import InvalidPathError

    def page() -> list[Any]:
        try:
            return list(next(pages, ()))
        except InvalidPathError as exc:
            found = re.search(r'Path "(.*?)"(?: contained|: )', str(exc))
            name = found[1] if found else "(unknown)"
            raise Unusable(f"the object {name} has an empty name, '.' or '..' between its slashes; rename it") from None

    return _translated(page)


def _code(exc: BaseException) -> str | None:
    """Return the code of an error of S3 or Azure."""
    found = re.search(r"<Code>(\w+)</Code>", str(exc))
    return found[1] if found else None


def _reason(exc: BaseException) -> str:
    """Return the text of an error of obstore without its debug output, and with the storage's code in place of its XML."""
    text, code = str(exc).partition("\n\nDebug source")[0], _code(exc)
    if status := re.search(r"status code: (\d{3} [A-Za-z ]+)", text):
        return f"{status[1].strip()}{f', {code}' if code else ''}"
    if "IncompleteMessage" in str(exc):
        return "the server ended the connection without a response"
    if re.search(r"\bkind: Timeout\b|\bTimedOut\b", str(exc)):
        return "no complete response within the time-out"
    cause = re.search(r"(?:error trying to connect|tcp connect error|dns error)[^\n\"]*", str(exc))
    return one_line(Exception(cause[0] if cause else text.rpartition(" - ")[2] or text), limit=200)
