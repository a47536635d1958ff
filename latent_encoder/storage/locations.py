"""URLs of images and folders: parsed and normalised, so that two of them can be compared.

Only a text that begins with `name://` is a URL; every other text is a path. A URL that could mean one place to us and another
one to a server is refused. The texts of the errors hold no query, because a presigned URL has its secret there.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PosixPath, PurePosixPath
from typing import TYPE_CHECKING, Self
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

OBJECT_SCHEMES = ("s3", "gs", "az")
WEB_PORTS = {"http": 80, "https": 443}
SCHEMES = (*OBJECT_SCHEMES, *WEB_PORTS, "file")

LONGEST_KEY = 1024
"""Bytes of an object's name in S3 and Google Cloud Storage; Azure takes as many characters."""

LONGEST_NAME = 255
"""Bytes of a file's name in a bucket: as on most disks, so that the files can be copied to one."""

LONGEST_FOLDER = LONGEST_KEY - 1 - LONGEST_NAME
"""Bytes of an output folder's name in a bucket: behind it come a slash and a file's name."""

LONGEST_WEB_URL = 8192
"""Characters. A presigned URL has up to about 3,000, and common web servers take no more than 8,192 in a request."""

MOST_DECODINGS = 8
"""Rounds in which a path is decoded to look for `..`. Nobody encodes a path that often for a good reason."""

SIGNED = re.compile(r"(^|&)(x-amz-signature|x-goog-signature|signature|sig|token|x-amz-security-token)=", re.IGNORECASE)
"""A parameter of a presigned URL: of S3, Google, CloudFront and Azure. It is another one each time the URL is signed."""

if TYPE_CHECKING:
    PosixPathBase = PosixPath
else:
    PosixPathBase = PurePosixPath

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BUCKET = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,253}[A-Za-z0-9])?")
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BRACKETS = re.compile(r"\[[0-9A-Fa-f:.]+\](:.*)?")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
_IN_TWO_STANDARDS = re.compile("[\u00df\u1e9e\u03c2\u200c\u200d]")
"""Characters of host names that two standards (IDNA 2003 and 2008) turn into different names: ß, ς and joiners."""
_STRAY_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_ENCODED = re.compile("%[0-9A-Fa-f]{2}")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_SEPARATORS = re.compile("%(2f|5c|00|c0%ae|c0%af|c1%9c)", re.IGNORECASE)
"""An encoded slash, backslash or NUL, and forms of `.`, `/` and `\\` that are no UTF-8 but that some servers decode."""


