"""Azure Blob Storage, by Azurite."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from errors import AccessDenied, ImageNotFound, OutputDirNotWritable
from latent_encoder.outputs import claims
from latent_encoder.outputs.bucket import BucketFolder
from latent_encoder.outputs.claims import Claim
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.stores import Conflict, Store, store_of
from models import EncodeRequest
from service import LatentEncoder
from tests.helpers import IMAGES
from tests.storage.azurite import Azurite, is_here
from tests.storage.conftest import set_cloud

MakeWorker = Callable[..., LatentEncoder]
Ask = Callable[..., EncodeRequest]
LIMITS = AllowedUrls("output_dir", retries=1, timeout_s=10)
IMAGE = (IMAGES / "astronaut.png").read_bytes()


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    if not is_here():
        pytest.skip("Azure is not tried: azurite-blob is not in PATH (npm install -g azurite)")
    with Azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture
def container(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    set_cloud(monkeypatch, azurite.environment)
    name = f"container-{uuid.uuid4().hex[:12]}"
    azurite.create(name)
    return f"az://{name}"


def store(url: str) -> Store:
    return store_of(ObjectPath(url), LIMITS)


def put(url: str, key: str, data: bytes) -> None:
    store(url).put(key, data, hashlib.sha256(data).hexdigest(), None)


def test_an_image_in_and_files_out(container: str, worker: MakeWorker, ask: Ask) -> None:
    """An image of a container is encoded into it, and another worker has the stored response."""
    put(container, "in/a.png", IMAGE)
    request = ask(f"{container}/in/a.png", f"{container}/out", preview=True)
    response = worker().encode(request)
    assert response.metadata is not None
    latent = store(container).read(ObjectPath(response.latent_file_path).key)
    assert hashlib.sha256(latent.data).hexdigest() == response.metadata.latent_sha256 == latent.facts.sha256
    again = worker().stored_response(request)
    assert again is not None
    assert again.latent_file_path == response.latent_file_path


def test_conditions_of_writes(container: str) -> None:
    """A write that expects no object, or another version, is refused, and the checksum is written with the bytes."""
    place = store(container)
    first = place.put("d/a", b"one", "11", None)
    with pytest.raises(Conflict):
        place.put("d/a", b"two", "22", None)
    assert place.facts("d/a").version == first
    place.put("d/a", b"two", "22", first)
    with pytest.raises(Conflict):
        place.put("d/a", b"three", "33", first)
    assert (place.read("d/a").data, place.facts("d/a").sha256) == (b"two", "22")
    place.remove("d/a")
    place.remove("d/a")
    with pytest.raises(Conflict):
        place.put("d/a", b"three", "33", first)


def test_a_claim_that_is_taken_over(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim of a process that is gone is taken over, and the former one finds that out."""
    monkeypatch.setattr(claims, "CLAIM_S", 0.1)
    folder = BucketFolder(ObjectPath(f"{container}/out"), store(container), store(container))
    dead, alive = Claim(folder, "key"), Claim(folder, "key")
    dead.take("a.json")
    alive.take("a.json")
    with pytest.raises(OutputDirNotWritable, match="another one has taken over"):
        dead.renew()
    alive.renew()


@pytest.mark.parametrize("name", ["ü" * 500, "sp ace", "per%20cent", "q?x#y", "pl+us", "e\u0301", "qu'ot\"e", "*[~]:", "_. _"])
def test_names(container: str, name: str) -> None:
    """An object is read by the name that it was written by."""
    put(container, f"d/{name}", b"data")
    assert store(container).read(f"d/{name}").data == b"data"
    assert [found.name for found in store(container).names_from("d", name[:1])] == [name]


def test_names_from_a_beginning(container: str) -> None:
    """Only the names that begin alike are listed."""
    for name in ("a1", "b1", "b2", "c1"):
        put(container, f"d/{name}", b"data")
    assert [found.name for found in store(container).names_from("d", "b")] == ["b1", "b2"]


def test_a_container_that_does_not_exist(container: str, worker: MakeWorker, ask: Ask, tmp_path: Path) -> None:
    """A missing container is named as such, for the image and for the folder."""
    absent = f"{container}-absent"
    with pytest.raises(ImageNotFound, match="the bucket does not exist"):
        worker().encode(ask(f"{absent}/a.png", str(tmp_path)))
    with pytest.raises(OutputDirNotWritable, match="the bucket does not exist"):
        worker().encode(ask(str(IMAGES / "astronaut.png"), f"{absent}/out"))


def test_a_wrong_key(container: str, monkeypatch: pytest.MonkeyPatch, worker: MakeWorker, ask: Ask, tmp_path: Path) -> None:
    """A wrong key of the account is refused, and not told. Azurite has another code for it than Azure."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmcta2V5LW9mLXRoaXMtdGVzdA==")
    with pytest.raises(AccessDenied, match="403 Forbidden, AuthorizationFailure") as refused:
        worker().encode(ask(f"{container}/a.png", str(tmp_path)))
    assert "d3Jvbmct" not in str(refused.value)
