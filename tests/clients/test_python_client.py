"""The Python client (clients/python): against the real broker and a real worker, and its README.md."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from confluent_kafka import Producer
from confluent_kafka.cimpl import NewPartitions

from config import Settings
from errors import RequestError
from latent_encoder.kafka.records import Incoming
from latent_encoder_client import (
    BrokerUnavailable,
    ChecksumMismatch,
    Client,
    ClientClosed,
    DeliveryFailed,
    EncodeFailed,
    FileUnusable,
    LatentStatistics,
    ResponseTimeout,
    ResponseUnusable,
    Retries,
    StatisticsMissing,
    Success,
    denormalise,
    load_latent,
    load_numpy_latent,
    normalise,
    response_topic,
    responses,
    verify_files,
)
from latent_encoder_client import (
    client as client_module,
)
from latent_encoder_client.client import ATTEMPT
from latent_encoder_client.requests import RequestFields
from latent_encoder_client.responses import RETRYABLE, Failure, parse_response
from models import EncodeRequest, FileFormat, Metadata, ResponseMessage
from scripts.write_schemas import RESPONDED_AT, example_error, example_success
from service import LatentEncoder
from tests.broker.ports import free_ports
from tests.helpers import IMAGES, PATIENCE_S, PROJECT, VAE, clean_environment
from tests.kafka_tools import Bench, MakeBench, Topic, wait_until

FOLDER = PROJECT / "clients" / "python"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
PHOTO = IMAGES / "photo.jpg"
QUICK = Retries(attempts=3, first_pause_s=0.05)


def client_of(bench: Bench, **options: Any) -> Client:
    options = {"request_topic": bench.request_topic, "response_topic": bench.response_topic, "retries": QUICK, **options}
    return Client(bench.servers, **options)


@pytest.fixture
def client(bench: Bench) -> Iterator[Client]:
    with client_of(bench) as client:
        yield client


@contextmanager
def running(bench: Bench, encoder: LatentEncoder, settings: Settings, **changes: Any) -> Iterator[None]:
    with bench.worker(encoder, bench.settings(settings, **changes)):
        yield


# With a worker


def test_example_of_the_page_prints_a_latent_and_a_fault(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """The example encodes one image, names the fault of another one, and exits with status 1."""
    variables = {
        "KAFKA_BOOTSTRAP_SERVERS": bench.servers,
        "KAFKA_REQUEST_TOPIC": bench.request_topic,
        "KAFKA_RESPONSE_TOPIC": bench.response_topic,
        "PYTHONPATH": str(FOLDER),
    }
    with running(bench, encoder, settings):
        done = subprocess.run(
            [sys.executable, FOLDER / "example.py", "photo.jpg", "no.jpg"],
            cwd=IMAGES,
            env=clean_environment() | variables,
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "")
    assert sorted(done.stdout.splitlines()) == [
        f"no.jpg: IMAGE_NOT_FOUND: Image file not found: {IMAGES / 'no.jpg'}",
        "photo.jpg: (1, 16, 10, 15) of Wan21",
    ]


def test_latent_of_each_format_is_loaded_and_normalised(
    bench: Bench, client: Client, encoder: LatentEncoder, settings: Settings
) -> None:
    """Requests in flight together give verified latents, as tensors and arrays, that are scaled as ComfyUI scales them."""
    with running(bench, encoder, settings):
        formats: tuple[FileFormat, ...] = get_args(FileFormat)
        futures = [client.send(PHOTO, latent_format=latent_format, correlation_id="w") for latent_format in formats]
        found = [future.result(PATIENCE_S) for future in futures]
    first = load_latent(found[0])
    space: Any = encoder.runtime.latent_space("Wan21")
    expected = space.process_in(first.unsqueeze(2))
    for success, latent_format in zip(found, formats, strict=True):
        assert (success.metadata.latent_format, success.correlation_id) == (latent_format, "w")
        verify_files(success)
        latent = load_latent(success)
        assert torch.equal(latent, first)
        array = load_numpy_latent(success)
        assert np.array_equal(array, first.numpy())
        torch.testing.assert_close(normalise(latent.unsqueeze(2), success), expected, rtol=1e-6, atol=1e-6)
        scaled = normalise(array, success)
        assert scaled.dtype == np.float32
        np.testing.assert_allclose(scaled, expected[:, :, 0].numpy(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(denormalise(normalise(latent, success), success), latent)


def test_fault_that_passes_is_retried_under_the_same_id(
    bench: Bench, encoder: LatentEncoder, settings: Settings, tmp_path: Path
) -> None:
    """A file in the way of the output folder gives a fault that is worth a retry; once it is gone, the retry succeeds."""
    blocked, answers = tmp_path / "blocked", bench.responses
    blocked.write_text("not a folder")
    with (
        client_of(bench, retries=Retries(attempts=9, first_pause_s=0.2, longest_pause_s=0.5)) as client,
        running(bench, encoder, settings, kafka_max_retries=0),
    ):
        future = client.send(PHOTO, output_dir=str(blocked / "out"))
        (record,) = answers.take(1)
        assert json.loads(record.value or b"")["error_code"] == "OUTPUT_DIR_NOT_WRITABLE"
        blocked.unlink()
        success = future.result(PATIENCE_S)
    assert success.request_id == json.loads(record.value or b"")["request_id"]
    assert Path(success.latent_file_path).parent == blocked / "out"


def test_attempts_have_a_limit(bench: Bench, encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """After the last attempt the error is the service's; a fault that no retry can fix has one attempt."""
    (tmp_path / "blocked").write_text("not a folder")
    with (
        client_of(bench, retries=Retries(attempts=2, first_pause_s=0.05)) as client,
        running(bench, encoder, settings, kafka_max_retries=0),
    ):
        with pytest.raises(EncodeFailed) as failed:
            client.encode(PHOTO, output_dir=str(tmp_path / "blocked"))
        assert (failed.value.code, failed.value.attempts) == ("OUTPUT_DIR_NOT_WRITABLE", 2)
        with pytest.raises(EncodeFailed, match="Image file not found: /no") as failed:
            client.encode("/no.png")
        assert (failed.value.code, failed.value.attempts) == ("IMAGE_NOT_FOUND", 1)