class ObjectPath(PosixPathBase):
    """The place of an object, or of a folder of objects: `s3://bucket/key`.

    As a pure path it has a name and a parent, and it is never equal to a path on disk, because those begin with `/`. Type
    checkers take it for a `Path`, so that the fields of output files hold both. A method that would look at the disk does not
    exist.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    @property
    def scheme(self) -> str:
        return self.parts[0][:-1]

    @property
    def bucket(self) -> str:
        return self.parts[1]

    @property
    def key(self) -> str:
        """Name of the object in its bucket; empty for the bucket itself."""
        return "/".join(self.parts[2:])

    @classmethod
    def parse(cls, url: str) -> Self:
        """Return the place that a URL of object storage names. Nothing in its key is decoded, `?` and `%` included.

        Raises:
            ValueError: it names none.
        """
        scheme, _, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise ValueError("must have the name of a bucket behind ://, without a user, a password or a port")
        names = key.removesuffix("/").split("/") if key else []
        if any(name == "" or _is_dots(name) for name in names):
            raise ValueError("must have no empty name, no '.' and no '..' between its slashes")
        if any(ord(character) < 32 for character in key):
            raise ValueError("must not have control characters")
        if "\\" in key and scheme.lower() == "az":
            raise ValueError("must not have a backslash: Azure takes it for a slash")
        if len(key.encode()) > LONGEST_KEY:
            raise ValueError(f"must have at most {LONGEST_KEY} bytes behind the bucket")
        return cls(f"{scheme.lower()}://{bucket}/{key}")

    def is_in(self, prefix: Location) -> bool:
        """Return whether this is the place of `prefix`, or lies in that folder."""
        return isinstance(prefix, ObjectPath) and self.is_relative_to(prefix)


@dataclass(frozen=True)
class WebUrl:
    """A normalised URL of a web server."""

    scheme: str
    host: str
    """In lower case and ASCII, without a trailing dot; an IP address in its usual form, of version 6 without brackets."""
    port: int
    path: str
    """Begins with `/`. Has no `.` and `..`, and only characters that URLs may have."""
    query: str = ""

    @classmethod
    def parse(cls, url: str) -> Self:
        """Return the normalised URL.

        Raises:
            ValueError: it is no URL of a web server, or one that servers may read in different ways.
        """
        if len(url) > LONGEST_WEB_URL:
            raise ValueError(f"must have at most {LONGEST_WEB_URL} characters")
        if _CONTROL.search(url) or "\\" in url.partition("?")[0]:
            raise ValueError("must not have control characters or backslashes")
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None or "@" in parts.netloc:
            raise ValueError("must not have a user or a password; a presigned URL needs none")
        scheme = parts.scheme.lower()
        return cls(scheme, _host(parts), _port(parts) or WEB_PORTS[scheme], _path(parts.path), _query(parts.query))

    @property
    def netloc(self) -> str:
        """Host, with its port unless that is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == WEB_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def shown(self) -> str:
        """The URL for people, without its query."""
        return f"{self.scheme}://{self.netloc}{self.path}"

    @property
    def target(self) -> str:
        """Path and query, as a request to the server has them."""
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def name(self) -> str:
        return unquote(posixpath.basename(self.path), errors="replace")

    def joined(self, reference: str) -> WebUrl:
        """Return the URL that a redirect leads to.

        Raises:
            ValueError: it is no URL of a web server.
        """
        found = location_of(urljoin(f"{self.scheme}://{self.netloc}{self.target}", reference))
        if not isinstance(found, WebUrl):
            raise ValueError("must be a URL of a web server")  # noqa: TRY004  # the text is wrong, not its type
        return found

    def is_in(self, prefix: Location) -> bool:
        """Return whether `prefix` is this URL, or a part of it that ends where a name of its path ends."""
        if not isinstance(prefix, WebUrl):
            return False
        if (self.scheme, self.host, self.port) != (prefix.scheme, prefix.host, prefix.port):
            return False
        folder = prefix.path.removesuffix("/")
        return self.path.removesuffix("/") == folder or self.path.startswith(f"{folder}/")


Location = ObjectPath | WebUrl


def is_url(text: str) -> bool:
    """Return whether a text is a URL and no path. A path that begins so can be written with `./` before it."""
    return _URL.match(text) is not None


def location_of(url: str) -> Location:
    """Return the place that a URL names.

    Raises:
        ValueError: it names none. The text has the reason, without the URL.
    """
    scheme = url.partition("://")[0].lower()
    if _LONE_SURROGATE.search(url):
        raise ValueError("must be UTF-8")
    if scheme in OBJECT_SCHEMES:
        return ObjectPath.parse(url)
    if scheme in WEB_PORTS:
        return WebUrl.parse(url)
    raise ValueError(f"must be a path, or a URL that begins with {', '.join(f'{name}://' for name in SCHEMES)}")


