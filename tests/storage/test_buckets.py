"""Images from a bucket and files into one, by a real S3 server."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import Settings
from errors import AccessDenied, ImageInvalid, ImageNotFound, ImageUnreachable, InvalidRequest, OutputDirNotWritable
from latent_encoder.outputs import claims
from latent_encoder.outputs.bucket import BucketFolder
from latent_encoder.outputs.claims import Claim
from latent_encoder.outputs.drawing import draw
from latent_encoder.outputs.names import SUFFIXES
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.stores import store_of
from models import EncodeRequest, FileFormat, SuccessResponse
from service import LatentEncoder
from tests.helpers import IMAGES, PATIENCE_S
from tests.storage.conftest import Bucket
from tests.storage.s3_server import IGNORING, SECRET_KEY, S3Server

MakeWorker = Callable[..., LatentEncoder]
Ask = Callable[..., EncodeRequest]


def assert_whole(bucket: Bucket, response: SuccessResponse) -> None:
    """Assert that the bucket has the files of a response, with the checksums that it states."""
    for url, sha256 in (
        (response.latent_file_path, response.metadata.latent_sha256),
        (response.scaled_image_path, response.metadata.scaled_image_sha256),
    ):
        data = (bucket.folder / url.removeprefix(f"{bucket.url}/")).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sha256
    described = bucket.folder / f"{response.latent_file_path.removeprefix(f'{bucket.url}/')}.json"
    assert json.loads(described.read_bytes())["latent_sha256"] == response.metadata.latent_sha256


def test_files_in_a_bucket_are_those_on_disk(bucket: Bucket, worker: MakeWorker, ask: Ask, tmp_path: Path) -> None:
    """An image in a bucket gives, in a bucket, the files that it gives on disk, byte for byte except the times."""
    response = worker().encode(ask(bucket.add(), f"{bucket.url}/out"))
    local = worker().encode(ask(str(IMAGES / "astronaut.png"), str(tmp_path)))
    assert response.latent_file_path == f"{bucket.url}/out/latent_astronaut_test.pt"
    assert bucket.names() == sorted(path.name for path in tmp_path.iterdir())
    assert_whole(bucket, response)
    assert response.metadata.latent_sha256 == local.metadata.latent_sha256
    assert response.metadata.scaled_image_sha256 == local.metadata.scaled_image_sha256
    assert response.metadata.fingerprint == local.metadata.fingerprint


def test_a_stored_response_is_repeated_without_reading_the_latent(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """A repeated request gets its stored response, and the files are not read."""
    request = ask(bucket.add(), f"{bucket.url}/out")
    response = worker().encode(request)
    bucket.proxy.calls.clear()
    stored = worker().stored_response(request)
    assert stored == response
    assert bucket.proxy.count("GET", r"\.pt$|scaled") == 0
    assert bucket.proxy.count("PUT") == 0


def test_a_file_that_another_program_changed_is_not_whole(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """A latent that another program replaced gives no stored response; one that it restored does."""
    request = ask(bucket.add(), f"{bucket.url}/out")
    response = worker().encode(request)
    latent = bucket.folder / "out" / "latent_astronaut_test.pt"
    data = latent.read_bytes()
    latent.unlink()
    latent.write_bytes(data[:-1] + b"x")
    assert worker().stored_response(request) is None
    latent.write_bytes(data)
    assert worker().stored_response(request) == response


def test_a_preview_is_added_to_stored_files(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """A preview that is asked for later is made of the stored latent, and the latent stays."""
    request = ask(bucket.add(), f"{bucket.url}/out")
    worker().encode(request)
    before = (bucket.folder / "out" / "latent_astronaut_test.pt").stat()
    later = worker(preview=True)
    undrawn = later.undrawn(request)
    assert undrawn is not None
    response = later.add_images(draw(later.runtime, undrawn))
    assert response.preview_path == f"{bucket.url}/out/preview_astronaut_test.png"
    assert (bucket.folder / "out" / "latent_astronaut_test.pt").stat().st_mtime_ns == before.st_mtime_ns
    assert later.stored_response(request) == response


def test_another_input_of_the_same_name_replaces_the_files(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """Files of an earlier input are replaced, and no claim is left."""
    bucket.add()
    first = worker().encode(ask(f"{bucket.url}/in/astronaut.png", f"{bucket.url}/out"))
    second = worker().encode(ask(f"{bucket.url}/in/astronaut.png", f"{bucket.url}/out", megapixels=0.03))
    assert first.metadata.latent_sha256 != second.metadata.latent_sha256
    assert_whole(bucket, second)
    assert len(bucket.names()) == 3


def test_another_input_in_another_format_takes_the_metadata_away(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """Metadata that describe a replaced image are removed before it is, and come back if it cannot be replaced."""
    image, fields = bucket.add(), {"latent_format": "safetensors", "megapixels": 0.03}
    first = worker().encode(ask(image, f"{bucket.url}/out"))
    names, fault = bucket.names(), bucket.proxy.fault("status", "PUT", "scaled_image", times=2)
    with pytest.raises(OutputDirNotWritable, match="503"):
        worker(storage_max_retries=1).encode(ask(image, f"{bucket.url}/out", **fields))
    assert fault.times == 0
    assert bucket.names() == names
    assert_whole(bucket, first)
    bucket.proxy.calls.clear()
    worker().encode(ask(image, f"{bucket.url}/out", **fields))
    changes = [(call.method, Path(call.path).name) for call in bucket.proxy.calls if call.method in ("PUT", "DELETE")]
    removed, replaced = ("DELETE", "latent_astronaut_test.pt.json"), ("PUT", "scaled_image_astronaut_test.png")
    assert changes.index(removed) < changes.index(replaced)
    assert described_files_are_whole(bucket.folder / "out" / "latent_astronaut_test.safetensors.json")
    assert set(names) - set(bucket.names()) == {"latent_astronaut_test.pt.json"}


def test_two_workers_with_one_name_keep_the_response_that_was_sent(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """If two workers write different files of one name at once, one succeeds and its files stay."""
    image = bucket.add()
    bucket.proxy.latency_s = 0.02
    requests = [ask(image, f"{bucket.url}/out", megapixels=megapixels) for megapixels in (0.02, 0.03)]
    workers = [worker(), worker()]
    encoded = [each.encode_prepared(each.prepare(request)) for each, request in zip(workers, requests, strict=True)]
    together = threading.Barrier(2)

    def write(number: int) -> SuccessResponse | OutputDirNotWritable:
        together.wait()
        try:
            return workers[number].write(encoded[number])
        except OutputDirNotWritable as exc:
            return exc

    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(write, range(2)))
    (success,) = [outcome for outcome in outcomes if isinstance(outcome, SuccessResponse)]
    assert_whole(bucket, success)
    assert len(bucket.names()) == 3


def test_two_workers_with_one_request_give_the_same_response(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """If two workers have the same request at once, both respond with the files of the first."""
    request = ask(bucket.add(), f"{bucket.url}/out")
    workers = [worker(), worker()]
    encoded = [each.encode_prepared(each.prepare(request)) for each in workers]
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda number: workers[number].write(encoded[number]), range(2))
    assert first == second
    assert_whole(bucket, first)


def test_the_metadata_come_last(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """The metadata are written when all files are there, and removed before one of them is replaced."""
    image = bucket.add()
    worker().encode(ask(image, f"{bucket.url}/out"))
    worker().encode(ask(image, f"{bucket.url}/out", megapixels=0.03))
    calls = [call for call in bucket.proxy.calls if call.method in ("PUT", "DELETE") and "_test" in call.path]
    writes = [(call.method, call.path.rpartition("_test")[2]) for call in calls]
    assert writes[2] == ("PUT", ".pt.json")
    assert writes[3] == ("DELETE", ".pt.json")
    assert writes[-1] == ("PUT", ".pt.json")


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_lost_responses_of_writes_do_no_harm(bucket: Bucket, worker: MakeWorker, ask: Ask, number: int) -> None:
    """A write whose response is lost is repeated, and finds its own object."""
    path = {1: "lock", 2: r"\.pt$", 3: "scaled_image", 4: r"\.json$"}[number]
    bucket.proxy.fault("lose", "PUT", path)
    response = worker().encode(ask(bucket.add(), f"{bucket.url}/out"))
    assert_whole(bucket, response)
    assert len(bucket.names()) == 3


@pytest.mark.parametrize(("kind", "status"), [("drop", 0), ("status", 503), ("status", 500), ("status", 429)])
def test_passing_faults_are_repeated(
    bucket: Bucket, worker: MakeWorker, ask: Ask, kind: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Broken connections, throttling and errors of the server are repeated, and logged without a secret."""
    caplog.set_level("INFO")
    for method, path in (("GET", "astronaut.png$"), ("GET", r"\.json"), ("PUT", r"\.pt$"), ("PUT", r"\.json$"), ("HEAD", "")):
        bucket.proxy.fault(kind, method, path, times=2, status=status)  # type: ignore[arg-type]
    request = ask(bucket.add(), f"{bucket.url}/out")
    response = worker().encode(request)
    assert worker().stored_response(request) == response
    assert_whole(bucket, response)
    assert "call to storage is repeated" in caplog.text
    assert SECRET_KEY not in caplog.text