# Without a worker: the test responds.


class Responder:
    """The service's side of the two topics, by hand."""

    def __init__(self, bench: Bench) -> None:
        self.requests: Topic = bench.topic(bench.request_topic)
        self._bench = bench
        self._producer = Producer({"bootstrap.servers": bench.servers, "linger.ms": 0})

    def respond(self, request: Incoming, fields: Mapping[str, Any] | bytes, partition: int = -1) -> None:
        """Send a response to a request, with its key and headers."""
        request_id = json.loads(request.value or b"")["request_id"]
        value = fields if isinstance(fields, bytes) else json.dumps({"request_id": request_id, **fields}).encode()
        self._producer.produce(
            self._bench.response_topic, value, request.key, headers=list(request.headers), partition=partition
        )
        assert self._producer.flush(30) == 0


@pytest.fixture
def responder(bench: Bench) -> Responder:
    return Responder(bench)


def record_of(response: Any) -> dict[str, Any]:
    """Return the fields of a response's record except its ids."""
    fields: dict[str, Any] = ResponseMessage.of(response, None, RESPONDED_AT).model_dump(mode="json")
    del fields["request_id"]
    return fields


def attempt_of(record: Incoming) -> bytes:
    return dict(record.headers)[ATTEMPT] or b""


SUCCESS, ERROR = record_of(example_success()), record_of(example_error())
TRANSIENT = {**ERROR, "error_code": "ENCODING_FAILED"}


def test_repeated_response_is_no_second_failure(client: Client, responder: Responder) -> None:
    """The repeated error of the first attempt does not count for the second one, whose success is the result."""
    future = client.send(PHOTO)
    (first,) = responder.requests.take(1)
    responder.respond(first, TRANSIENT)
    _, second = responder.requests.take(2)
    for _ in range(5):
        responder.respond(first, TRANSIENT)
    responder.respond(second, SUCCESS)
    responder.respond(second, SUCCESS)
    assert future.result(PATIENCE_S).metadata.latent_shape == (1, 16, 128, 128)
    assert first.value == second.value
    assert [attempt_of(record)[-2:] for record in (first, second)] == [b"/1", b"/2"]
    assert responder.requests.all_within(0.5) == [first, second]


