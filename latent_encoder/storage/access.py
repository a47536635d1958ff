"""The limits on URLs: the prefixes that requests may name, and the addresses that may be connected to."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from config import Settings
from errors import AccessDenied, InvalidRequest
from latent_encoder.storage.locations import LONGEST_FOLDER, Location, ObjectPath, WebUrl, location_of, shown

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""The addresses that lead to the IPv4 address in their last four bytes: RFC 6052."""


@dataclass(frozen=True)
class AllowedUrls:
    """The URLs that requests may name, and the limits on calls to their servers."""

    field: str
    """The field of a request: `image_path` or `output_dir`."""
    prefixes: tuple[str, ...] | None = None
    """None allows every URL: the person at the command line decides."""
    networks: tuple[Network, ...] = ()
    """Private networks that a server's name may lead to."""
    timeout_s: float = 30.0
    retries: int = 4

    @classmethod
    def of_inputs(cls, settings: Settings) -> AllowedUrls:
        return cls._of("image_path", settings.allowed_input_urls, settings)

    @classmethod
    def of_outputs(cls, settings: Settings) -> AllowedUrls:
        return cls._of("output_dir", settings.allowed_output_urls, settings)

    @classmethod
    def _of(cls, field: str, prefixes: tuple[str, ...] | None, settings: Settings) -> AllowedUrls:
        if prefixes is None and settings.mode == "kafka":
            prefixes = ()
        return cls(
            field, prefixes, settings.allowed_private_networks, settings.storage_timeout_s, settings.storage_max_retries
        )

    @property
    def setting(self) -> str:
        return "ALLOWED_INPUT_URLS" if self.field == "image_path" else "ALLOWED_OUTPUT_URLS"

    def check(self, url: str) -> Location:
        """Return the place of a URL that a request names.

        Raises:
            InvalidRequest: it names no place that this field can have.
            AccessDenied: it is below none of the prefixes.
        """
        try:
            place = location_of(url)
            if self.field == "output_dir" and isinstance(place, WebUrl):
                raise ValueError("must be a folder, or begin with s3://, gs:// or az://")
            if self.field == "image_path" and isinstance(place, ObjectPath) and not place.key:
                raise ValueError("must name an object in the bucket")
            if self.field == "output_dir" and isinstance(place, ObjectPath) and len(place.key.encode()) > LONGEST_FOLDER:
                raise ValueError(f"must have at most {LONGEST_FOLDER} bytes behind the bucket, so that names fit behind it")
        except ValueError as exc:
            raise InvalidRequest(f"Invalid request: {self.field}: {exc} (got {shown(url)[:200]!r})") from None
        if not self.allows(place):
            raise AccessDenied(
                f"Access denied: {shown(url)} is below no URL of {self.setting}; name one that is, or add its prefix there."
            )
        return place

    def allows(self, place: Location) -> bool:
        """Return whether a place is below one of the prefixes."""
        return self.prefixes is None or any(place.is_in(location_of(prefix)) for prefix in self.prefixes)

    def allows_address(self, host: str, address: Address, *, named: bool) -> bool:
        """Return whether an address may be connected to for that host.

        A private one may if it is in one of the networks, or if the URL itself is that address. `named` is False for a
        redirect that no prefix allows.
        """
        if is_public(address) or any(address in network for network in self.networks if network.version == address.version):
            return True
        return named and (host == "localhost" or host == str(address)) and (self.prefixes is not None or is_ordinary(address))


def is_public(address: Address) -> bool:
    """Return whether an address is one of the public internet, and so are the addresses that are in it."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if any(not is_public(each) for each in (address.sixtofour, *(address.teredo or ())) if each is not None):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def is_ordinary(address: Address) -> bool:
    """Return whether a private address is one that a person may mean: not that of the cloud's metadata service."""
    return not (address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved)
