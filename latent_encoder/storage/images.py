"""Reading the bytes of an image by its URL, with the error codes of this service."""

from __future__ import annotations

from errors import AccessDenied, ImageInvalid, ImageNotFound, ImageUnreachable, InvalidRequest, RequestError
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import Location, ObjectPath, WebUrl, shown
from latent_encoder.storage.retrying import Unavailable
from latent_encoder.storage.stores import (
    NoBucket,
    NotThere,
    Refused,
    TooLarge,
    Unusable,
    WrongCredentials,
    fault_of_storage,
    store_of,
)
from latent_encoder.storage.web import read as read_from_web


def read_from_url(url: str, limits: AllowedUrls, max_bytes: int) -> bytes:
    """Return the bytes of the image at a URL. Only their number is checked.

    Raises:
        InvalidRequest: it is no URL of an image.
        AccessDenied: the URL, its server's address or a redirect is not allowed, or the server refuses.
        ImageNotFound: there is no such image.
        ImageInvalid: it is empty, has more than `max_bytes`, or cannot be read.
        ImageUnreachable: the server cannot be reached or fails, also after repetitions.
    """
    place, name = limits.check(url), shown(url)
    if isinstance(place, ObjectPath) and url.endswith("/"):
        raise InvalidRequest(f"Invalid request: image_path: must name an object, not a folder (got {name!r})")
    try:
        return _read(place, name, limits, max_bytes)
    except RequestError as exc:
        if isinstance(place, ObjectPath):
            exc.storage_fault = fault_of_storage(exc.__cause__, place)
        raise


def _read(place: Location, name: str, limits: AllowedUrls, max_bytes: int) -> bytes:
    try:
        data = _bytes(place, limits, max_bytes)
    except TooLarge as exc:
        size = f"{exc.size} bytes, " if exc.size is not None else ""
        raise ImageInvalid(
            f"Image file has {size}more than MAX_IMAGE_BYTES={max_bytes}; make it smaller, or raise the limit: {name}"
        ) from None
    except NotThere as exc:
        bucket = " (the bucket does not exist)" if isinstance(exc, NoBucket) else ""
        raise ImageNotFound(f"Image file not found: {name}{bucket}") from None
    except WrongCredentials as exc:
        raise AccessDenied(f"Access denied: the credentials of the service do not open {name} ({exc})") from exc
    except Refused as exc:
        raise AccessDenied(
            f"Access denied: the storage refuses to read {name} ({exc}); its credentials need the permission to read it."
        ) from exc
    except Unusable as exc:
        raise ImageInvalid(f"Image file cannot be read: {name} ({exc})") from None
    except Unavailable as exc:
        raise ImageUnreachable(f"Image file cannot be reached: {name} ({exc})") from exc
    if not data:
        raise ImageInvalid(f"Image file is empty: {name}")
    return data


def _bytes(place: Location, limits: AllowedUrls, max_bytes: int) -> bytes:
    if isinstance(place, WebUrl):
        return read_from_web(place, limits, max_bytes)
    return store_of(place, limits).read(place.key, max_bytes).data
