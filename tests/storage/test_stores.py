"""Opening the stores of each cloud, without a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from errors import AccessDenied, ImageUnreachable, OutputDirNotWritable, RequestError
from models import EncodeRequest
from service import LatentEncoder
from tests.broker.ports import free_ports
from tests.helpers import IMAGES
from tests.storage.conftest import set_cloud


@pytest.fixture(autouse=True)
def no_clouds(monkeypatch: pytest.MonkeyPatch) -> None:
    set_cloud(monkeypatch, {})


def faults(
    url: str, worker: Callable[..., LatentEncoder], ask: Callable[..., EncodeRequest], folder: Path
) -> list[type[RequestError]]:
    """Return the errors of an image and of an output folder at that place."""
    found = []
    for image, out in ((f"{url}/a.png", str(folder)), (str(IMAGES / "photo.jpg"), f"{url}/out")):
        with pytest.raises(RequestError) as failure:
            worker(storage_max_retries=0, storage_timeout_s=2).encode(ask(image, out))
        assert "secret" not in str(failure.value).lower().replace("aws_secret", "")
        found.append(type(failure.value))
    return found


def test_azure_without_an_account(
    worker: Callable[..., LatentEncoder], ask: Callable[..., EncodeRequest], tmp_path: Path
) -> None:
    """An environment that lacks the account is a fault of the credentials."""
    assert faults("az://without-account", worker, ask, tmp_path) == [AccessDenied, OutputDirNotWritable]


@pytest.mark.parametrize(
    ("scheme", "environment"),
    [
        (
            "az",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": "account",
                "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0",
                "AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:{port}",
                "AZURE_ALLOW_HTTP": "true",
            },
        ),
        (
            "s3",
            {
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_ENDPOINT_URL": "http://127.0.0.1:{port}",
                "AWS_ALLOW_HTTP": "true",
            },
        ),
    ],
)
def test_a_storage_that_is_away(
    scheme: str,
    environment: dict[str, str],
    worker: Callable[..., LatentEncoder],
    ask: Callable[..., EncodeRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A storage that does not listen is unreachable, in each cloud."""
    (port,) = free_ports(1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(port=port))
    assert faults(f"{scheme}://away-{port}", worker, ask, tmp_path) == [ImageUnreachable, OutputDirNotWritable]