def test_an_image_behind_a_storage_that_stays_away_can_be_retried(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """If the storage fails for longer than the repetitions last, the image is unreachable, which is worth a retry."""
    bucket.proxy.fault("status", "GET", r"astronaut\.png$", times=99)
    with pytest.raises(ImageUnreachable, match="503") as failure:
        worker(storage_max_retries=1).encode(ask(bucket.add(), f"{bucket.url}/out"))
    assert failure.value.retryable
    assert bucket.names() == []


def test_an_output_folder_that_cannot_be_read_counts_as_no_empty_one(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """If the stored metadata cannot be read, nothing is written, because they may belong to a response that was sent."""
    image = bucket.add()
    first = worker().encode(ask(image, f"{bucket.url}/out"))
    other = worker(storage_max_retries=0)
    encoded = other.encode_prepared(other.prepare(ask(image, f"{bucket.url}/out", megapixels=0.03)))
    bucket.proxy.fault("status", "GET", r"\.json$", times=99)
    with pytest.raises(OutputDirNotWritable, match="503"):
        other.write(encoded)
    assert_whole(bucket, first)


def test_a_failed_publication_leaves_nothing(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """If the metadata cannot be written, the other files are removed again."""
    bucket.proxy.fault("status", "PUT", r"\.json$", times=99)
    with pytest.raises(OutputDirNotWritable, match="503"):
        worker(storage_max_retries=1).encode(ask(bucket.add(), f"{bucket.url}/out"))
    assert bucket.names() == []


def test_a_failed_replacement_restores_the_former_files(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """If a file cannot be replaced, the former files are there again, and are still the stored response."""
    image = bucket.add()
    request = ask(image, f"{bucket.url}/out")
    first = worker().encode(request)
    bucket.proxy.fault("status", "PUT", "scaled_image", times=2)
    with pytest.raises(OutputDirNotWritable, match="503"):
        worker(storage_max_retries=1).encode(ask(image, f"{bucket.url}/out", megapixels=0.03))
    assert_whole(bucket, first)
    assert worker().stored_response(request) == first


def test_a_storage_that_ignores_conditions_is_refused(
    bucket: Bucket, worker: MakeWorker, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ignores If-None-Match, as S3Proxy 2.6.0 does, is found out before a file is written."""
    image = str(IMAGES / "astronaut.png")
    with S3Server(tmp_path / "old", IGNORING) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        (server.data / bucket.name).mkdir()
        with pytest.raises(OutputDirNotWritable, match="ignores If-None-Match"):
            worker().encode(ask(image, f"{bucket.url}/out"))
        assert [path for path in (server.data / bucket.name).rglob("*") if path.is_file()] == []


def taken_over(bucket: Bucket, worker: MakeWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> SuccessResponse:
    """Hold up a worker before its metadata until another one has taken over its claim. Return the response of that one."""
    monkeypatch.setattr(claims, "CLAIM_S", 0.6)
    monkeypatch.setattr(claims, "RENEW_S", 0.2)
    image = bucket.add()
    held = bucket.proxy.fault("hold", "PUT", r"\.json$")
    slow = worker(storage_max_retries=0)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(slow.encode, ask(image, f"{bucket.url}/out", megapixels=0.03))
        assert held.met.wait(PATIENCE_S)
        response = worker().encode(ask(image, f"{bucket.url}/out"))
        held.release.set()
        with pytest.raises(OutputDirNotWritable):
            running.result(PATIENCE_S)
    return response


def test_the_claim_of_a_killed_process_is_taken_over(
    bucket: Bucket, worker: MakeWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that nobody renews is taken over; until then the files are not touched."""
    assert_whole(bucket, taken_over(bucket, worker, ask, monkeypatch))


def test_a_claim_that_is_held_for_long_costs_few_calls(
    bucket: Bucket, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pauses between looks at a claim grow, and end when the claim may be taken over; each look is two calls."""
    place = ObjectPath(f"{bucket.url}/out")
    store = store_of(place, AllowedUrls.of_outputs(settings))
    folder = BucketFolder(place, store, store)
    dead, alive = Claim(folder, "key"), Claim(folder, "key")
    dead.take("a.json")
    before = bucket.proxy.count("PUT")
    pauses: list[float] = []
    now = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: now + sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(claims, "time", clock)
    alive.take("a.json")
    assert sum(pauses) == pytest.approx(claims.CLAIM_S, abs=claims.POLL_S)
    assert max(pauses) == claims.LONGEST_POLL_S
    assert bucket.proxy.count("PUT") - before == len(pauses) + 2 == 13
    assert bucket.proxy.count("GET") <= len(pauses) + 2


@pytest.mark.parametrize(
    ("image", "error"),
    [
        ("in/none.png", ImageNotFound),
        ("in//astronaut.png", InvalidRequest),
        ("in/../astronaut.png", InvalidRequest),
        ("in/%2e%2e/astronaut.png", InvalidRequest),
        ("", InvalidRequest),
    ],
)
def test_images_that_are_not_there(bucket: Bucket, worker: MakeWorker, ask: Ask, image: str, error: type[Exception]) -> None:
    """A key that is not there, and one that servers may read in different ways, have their error codes."""
    with pytest.raises(error):
        worker().encode(ask(f"{bucket.url}/{image}", f"{bucket.url}/out"))


def test_a_bucket_that_is_not_there_is_named(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """A bucket that does not exist is IMAGE_NOT_FOUND for an image, and OUTPUT_DIR_NOT_WRITABLE for the files."""
    with pytest.raises(ImageNotFound, match="bucket does not exist"):
        worker().encode(ask("s3://no-such-bucket/a.png", f"{bucket.url}/out"))
    with pytest.raises(OutputDirNotWritable, match="bucket does not exist"):
        worker().encode(ask(bucket.add(), "s3://no-such-bucket/out"))


def test_wrong_credentials_are_refused(
    bucket: Bucket, worker: MakeWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With wrong credentials an image is ACCESS_DENIED, and the files are OUTPUT_DIR_NOT_WRITABLE; no secret is told."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-of-somebody")
    with pytest.raises(AccessDenied, match="SignatureDoesNotMatch") as refused:
        worker().encode(ask(bucket.add(), str(tmp_path)))
    with pytest.raises(OutputDirNotWritable, match="SignatureDoesNotMatch") as failed:
        worker().encode(ask(str(IMAGES / "astronaut.png"), f"{bucket.url}/out"))
    assert "wrong-secret" not in f"{refused.value} {failed.value}"


def test_a_profile_has_the_credentials(
    bucket: Bucket, worker: MakeWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The keys of the profile that AWS_PROFILE names are used if the environment has none."""
    file = tmp_path / "credentials"
    keys = f"aws_access_key_id = {bucket.environment['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {SECRET_KEY}\n"
    file.write_text(f"[default]\naws_access_key_id = nobody\naws_secret_access_key = none\n[encoder]\n{keys}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "encoder")
    assert worker().encode(ask(bucket.add(), f"{bucket.url}/out")).status == "success"


def test_an_image_that_is_too_large_is_not_fetched(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """An object of more than MAX_IMAGE_BYTES is refused by its stated size."""
    with pytest.raises(ImageInvalid, match=r"has \d+ bytes, more than MAX_IMAGE_BYTES=1000"):
        worker(max_image_bytes=1000).encode(ask(bucket.add(), f"{bucket.url}/out"))


def test_urls_are_off_in_kafka_mode(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """In Kafka mode a URL is refused until its prefix is listed, for the image and for the folder."""
    request = ask(bucket.add(), f"{bucket.url}/out")
    with pytest.raises(AccessDenied, match="ALLOWED_INPUT_URLS"):
        worker(mode="kafka").encode(request)
    with pytest.raises(AccessDenied, match="ALLOWED_OUTPUT_URLS"):
        worker(mode="kafka", allowed_input_urls=(f"{bucket.url}/in",)).encode(request)
    both = {"allowed_input_urls": (f"{bucket.url}/in",), "allowed_output_urls": (f"{bucket.url}/out/",)}
    assert worker(mode="kafka", **both).encode(request).status == "success"
    with pytest.raises(AccessDenied, match="ALLOWED_OUTPUT_URLS"):
        worker(mode="kafka", **both).encode(ask(request.image_path, f"{bucket.url}/out2"))


def test_calls_of_an_image(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """An image that is looked up and then encoded, without the stages, takes few calls; its repetition takes fewer."""
    worker().encode(ask(bucket.add("astronaut_masked.png"), f"{bucket.url}/out"))  # the conditions are proved once
    request, calls = ask(bucket.add(), f"{bucket.url}/out"), bucket.proxy.calls
    each = worker()
    calls.clear()
    assert each.stored_response(request) is None
    each.encode(request)
    first = Counter(call.method for call in calls)
    calls.clear()
    assert each.stored_response(request) is not None
    again = Counter(call.method for call in calls)
    assert first == {"GET": 9, "PUT": 4, "DELETE": 1}
    assert again == {"GET": 3, "HEAD": 2}


@pytest.mark.parametrize("formats", [("pt", "pt", "pt"), ("pt", "safetensors", "comfy")], ids=["one-format", "formats"])
def test_a_reader_never_sees_metadata_without_their_files(
    bucket: Bucket, worker: MakeWorker, ask: Ask, formats: tuple[FileFormat, ...]
) -> None:
    """While workers write different files of one name and calls break off, metadata that stay the same describe the files."""
    image, ended = bucket.add(), threading.Event()
    workers = [worker(storage_max_retries=6) for _ in range(3)]
    requests = [
        ask(image, f"{bucket.url}/out", megapixels=megapixels, latent_format=latent_format)
        for megapixels, latent_format in zip((0.02, 0.025, 0.03), formats, strict=True)
    ]
    latents = {f"latent_astronaut_test{SUFFIXES[latent_format]}" for latent_format in formats}
    described = [bucket.folder / "out" / f"{latent}.json" for latent in latents]
    for kind in ("lose", "drop", "status"):
        for path in ("lock", r"\.pt$", "scaled", r"\.json$"):
            bucket.proxy.fault(kind, "PUT", path, times=3)

    def write(number: int) -> int:
        sent = 0
        for _ in range(4):
            each = workers[number]
            try:
                each.write(each.encode_prepared(each.prepare(requests[number])))
            except OutputDirNotWritable:
                continue
            sent += 1
        return sent

    def read() -> int:
        seen = 0
        while not ended.is_set():
            seen += sum(map(described_files_are_whole, described))
        return seen

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        sent = sum(pool.map(write, range(3)))
        ended.set()
        assert reader.result(PATIENCE_S) > 0
    assert sent > 0
    assert sum(map(described_files_are_whole, described)) == 1
    assert len(set(bucket.names()) - latents) == 2


def described_files_are_whole(described: Path, name: str = "astronaut_test") -> bool:
    """Assert that the files are those of the metadata, if these are there and do not change meanwhile; return if so."""
    try:
        metadata = described.read_bytes()
        latent = described.with_suffix("").read_bytes()
        scaled = described.with_name(f"scaled_image_{name}.png").read_bytes()
        if not metadata or described.read_bytes() != metadata:
            return False
    except FileNotFoundError:
        return False
    stated = json.loads(metadata)
    assert stated["latent_sha256"] == hashlib.sha256(latent).hexdigest()
    assert stated["scaled_image_sha256"] == hashlib.sha256(scaled).hexdigest()
    return True


def test_one_folder_for_images_and_files(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """Files are written beside their image, which stays as it is."""
    url = bucket.add(key="both/astronaut.png")
    request = ask(url, f"{bucket.url}/both")
    assert worker().encode(request).status == "success"
    assert (bucket.folder / "both/astronaut.png").read_bytes() == (IMAGES / "astronaut.png").read_bytes()
    assert worker().stored_response(request) is not None
