"""Checks of OUTPUT_DIR and of the allowed URLs: credentials, reach, clock, and the calls that the service makes there."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from urllib.request import getproxies, proxy_bypass

from config import Settings
from errors import AccessDenied, ImageInvalid, ImageNotFound, SetupError, one_line
from latent_encoder.doctor.bucket import Tried, check_reading, check_writing, left_over
from latent_encoder.doctor.check import Check, Installation, cross, cross_of, tick
from latent_encoder.doctor.server import NotReached, Reached, clock_check, reach, within
from latent_encoder.doctor.storage_accounts import MACHINE, missing_variable, server_of, source_of_credentials
from latent_encoder.masking import masked
from latent_encoder.storage import web
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.credentials import mask_secrets
from latent_encoder.storage.listing import Listed, listed
from latent_encoder.storage.locations import ObjectPath, WebUrl, is_url, location_of
from latent_encoder.storage.locations import shown as without_query
from latent_encoder.storage.retrying import Unavailable
from latent_encoder.storage.stores import (
    NotThere,
    Refused,
    TooLarge,
    Unusable,
    WrongCredentials,
    require_obstore,
    store_of,
)

CALL_S = 10.0
"""Longest time of a call, in seconds, unless STORAGE_TIMEOUT_S is shorter. A server that takes longer is no use to workers."""

CALLS = 6
"""Calls that may take so long before the examination of a place is given up. The first one that does ends it."""

AT_ONCE = 8
"""Places that are examined at a time. With it, twenty unreachable ones take a minute."""

WEB_BYTES = 1 << 20
"""Bytes that are read of a web server's response, which is thrown away: an image has some megabytes, a page less than one."""

NETWORK = "Check the URL, the endpoint, the network and the server's own state, and run the doctor again."


@dataclass(frozen=True)
class Place:
    """A URL in the settings."""

    url: str
    setting: str
    writes: bool

    @property
    def shown(self) -> str:
        return f"{masked(self.url)} ({self.setting})"


def check_storage(installation: Installation) -> Iterator[Check]:
    """Check each URL in OUTPUT_DIR, ALLOWED_OUTPUT_URLS and ALLOWED_INPUT_URLS. Without one there is no check."""
    places = list(_places(installation.settings))
    buckets = [place for place in places if isinstance(location_of(place.url), ObjectPath)]
    if buckets:
        try:
            require_obstore()
        except SetupError as exc:
            yield cross_of("object storage", exc, "Run ./setup_comfyui.sh --object-storage.")
            return
        yield tick("object storage", f"obstore {importlib.metadata.version('obstore')}")
        mask_secrets()
        yield from map(_credentials, dict.fromkeys(location_of(place.url).scheme for place in buckets))
    limits = _limits(installation.settings)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda place: _examined(place, limits), places)
        yield from _once(check for checks in found for check in checks)


def _places(settings: Settings) -> Iterator[Place]:
    outputs = settings.allowed_output_urls or ()
    if is_url(settings.output_dir):
        yield Place(settings.output_dir, "OUTPUT_DIR", writes=True)
    yield from (Place(url, "ALLOWED_OUTPUT_URLS", writes=True) for url in outputs if url != settings.output_dir)
    yield from (Place(url, "ALLOWED_INPUT_URLS", writes=False) for url in settings.allowed_input_urls or ())


def _limits(settings: Settings) -> AllowedUrls:
    """Return the limits of the calls. A call is repeated once at most: a server that fails often is a finding."""
    return AllowedUrls(
        "image_path",
        settings.allowed_input_urls,
        settings.allowed_private_networks,
        min(CALL_S, settings.storage_timeout_s),
        min(1, settings.storage_max_retries),
    )


def _once(checks: Iterable[Check]) -> Iterator[Check]:
    """Yield each check once: places of one server share its clock and its reach."""
    seen: set[tuple[str, str]] = set()
    for check in checks:
        key = (check.name, check.found.partition(": name ")[0])
        if check.name not in ("storage clock", "storage server") or key not in seen:
            seen.add(key)
            yield check


def _credentials(scheme: str) -> Check:
    if missing := missing_variable(scheme):
        return cross(
            "storage credentials", f"{scheme}:// needs {missing}, which is not set", f"Set {missing} in the environment."
        )
    return tick("storage credentials", f"{scheme}:// by {source_of_credentials(scheme) or MACHINE[scheme]}")


def _examined(place: Place, limits: AllowedUrls) -> Sequence[Check]:
    """Return the checks of a place, a cross if they take too long: a system's look-up of a name knows no time-out."""
    found: list[Check] = []
    location = location_of(place.url)
    most_s = CALLS * limits.timeout_s

    def examine() -> None:
        found.extend(_web(place, location, limits) if isinstance(location, WebUrl) else _bucket(place, location, limits))

    try:
        within(most_s, examine)
    except TimeoutError:
        return [*found, cross("storage server", f"{place.shown} was not examined within {most_s:g} s", NETWORK)]
    return found


