"""A real S3 server on this machine: S3Proxy over a folder, with signatures checked."""

from __future__ import annotations

import http.client
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.broker.apache_kafka import JAVA
from tests.broker.interface import START_TIMEOUT, BrokerError
from tests.broker.maven import class_path
from tests.broker.ports import free_ports
from tests.broker.process import Process

POM = Path(__file__).with_name("pom.xml")
IGNORING = POM.parent / "ignoring" / "pom.xml"
"""An older version, which ignores the conditions of writes."""
ACCESS_KEY = "service"
SECRET_KEY = "secret-of-the-service"  # noqa: S105 - of a server that only this machine reaches

# Without it, the server logs each byte that it sends.
LOGGING = "<configuration><root level='WARN'/></configuration>"


class S3Server:
    """The server. Each folder of `data` is a bucket."""

    def __init__(self, folder: Path, pom: Path = POM) -> None:
        self.data = folder / "data"
        self.data.mkdir(parents=True)
        (self.port,) = free_ports(1)
        properties = {
            "s3proxy.endpoint": f"http://127.0.0.1:{self.port}",
            "s3proxy.authorization": "aws-v2-or-v4",
            "s3proxy.identity": ACCESS_KEY,
            "s3proxy.credential": SECRET_KEY,
            "jclouds.provider": "filesystem-nio2",
            "jclouds.filesystem.basedir": str(self.data),
            "jclouds.identity": "unused",
            "jclouds.credential": "unused",
        }
        (folder / "s3proxy.conf").write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        (folder / "logback.xml").write_text(LOGGING)
        command = [*JAVA, f"-Dlogback.configurationFile={folder / 'logback.xml'}", "-cp", class_path(pom)]
        self._process = Process(
            [*command, "org.gaul.s3proxy.Main", "--properties", str(folder / "s3proxy.conf")], folder / "log"
        )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            self._process.check()
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/")
                connection.getresponse()
            except OSError as exc:
                if time.monotonic() > deadline:
                    raise BrokerError(f"S3Proxy does not respond: {exc}") from exc
                time.sleep(0.05)
            else:
                return
            finally:
                connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stop()
