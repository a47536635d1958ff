"""TLS certificates for a broker and its client, signed by an authority that is made for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key


@dataclass(frozen=True)
class Certificates:
    """PEM files: the certificate of the authority, and the certificate and key of each party."""

    authority: Path
    server: Path
    """Key and certificate in one file, as Kafka reads them."""
    client: Path
    client_key: Path


def write_certificates(folder: Path) -> Certificates:
    """Write new certificates into a folder."""
    folder.mkdir(exist_ok=True)
    written = Certificates(folder / "ca.pem", folder / "server.pem", folder / "client.pem", folder / "client.key")
    authority = trustme.CA()
    server = authority.issue_cert("127.0.0.1", "localhost")
    client = authority.issue_cert("service@example.org", common_name="service")

    authority.cert_pem.write_to_path(written.authority)
    written.server.write_bytes(pkcs8(server.private_key_pem))
    for blob in server.cert_chain_pems:
        blob.write_to_path(written.server, append=True)
    client.cert_chain_pems[0].write_to_path(written.client)
    written.client_key.write_bytes(pkcs8(client.private_key_pem))
    return written


def pkcs8(key: trustme.Blob) -> bytes:
    """Return a key in PKCS #8, the only form that Kafka reads."""
    return load_pem_private_key(key.bytes(), password=None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
