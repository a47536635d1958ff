"""Fixtures of the tests of object storage and of web servers."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from latent_encoder.requests import parse_request
from latent_encoder.storage import retrying
from models import EncodeRequest
from service import LatentEncoder
from tests.broker.certificates import Certificates, write_certificates
from tests.broker.maven import java_and_maven_are_here
from tests.helpers import IMAGES
from tests.storage.faulty_proxy import FaultyProxy
from tests.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.storage.web_server import WebServer


@dataclass(frozen=True)
class Bucket:
    """A bucket of one test, behind a proxy of its own."""

    name: str
    folder: Path
    """The folder on disk in which the server keeps the objects."""
    proxy: FaultyProxy
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def add(self, image: str = "astronaut.png", key: str | None = None) -> str:
        """Put an image of the fixtures into the bucket, and return its URL."""
        place = self.folder / (key or f"in/{image}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((IMAGES / image).read_bytes())
        return f"{self.url}/{key or f'in/{image}'}"

    def names(self, folder: str = "out") -> list[str]:
        """Return the names of the objects in a folder, hidden ones included."""
        place = self.folder / folder
        return sorted(path.name for path in place.iterdir()) if place.is_dir() else []


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let repetitions begin after a hundredth of a second."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if not java_and_maven_are_here():
        pytest.skip("no S3 server can run here: that takes Java 17 and Maven")
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def set_cloud(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    """Give the environment these variables of a cloud, and no other ones."""
    for name in [*os.environ]:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with FaultyProxy(s3_server.port) as proxy:
        environment = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
            "AWS_ALLOW_HTTP": "true",
        }
        set_cloud(monkeypatch, environment)
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        (s3_server.data / name).mkdir()
        yield Bucket(name, s3_server.data / name, proxy, environment)


@pytest.fixture
def worker(encoder: LatentEncoder, settings: Settings) -> Callable[..., LatentEncoder]:
    """Return a function that makes another worker, with changed settings: it shares ComfyUI, and knows nothing else."""

    def worker(**changes: Any) -> LatentEncoder:
        return LatentEncoder(settings.model_copy(update=changes), encoder.runtime)

    return worker


@pytest.fixture
def ask(settings: Settings) -> Callable[..., EncodeRequest]:
    """Return a function that makes a request."""

    def ask(image_path: str, output_dir: str, **fields: Any) -> EncodeRequest:
        given = {"image_path": image_path, "output_dir": output_dir, "request_id": "test", **fields}
        return parse_request(given, settings.request_defaults)

    return ask


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return write_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server