def test_success_of_an_earlier_attempt_counts(client: Client, responder: Responder) -> None:
    """A dead letter that was replayed may succeed while a later attempt waits; its success is the result."""
    future = client.send(PHOTO)
    (first,) = responder.requests.take(1)
    responder.respond(first, TRANSIENT)
    responder.requests.take(2)
    responder.respond(first, SUCCESS)
    assert future.result(PATIENCE_S).status == "success"


def test_responses_of_others_are_ignored(bench: Bench, client: Client, responder: Responder) -> None:
    """Neither a record without a key, nor one of an unknown request, nor another client's with the same id, ends a request."""
    with client_of(bench) as other:
        futures = [each.send(PHOTO, request_id="same") for each in (client, other)]
        requests = responder.requests.take(2)
        (mine,) = [request for request in requests if attempt_of(request).startswith(client._id.encode())]
        (theirs,) = [request for request in requests if request is not mine]
        responder.respond(replace(mine, key=None), SUCCESS)
        responder.respond(replace(mine, key=b"unknown"), SUCCESS)
        responder.respond(theirs, ERROR)
        with pytest.raises(EncodeFailed):
            futures[1].result(PATIENCE_S)
        assert not futures[0].done()
        responder.respond(mine, SUCCESS)
        assert futures[0].result(PATIENCE_S).request_id == "same"


def test_asyncio_awaits_it(client: Client, responder: Responder) -> None:
    """A coroutine awaits several requests together, as the page says."""
    assert "asyncio.wrap_future(client.send(path))" in PAGE

    def respond() -> None:
        for request in reversed(responder.requests.take(2)):
            responder.respond(request, SUCCESS)

    async def both() -> list[Success]:
        sent = [asyncio.wrap_future(client.send(PHOTO, request_id=request_id)) for request_id in ("a", "b")]
        await asyncio.to_thread(respond)
        return await asyncio.gather(*sent)

    assert [success.request_id for success in asyncio.run(both())] == ["a", "b"]


def test_unknown_fields_and_codes_are_accepted(client: Client, responder: Responder) -> None:
    """A response of a newer service is read: its fields are kept, and its new codes are not retried."""
    newer = {**SUCCESS, "more": 1, "metadata": {**SUCCESS["metadata"], "later": [2], "image_notes": ["new_note"]}}
    futures = [client.send(PHOTO), client.send(PHOTO)]
    first, second = responder.requests.take(2)
    responder.respond(first, newer)
    responder.respond(second, {**ERROR, "error_code": "TOMORROWS_CODE"})
    success = futures[0].result(PATIENCE_S)
    assert (success.model_extra or {})["more"] == 1
    assert (success.metadata.model_extra or {})["later"] == [2]
    with pytest.raises(EncodeFailed) as failed:
        futures[1].result(PATIENCE_S)
    assert (failed.value.code, failed.value.attempts) == ("TOMORROWS_CODE", 1)


@pytest.mark.parametrize("value", [b"", b"[]", b"\xff", b'{"status": "success"}', b'{"status": "error"}', b"null"])
def test_unusable_response_is_an_error(value: bytes, client: Client, responder: Responder) -> None:
    """A record that holds no response ends its request, and the client goes on."""
    future = client.send(PHOTO)
    (request,) = responder.requests.take(1)
    responder.respond(request, value)
    with pytest.raises(ResponseUnusable, match="cannot be read"):
        future.result(PATIENCE_S)
    later = client.send(PHOTO)
    responder.respond(responder.requests.take(2)[1], SUCCESS)
    assert later.result(PATIENCE_S).status == "success"


