"""A real server with the interface of Azure Blob Storage on this machine: Azurite, if it is installed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.broker.interface import START_TIMEOUT, BrokerError
from tests.broker.ports import free_ports
from tests.broker.process import Process

PROGRAM = "azurite-blob"
ACCOUNT = "devstoreaccount1"
# The key that Azurite documents for its only account.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION = "2021-08-06"


def is_here() -> bool:
    return shutil.which(PROGRAM) is not None


class Azurite:
    """The server, with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        (self.port,) = free_ports(1)
        command = [PROGRAM, "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
        self._process = Process([*command, "--blobPort", str(self.port), "--location", str(folder)], folder / "log")
        deadline = time.monotonic() + START_TIMEOUT
        while not self._listens():
            self._process.check()
            if time.monotonic() > deadline:
                raise BrokerError("Azurite does not respond")
            time.sleep(0.05)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{self.port}/{ACCOUNT}",
            "AZURE_ALLOW_HTTP": "true",
        }

    def _listens(self) -> bool:
        try:
            return self._call("GET", "/", {}) > 0
        except OSError:
            return False

    def create(self, container: str) -> None:
        """Create a container: obstore has no call for that."""
        headers = {"x-ms-date": f"{datetime.now(UTC):%a, %d %b %Y %H:%M:%S} GMT", "x-ms-version": VERSION}
        signed = "\n".join(f"{name}:{value}" for name, value in headers.items())
        text = f"PUT{chr(10) * 12}{signed}\n/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
        digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        status = self._call("PUT", f"/{ACCOUNT}/{container}?restype=container", headers)
        if status != 201:
            raise BrokerError(f"Azurite creates no container: HTTP status {status}")

    def _call(self, method: str, path: str, headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers={**headers, "Content-Length": "0"})
            return connection.getresponse().status
        finally:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stop()
