"""Folders in buckets: the images in them, and a count of everything that is left out, by one listing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from itertools import islice
from pathlib import Path

from errors import AccessDenied, InvalidRequest, LatentEncoderError
from latent_encoder.outputs.locks import PREFIX
from latent_encoder.outputs.names import LATENT_NAME
from latent_encoder.outputs.recognition import OWN_IMAGE, is_own_file
from latent_encoder.standalone.folders import LeftOut, shown_counts
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.listing import Listed, Listing
from latent_encoder.storage.locations import OBJECT_SCHEMES, Location, ObjectPath, WebUrl, is_url, location_of, shown
from latent_encoder.storage.packed import PAGE, NameDigests, PackedNames
from latent_encoder.storage.retrying import Unavailable
from latent_encoder.storage.stores import NotThere, Refused, Unusable, store_of

MOST_CALLS = 16
"""Calls side by side that look at images which may be own outputs: each waits for a round trip."""


class FolderRefused(LatentEncoderError):
    """A folder in a bucket that cannot be listed, or a URL that stands for no image; the text names it."""


def is_folder(url: str) -> bool:
    """Return whether a URL stands for a folder: it ends with `/`, or is a bucket."""
    scheme, _, place = url.partition("://")
    if scheme.lower() in OBJECT_SCHEMES:
        return place.endswith("/") or "/" not in place
    return is_url(url) and "?" not in url and place.endswith("/")


def with_slash(url: str, endings: Sequence[str], limits: AllowedUrls) -> str:
    """Return the URL with `/` at its end if it is a folder's: there is no object of exactly that name.

    A name with the ending of an image is taken for one without a look.

    Raises:
        FolderRefused: it cannot be looked up, or looks like a pattern.
        AccessDenied, InvalidRequest: it is not allowed, or names no place.
    """
    if url.partition("://")[0].lower() not in OBJECT_SCHEMES or is_folder(url):
        return url
    if url.lower().endswith(tuple(endings)) and not has_magic(url):
        return url
    place = _object_place(url, limits)
    with _explained(url):
        try:
            store_of(place, limits).facts(place.key)
        except (NotThere, Refused):  # S3 refuses to tell of an absent object if listing is not permitted
            pass
        else:
            return url
    if has_magic(url):
        raise FolderRefused(
            f"No object has the name {url}, and patterns are not resolved in buckets; name the folder, which stands for "
            "its images"
        )
    return f"{url}/"


def _object_place(url: str, limits: AllowedUrls) -> ObjectPath:
    """Return the place of an object or of a folder in a bucket.

    Raises:
        FolderRefused: it is a folder of a web server.
        AccessDenied, InvalidRequest: it is not allowed, or names no place.
    """
    try:
        place: Location = location_of(url)
    except ValueError as exc:
        raise InvalidRequest(f"Invalid request: {limits.field}: {exc} (got {shown(url)[:200]!r})") from None
    if isinstance(place, WebUrl):
        raise FolderRefused(
            f"{place.shown} is a folder of a web server, which cannot be listed; name its images, or write a list of requests "
            "(--input-list)"
        )
    if not limits.allows(place):
        raise AccessDenied(
            f"Access denied: {url} is below no URL of {limits.setting}; name one that is, or add its prefix there."
        )
    return place


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn a fault of the storage inside into FolderRefused."""
    try:
        yield
    except NotThere:
        raise FolderRefused(f"Cannot read {url} (the bucket does not exist)") from None
    except Refused as exc:
        raise FolderRefused(
            f"Cannot read {url} (the storage refuses: {exc}); the credentials need the permission to list the bucket"
        ) from None
    except (Unusable, Unavailable) as exc:
        raise FolderRefused(f"Cannot read {url} ({exc})") from None