def _web(place: Place, url: WebUrl, limits: AllowedUrls) -> Iterator[Check]:
    """Ask a web server for the prefix itself. Many have nothing there or refuse to list it, and have images below it."""
    began = time.monotonic()
    note = ""
    try:
        web.read(url, limits, WEB_BYTES)
    except (TooLarge, ImageNotFound):
        pass
    except AccessDenied as exc:
        if "the server refuses" not in str(exc):
            yield cross(
                "web server", f"{place.shown}: {_without_name(exc, place)}", f"Set it, or remove the URL from {place.setting}."
            )
            return
        note = ", and refuses the prefix itself, as many servers do"
    except ImageInvalid as exc:
        if "certificate" in str(exc):
            yield cross("web server", f"{place.shown}: {_without_name(exc, place)}", "Renew it, or trust its authority.")
            return
    except Unavailable as exc:
        yield cross("web server", f"{place.shown} cannot be reached ({exc})", NETWORK)
        return
    tls = ", by TLS" if url.scheme == "https" else ""
    yield tick("web server", f"{place.shown} responds in {(time.monotonic() - began) * 1000:.0f} ms{tls}{note}")


def _without_name(exc: Exception, place: Place) -> str:
    """Return the reason in the error of an image, without the name of the image."""
    text = str(exc).removeprefix("Access denied: ").removeprefix("Image file cannot be read: ")
    return text.removeprefix(without_query(place.url)).strip(" ()").removesuffix(".")


def _bucket(place: Place, folder: ObjectPath, limits: AllowedUrls) -> Iterator[Check]:
    reached, not_reached = _server(folder, limits)
    if not_reached is not None and not_reached.has_no_connection:
        yield cross("storage server", f"{place.shown} cannot be reached ({not_reached})", NETWORK)
        return
    if reached is not None:
        server = location_of(server_of(folder) or "")
        assert isinstance(server, WebUrl)
        yield tick("storage server", f"{server.netloc}: {reached.steps}")
        if reached.ahead_s is not None:
            yield clock_check(server.netloc, reached.ahead_s)
    try:
        tried = Tried(place.shown, folder.key, store_of(folder, replace(limits, prefixes=None)))
    except (Unusable, WrongCredentials) as exc:
        yield cross("storage server", f"{place.shown} cannot be used ({exc})", "Set that variable in the environment.")
        return
    try:
        yield from _permissions(place, tried, folder)
    except (Unusable, Unavailable) as exc:
        yield _failed(place, tried, exc, not_reached)


def _permissions(place: Place, tried: Tried, folder: ObjectPath) -> Iterator[Check]:
    first: Listed | None = None
    refused: Refused | None = None
    try:
        first = next(listed(folder, tried.store.limits, recursive=True), None)
    except NotThere:
        advice = f"Create it, or correct its name in {place.setting}."
        yield cross("storage bucket", f"{place.shown}: the bucket does not exist", advice)
        return
    except Refused as exc:
        refused = exc
    if refused is not None and (fault := _wrong_credentials(place, refused)):
        yield fault
    elif not place.writes:
        yield check_reading(tried, first, may_list=refused is None)
    else:
        yield from check_writing(tried)


def _wrong_credentials(place: Place, refused: Refused) -> Check | None:
    """Return the check of credentials that the server does not accept; None if they only lack a permission."""
    scheme = location_of(place.url).scheme
    source = source_of_credentials(scheme) or f"{MACHINE[scheme]}, because the environment has none"
    found = f"{place.shown}: the server refuses the credentials from {source} ({refused})"
    if "RequestTimeTooSkewed" in str(refused):
        return cross("storage clock", f"{place.shown}: {refused}", "Set this machine's clock by the network.")
    if isinstance(refused, WrongCredentials):
        return cross("storage credentials", found, "Replace them. Workers that got them from the environment need a restart.")
    if source_of_credentials(scheme) is None:
        return cross(
            "storage credentials", found, "Set the credentials in the environment; docs/object-storage.md lists them."
        )
    return None


def _failed(place: Place, tried: Tried, exc: Exception, not_reached: NotReached | None) -> Check:
    """Return the check of a storage that fails. The network's own view tells more than the library's."""
    scheme = location_of(place.url).scheme
    if source_of_credentials(scheme) is None and not_reached is None:
        found = f"{place.shown}: no credentials in the environment, and {MACHINE[scheme]} gives none ({one_line(exc)})"
        return cross(
            "storage credentials", found, "Set the credentials in the environment; docs/object-storage.md lists them."
        )
    found = f"{place.shown} fails to {tried.step} ({not_reached or one_line(exc)}){left_over(tried)}"
    return cross("storage server", found, NETWORK)


def _server(folder: ObjectPath, limits: AllowedUrls) -> tuple[Reached | None, NotReached | None]:
    """Return the server's response without credentials, or the reason why there is none; neither behind a proxy."""
    try:
        url = location_of(server_of(folder) or "")
    except ValueError:
        return None, None
    if not isinstance(url, WebUrl) or (url.scheme in getproxies() and not proxy_bypass(url.host)):
        return None, None
    try:
        return reach(url, limits.timeout_s), None
    except NotReached as exc:
        return None, exc