def path_of_file_url(url: str) -> str:
    """Return the path on this machine that a `file://` URL names; every other text as it is.

    Raises:
        ValueError: it names a file of another machine, or no path.
    """
    if url[:7].lower() != "file://":
        return url
    host, slash, path = url[7:].partition("/")
    if not slash or host.lower() not in ("", "localhost"):
        raise ValueError("must be file:/// and an absolute path on this machine")
    try:
        decoded = unquote(slash + path, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("must be UTF-8 behind file://") from None
    if "\0" in decoded:
        raise ValueError("must not contain a NUL byte")
    return decoded


def shown(text: str) -> str:
    """Return a path as it is, and a URL without user, password and query, for logs, metadata and responses."""
    if not is_url(text) or text.partition("://")[0].lower() not in WEB_PORTS:
        return text
    try:
        return WebUrl.parse(text).shown
    except ValueError:
        scheme, _, rest = text.partition("://")
        host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def lasting(text: str) -> str:
    """Return a URL in the form that stays the same: normalised, and without a query that signs it.

    Raises:
        ValueError: the URL names no place.
    """
    found = location_of(text)
    if isinstance(found, ObjectPath):
        return str(found)
    return found.shown if SIGNED.search(found.query) else f"{found.scheme}://{found.netloc}{found.target}"


def stem_of(text: str) -> str:
    """Return the name of an image without its suffix; of a URL, the last name in it."""
    if not is_url(text):
        return PurePosixPath(text).stem
    try:
        found = location_of(text)
    except ValueError:
        return ""
    return PurePosixPath(found.name).stem


def _is_dots(name: str) -> bool:
    """Return whether a name is `.` or `..`, also if it is encoded once or several times."""
    return any(text in (".", "..") for text in _decodings(name))


def _decodings(text: str) -> Iterator[str]:
    """Yield the text, and each text that decoding it once more gives."""
    for _ in range(MOST_DECODINGS):
        yield text
        decoded = unquote(text, errors="replace")
        if decoded == text:
            return
        text = decoded


def _host(parts: SplitResult) -> str:
    """Return the host in ASCII.

    Raises:
        ValueError: there is none, or one that programs read in different ways.
    """
    host = (parts.hostname or "").removesuffix(".")
    if "[" in parts.netloc:
        try:
            return str(ipaddress.IPv6Address(host if _BRACKETS.fullmatch(parts.netloc) else ""))
        except ValueError:
            raise ValueError("must have a valid address between [ and ], without a zone") from None
    if _IN_TWO_STANDARDS.search(host):
        raise ValueError("must have the name of its server in ASCII (xn--…), because programs encode it in different ways")
    try:
        host = (host if host.isascii() else host.encode("idna").decode()).lower()
    except UnicodeError:
        host = ""
    if len(host) > 253 or not _HOST_NAME.fullmatch(host):
        raise ValueError("must have the name or the address of a server behind ://")
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        return _address(host)
    return host


def _address(host: str) -> str:
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise ValueError("must have an address of four decimal numbers, for example 192.0.2.1") from None


def _port(parts: SplitResult) -> int | None:
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError("must have a port from 1 to 65535, or none")
    return port


def _path(path: str) -> str:
    """Return the path with `.` and `..` removed, and with one way of writing for each character.

    Raises:
        ValueError: a slash, a backslash or `..` is encoded in it, or it has `..;`. Servers read these in different ways.
    """
    if _SEPARATORS.search(path):
        raise ValueError("must not have %2F, %5C or %00")
    path = _STRAY_PERCENT.sub("%25", path)
    path = _ENCODED.sub(lambda found: _one_way(found[0]), path or "/")
    path = quote(path, safe="/%!$&'()*+,;=:@~-._")
    names: list[str] = []
    parts = path.split("/")[1:]
    for number, name in enumerate(parts):
        if name == "..":
            if names:
                names.pop()
        elif name != ".":
            names.append(name)
            continue
        if number == len(parts) - 1:
            names.append("")
    if any(set(re.split(r"[/\\;]", decoded)) & {".", ".."} for name in names for decoded in _decodings(name)):
        raise ValueError("must not have an encoded '..', or '..' beside ';'")
    return "/" + "/".join(names)


def _one_way(encoded: str) -> str:
    """Return an encoded character as it is if URLs need no code for it, else its code in capitals."""
    character = chr(int(encoded[1:], 16))
    return character if _UNRESERVED.fullmatch(character) else encoded.upper()


def _query(query: str) -> str:
    return quote(query, safe="/%!$&'()*+,;=:@~-._?")