class BucketFolder:
    """The search for images in one folder of a bucket, and its results."""

    def __init__(self, url: str, endings: Sequence[str], limits: AllowedUrls, *, recursive: bool) -> None:
        self.left_out: Counter[str] = Counter()
        self.place = _object_place(url, limits)
        self._url = url
        self._endings = tuple(endings)
        self._limits = limits
        self._recursive = recursive
        self._start = f"{self.place.key}/" if self.place.key else ""
        self._latents = NameDigests()
        """Keys of latents and of their metadata, by which images of ours are known."""
        self._is_empty = True

    def images(self) -> BucketImages:
        """Return the images, in the order of the listing.

        Own outputs are told from others at the end: a latent may come behind its images, if the order is not that of names.

        Raises:
            FolderRefused: the folder cannot be listed, or has no image.
        """
        with _explained(self._url):
            found = PackedNames(self._keys_of_images())
            images = PackedNames(self._without_own(found))
        if not images:
            raise FolderRefused(self._nothing)
        return BucketImages(self.place, images)

    def _keys_of_images(self) -> Iterator[str]:
        listing = Listing(self.place, self._limits)
        for found in listing:
            self._is_empty = False
            inside = found.key.removeprefix(self._start)
            if folder := self._folder_to_leave_out(inside):
                listing.skip(f"{self._start}{folder}/")
            elif _is_marker(found):
                continue
            elif reason := self._reason_against(found.key):
                self.left_out[reason] += 1
            else:
                yield found.key

    def _folder_to_leave_out(self, inside: str) -> str | None:
        """Return the folder that an object is left out with, and count it; None if there is none."""
        folders = inside.split("/")[:-1]
        for number, folder in enumerate(folders, 1):
            if folder.startswith(".") or not self._recursive:
                self.left_out[LeftOut.HIDDEN if folder.startswith(".") else LeftOut.SUBFOLDER] += 1
                return "/".join(folders[:number])
        return None

    def _reason_against(self, key: str) -> LeftOut | None:
        """Return the reason to leave out an object by its name; None if it may be an image."""
        name = key.rpartition("/")[2]
        if LATENT_NAME.fullmatch(name.removesuffix(".json").removesuffix(".html")):
            self._latents.add(key)
            return LeftOut.OWN_OUTPUT
        if name.startswith("."):
            return LeftOut.OWN_OUTPUT if name.startswith(PREFIX) else LeftOut.HIDDEN
        return None if name.lower().endswith(self._endings) else LeftOut.ENDING

    def _without_own(self, keys: Iterable[str]) -> Iterator[str]:
        """Yield the keys that are no own outputs; those with a name like ours are looked at side by side."""
        with ThreadPoolExecutor(MOST_CALLS) as threads:
            waiting = iter(keys)
            while page := list(islice(waiting, PAGE)):
                for key, is_own in zip(page, threads.map(self._is_own, page), strict=True):
                    if is_own:
                        self.left_out[LeftOut.OWN_OUTPUT] += 1
                    else:
                        yield key

    def _is_own(self, key: str) -> bool:
        folder, slash, name = key.rpartition("/")
        if not OWN_IMAGE.fullmatch(name):
            return False
        place = ObjectPath(f"{self.place.scheme}://{self.place.bucket}/{folder}")
        return is_own_file(place, name, lambda other: f"{folder}{slash}{other}" in self._latents, self._beginning)

    def _beginning(self, path: Path, size: int) -> bytes:
        if not isinstance(path, ObjectPath):
            raise TypeError(path)
        try:
            return store_of(path, self._limits).beginning(path.key, size)
        except (NotThere, Refused, Unusable):  # as an image it gets an error response
            return b""

    @property
    def _nothing(self) -> str:
        if self._is_empty:
            return f"There is nothing in {self._url}: no object has a name that begins so, or is that name"
        left_out = f" ({text})" if (text := shown_counts(self.left_out)) else ""
        hint = "" if self._recursive else "; --recursive looks in the folders below it too"
        return f"No JPEG or PNG in the folder {self._url}{left_out}{hint}"


def _is_marker(found: Listed) -> bool:
    """Return whether an object stands for a folder: consoles make an empty one whose name ends with `/`, which is cut off."""
    return found.size == 0 and "." not in found.key.rpartition("/")[2]


@dataclass(frozen=True)
class BucketImages(Collection[tuple[str, str | None]]):
    """The images in a folder of a bucket, each with its path below the folder."""

    place: ObjectPath
    keys: PackedNames

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, image: object) -> bool:
        return any(each == image for each in self)

    def __iter__(self) -> Iterator[tuple[str, str | None]]:
        start = f"{self.place.key}/" if self.place.key else ""
        return ((self._url(key), key.removeprefix(start)) for key in self.keys)

    def only(self, wanted: Callable[[str], bool]) -> BucketImages:
        """Return the images whose URLs are wanted."""
        return BucketImages(self.place, PackedNames(key for key in self.keys if wanted(self._url(key))))

    def _url(self, key: str) -> str:
        return f"{self.place.scheme}://{self.place.bucket}/{key}"