def test_no_response_in_time_is_an_error(bench: Bench, client: Client, responder: Responder) -> None:
    """The error names the topics and the last failure; the builtin TimeoutError catches it too."""
    quiet, failing = client.send(PHOTO, timeout_s=0.3), client.send(PHOTO, timeout_s=1.5)
    request = responder.requests.take(2)[1]
    with pytest.raises(TimeoutError, match=f"No response to the request .* on {bench.response_topic} within 0.3 s"):
        quiet.result(PATIENCE_S)
    responder.respond(request, TRANSIENT)
    with pytest.raises(ResponseTimeout, match=f"ENCODING_FAILED: Image file.* reads {bench.request_topic}"):
        failing.result(PATIENCE_S)


def test_partition_that_is_added_is_read(
    bench: Bench, client: Client, responder: Responder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response in a partition that the topic did not have at the start is found."""
    monkeypatch.setattr(response_topic, "REFRESH_S", 0.2)
    bench.admin.create_partitions([NewPartitions(bench.response_topic, 2)])[bench.response_topic].result()
    future = client.send(PHOTO)
    responder.respond(responder.requests.take(1)[0], SUCCESS, partition=1)
    assert future.result(PATIENCE_S).status == "success"


def test_response_before_the_start_is_not_read(bench: Bench, responder: Responder) -> None:
    """A client reads what comes after its start, also if an older response has the id of its request."""
    bench.send({"request_id": "again"}, key=b"again")
    responder.respond(responder.requests.take(1)[0], ERROR)
    with client_of(bench) as client:
        future = client.send(PHOTO, request_id="again")
        responder.respond(responder.requests.take(2)[1], SUCCESS)
        assert future.result(PATIENCE_S).status == "success"


# Ends


def test_close_ends_the_requests_in_flight(bench: Bench) -> None:
    """They get an error at once, and a closed client takes no more."""
    with client_of(bench) as client:
        future = client.send(PHOTO)
    with pytest.raises(ClientClosed, match="before the response"):
        future.result(0)
    with pytest.raises(ClientClosed, match="is closed"):
        client.send(PHOTO)
    client.close()


def test_cancelled_request_is_forgotten(client: Client, responder: Responder) -> None:
    """Its response is ignored, and its id can be used again."""
    future = client.send(PHOTO, request_id="r")
    assert future.cancel()
    wait_until(lambda: not client._pending, "forgotten")
    with pytest.raises(CancelledError):
        future.result(0)
    again = client.send(PHOTO, request_id="r")
    responder.respond(responder.requests.take(2)[1], SUCCESS)
    assert again.result(PATIENCE_S).status == "success"


def test_id_in_flight_is_refused(client: Client) -> None:
    """Two requests in flight would share their files and responses."""
    client.send(PHOTO, request_id="r")
    with pytest.raises(ValueError, match="with the id r is in flight"):
        client.send(PHOTO, request_id="r")


def test_request_too_large_for_the_broker_is_an_error(client: Client) -> None:
    """The future has the reason of the broker's library."""
    with pytest.raises(DeliveryFailed, match=r"(?i)too large"):
        client.encode("x" * 2_000_000)


def test_missing_topic_or_broker_is_an_error(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructor names the topic or the broker."""
    monkeypatch.setattr(client_module, "CONNECT_TIMEOUT_S", 1.0)
    bench = make_bench(create=False)
    bench.create(bench.request_topic)
    with pytest.raises(BrokerUnavailable, match=bench.response_topic):
        client_of(bench)
    (port,) = free_ports(1)
    with pytest.raises(BrokerUnavailable, match="Check the bootstrap servers"):
        Client(f"127.0.0.1:{port}")


# Files


@pytest.fixture
def written(encode: Callable[..., Any]) -> Success:
    """Return the client's view of a response whose files are there."""
    fields = ResponseMessage.of(encode("photo.jpg"), None, RESPONDED_AT).model_dump_json()
    found = parse_response(fields.encode())
    assert isinstance(found, Success)
    return found


def test_changed_file_is_refused(written: Success) -> None:
    """A latent or image that was changed after the response is not the one that the response describes."""
    for path, check in ((written.scaled_image_path, verify_files), (written.latent_file_path, load_latent)):
        Path(path).write_bytes(Path(path).read_bytes()[:-1] + b"\xff")
        with pytest.raises(ChecksumMismatch, match=re.escape(path)):
            check(written)


def test_folder_may_have_another_path_here(written: Success, tmp_path: Path) -> None:
    """The client finds the files by their names in the folder that it is given; without it, the error names the option."""
    elsewhere = copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-mounted")
    here = load_latent(written)
    Path(written.latent_file_path).unlink()
    with pytest.raises(FileUnusable, match="as `folder`"):
        load_latent(written)
    assert torch.equal(load_latent(written, folder=elsewhere), here)


def test_unknown_format_or_wrong_shape_is_refused(written: Success) -> None:
    """A format of a newer service, and a file of another shape, are errors that name the file."""
    newer = written.metadata.model_copy(update={"latent_format": "gguf"})
    for load in (load_latent, load_numpy_latent):
        with pytest.raises(FileUnusable, match="does not know the format gguf"):
            load(written.model_copy(update={"metadata": newer}))
    with pytest.raises(FileUnusable, match=r"not \[1, 4, 1, 1\]"):
        load_latent(written.model_copy(update={"latent_shape": (1, 4, 1, 1)}))


def test_missing_statistics_are_an_error(written: Success) -> None:
    """A response of an older service, and statistics of another number of channels, give an error instead of wrong numbers."""
    latent, older = load_latent(written), written.metadata.model_copy(update={"latent_statistics": None})
    with pytest.raises(StatisticsMissing, match=re.escape(VAE)):
        normalise(latent, written.model_copy(update={"metadata": older}))
    with pytest.raises(StatisticsMissing, match="16 channels, but there are 4 means"):
        normalise(latent, LatentStatistics(mean=(0.0,) * 4, std=(1.0,) * 4))


# The contract


def test_retried_codes_are_the_services() -> None:
    """The client retries exactly the codes whose class is retryable."""
    assert {error.code for error in RequestError.__subclasses__() if error.retryable} == RETRYABLE


def test_fields_are_the_services() -> None:
    """Requests have the service's optional fields with their values, and metadata are a part of the service's."""
    hints = get_type_hints(RequestFields)
    assert hints.keys() == EncodeRequest.model_fields.keys() - {"image_path", "request_id", "correlation_id", "timestamp"}
    for name, hint in hints.items():
        assert get_args(hint) == get_args(EncodeRequest.model_fields[name].annotation), name
    assert responses.Metadata.model_fields.keys() <= Metadata.model_fields.keys()
    assert responses.LatentStatistics.model_fields.keys() == {"mean", "std"}


def test_responses_of_the_service_are_read() -> None:
    """Success and error become their classes."""
    assert isinstance(parse_response(json.dumps({"request_id": "r", **SUCCESS}).encode()), Success)
    assert isinstance(parse_response(json.dumps({"request_id": "r", **ERROR}).encode()), Failure)


def test_pauses_double_up_to_a_limit() -> None:
    """A pause is between half of its length and all of it."""
    retries = Retries(attempts=9, first_pause_s=1, longest_pause_s=5)
    for attempts, longest in ((1, 1), (2, 2), (3, 4), (4, 5), (5000, 5)):
        assert longest / 2 <= retries.pause_s(attempts) <= longest
    with pytest.raises(ValueError, match="at least one attempt"):
        Retries(attempts=0)


def test_package_can_be_installed(tmp_path: Path) -> None:
    """pip installs the package as the page says, with its types; sending needs neither torch nor numpy."""
    (command,) = re.findall(r"```bash\n(.*)\n```", PAGE)
    assert command == ".venv/bin/python -m pip install './clients/python[torch]'"
    source = copytree(FOLDER, tmp_path / "source")
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--target",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "latent_encoder_client" / "py.typed").is_file()
    code = "import sys, latent_encoder_client as c; print(c.__file__, {'torch', 'numpy', 'safetensors'} & sys.modules.keys())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    imported = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert imported.stdout.split() == [str(tmp_path / "site" / "latent_encoder_client" / "__init__.py"), "set()"]
