"""The health of a worker: its own report, over HTTP, and by the command that asks for it."""

from __future__ import annotations

import gc
import json
import signal
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from config import Settings
from errors import ErrorCode, ImageInvalid, SetupError
from latent_encoder.kafka.jobs import RecordJob
from latent_encoder.kafka.records import Incoming
from latent_encoder.requests import parse_request
from latent_encoder.stages import Stages
from latent_encoder.telemetry.health import HEARTBEAT_LIMIT_S, Health
from latent_encoder.telemetry.http_server import http_server
from models import EncodeRequest, SuccessResponse
from service import LatentEncoder
from tests.broker.ports import free_ports
from tests.helpers import IMAGES, RunMain
from tests.kafka_tools import Bench, read_responses, wait_until

ALIVE = {"poll_loop": "ok", "steps": "ok", "threads": "ok", "fetch": "ok"}
READY = dict.fromkeys(["model", "group", "broker", "topics", "responses", "fetch", "machine"], "ok")


class Clock:
    """A clock that is set by hand, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def get(port: int, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, str]:
    """Return the status and the body of a response."""
    connection = HTTPConnection(host, port, timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body


@contextmanager
def served(health: Health, settings: Settings, **changes: Any) -> Iterator[int]:
    """Return the port on which `health` is served."""
    (port,) = free_ports(1)
    with http_server(settings.model_copy(update={"http_port": port, "http_host": "127.0.0.1", **changes}), health):
        yield port


def test_worker_is_alive_until_its_loop_stands_still() -> None:
    """A worker without a first turn is starting; afterwards the last turn must not be too long ago."""
    clock = Clock()
    health = Health(encode_timeout_s=60, now=clock)
    clock.seconds = 10 * HEARTBEAT_LIMIT_S
    assert health.alive().parts == ALIVE
    health.turn()
    clock.seconds += HEARTBEAT_LIMIT_S
    assert health.alive().ok
    clock.seconds += 5
    assert health.alive().parts == ALIVE | {"poll_loop": "no turn for 125 s"}
    health.turn()
    assert health.alive().ok


def test_step_that_takes_too_long_is_hung() -> None:
    """The report has the time since it began; the worker is alive again once it ends."""
    clock = Clock()
    health = Health(encode_timeout_s=60, now=clock)
    with health.busy("encode"):
        clock.seconds = 60
        assert health.alive().ok
        clock.seconds = 61
        assert health.alive().parts == ALIVE | {"steps": "encode takes 61 s (ENCODE_TIMEOUT_S=60)"}
    assert health.alive().ok
    with health.busy("encode"):
        assert health.alive().ok


def test_worker_is_ready_when_all_its_parts_are() -> None:
    """Each part has its own reason."""
    health = Health(encode_timeout_s=60)
    assert set(health.ready().parts) == {"model", "group", "broker"}
    for part in ("model", "group", "broker"):
        assert not health.ready().ok
        health.ready_if(part, None)
    assert health.ready().ok
    health.ready_if("broker", "localhost:9092 cannot be reached")
    assert health.ready().parts == {"model": "ok", "group": "ok", "broker": "localhost:9092 cannot be reached"}
    assert not health.ready().ok


def test_http_says_which_part_it_is(settings: Settings) -> None:
    """The status is 200 or 503, with the reasons as JSON; an unknown path is 404, and POST is not allowed."""
    clock = Clock()
    health = Health(encode_timeout_s=1, now=clock)
    with served(health, settings) as port:
        assert (status := get(port, "/healthz"))[0] == 200
        assert json.loads(status[1]) == {"alive": True, "alive_parts": ALIVE}
        code, body = get(port, "/readyz")
        assert (code, json.loads(body)["ready"]) == (503, False)
        assert json.loads(body)["ready_parts"]["group"] == "not joined yet"
        with health.busy("encode"):
            clock.seconds = 2
            code, body = get(port, "/healthz?verbose")
        assert (code, json.loads(body)["alive_parts"]["steps"]) == (503, "encode takes 2 s (ENCODE_TIMEOUT_S=1)")
        assert get(port, "/")[0] == 404
        assert get(port, "/healthz", "POST")[0] == 405
        assert get(port, "/healthz", "HEAD") == (200, "")
    with pytest.raises(ConnectionRefusedError):
        get(port, "/healthz")


def test_http_on_an_ipv6_address(settings: Settings) -> None:
    """An IPv6 address is a valid host."""
    if not socket.has_ipv6:
        pytest.skip("this system has no IPv6")
    with served(Health(1), settings, http_host="::1") as port:
        assert get(port, "/healthz", host="::1")[0] == 200


def test_client_that_hangs_up_leaves_no_traceback(settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    """A client that sends no HTTP does not hold it up either; the next one is served."""
    with served(Health(1), settings) as port:
        for sent in (b"", b"\x16\x03\x01nonsense\r\n\r\n", b"GET /metrics HTTP/1.1\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closing resets the connection
                client.sendall(sent)
        assert get(port, "/healthz")[0] == 200
    assert capfd.readouterr().err == ""


def test_port_in_use_is_a_setup_error(settings: Settings) -> None:
    """The error names the setting and the remedy."""
    with (
        served(Health(1), settings) as port,
        pytest.raises(SetupError, match=rf"Cannot listen on HTTP_PORT={port} .*; 0 turns it off\."),
        http_server(settings.model_copy(update={"http_port": port, "http_host": "127.0.0.1"}), Health(1)),
    ):
        pass


def request_job(tmp_path: Path, settings: Settings) -> RecordJob:
    fields = {"image_path": str(IMAGES / "photo.jpg"), "output_dir": str(tmp_path)}
    request = parse_request(fields, settings.request_defaults)
    return RecordJob(Incoming("requests", 0, 0, None, None, b"{}", ()), request)


def test_thread_that_ended_is_told(encoder: LatentEncoder) -> None:
    """A worker that lost one of its three threads responds to nothing any more."""
    health = Health(60)
    stages = Stages[RecordJob](encoder, lambda *_: None, health)
    assert health.alive().ok
    stages.close()
    for thread in stages.threads:
        thread.join(10)
    assert health.alive().parts == ALIVE | {"threads": "ended: prepare, encode, write"}


@pytest.mark.core
def test_exit_in_foreign_code_is_an_error_of_that_request(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """A custom node may call `sys.exit`: it must end neither the thread nor the requests that come later."""

    class Exiting(LatentEncoder):
        """An encoder that exits at the first request and serves the others."""

        exited = False

        def prepare(self, request: EncodeRequest, *more: Any) -> Any:
            if not self.exited:
                self.exited = True
                raise SystemExit(1)
            return super().prepare(request, *more)

    outcomes: list[SuccessResponse | BaseException] = []
    stages = Stages[RecordJob](Exiting(settings, encoder.runtime), lambda _, outcome: outcomes.append(outcome), Health(60))
    stages.submit(request_job(tmp_path, settings))
    stages.submit(request_job(tmp_path, settings))
    wait_until(lambda: len(outcomes) == 2, "both outcomes")
    assert all(thread.is_alive() for thread in stages.threads)
    stages.close()
    assert isinstance(outcomes[0], SystemExit)
    assert isinstance(outcomes[1], SuccessResponse)


def test_worker_with_a_hung_encode_is_not_alive(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """A worker is not alive while an encode takes longer than ENCODE_TIMEOUT_S, and alive again once it ends."""
    responses, gate = bench.responses, bench.gate()
    with gate.holding(), bench.worker(encoder, bench.settings(settings, encode_timeout_s=0.5)) as worker:
        health = worker.handler.health
        wait_until(lambda: health.ready().ok, "ready")
        assert health.alive().ok
        bench.send({"request_id": "r"})
        wait_until(lambda: health.alive().parts["steps"].startswith("encode takes "), "the hung encode")
        assert health.ready().ok
        gate.open()
        read_responses(responses, 1)
        wait_until(lambda: health.alive().ok, "the end of it")
        worker.handler.stop()
        wait_until(lambda: health.ready().parts["group"] == "stopping", "the end")


@pytest.mark.core
def test_worker_shows_health_and_metrics(bench: Bench, run_main: RunMain) -> None:
    """A worker's port reports that it becomes ready, its metrics count its requests, and the port closes with it."""
    port, other = map(str, free_ports(2))
    responses = bench.responses
    with bench.process(HTTP_PORT=port) as process:
        wait_until(lambda: run_main("--mode", "health", "--http-port", port).returncode == 0, "a response")
        process.wait_for("ready")
        asked = run_main("--mode", "health", env={"HTTP_PORT": port})
        assert asked.returncode == 0, asked.stderr
        assert json.loads(asked.stdout) == {
            "alive": True,
            "alive_parts": ALIVE,
            "ready": True,
            "ready_parts": READY,
        }
        assert get(int(port), "/readyz")[0] == 200
        bench.send({"request_id": "r", "correlation_id": "c"})
        bench.send({"request_id": "bad", "image_path": "/no"})
        read_responses(responses, 2)
        process.wait_for("request answered", 2)
        metrics = {  # labels come in alphabetical order
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(get(int(port), "/metrics")[1])
            for sample in family.samples
        }
        assert metrics["latent_encoder_requests_total", "", "success"] == 1
        assert metrics["latent_encoder_requests_total", ErrorCode.IMAGE_NOT_FOUND, "error"] == 1
        assert metrics["process_resident_memory_bytes",] > 100e6
        assert metrics["latent_encoder_ready", "broker"] == 1
        assert any(name == "latent_encoder_info" for name, *_ in metrics)
        second = run_main("--mode", "kafka", env={"HTTP_PORT": port, "KAFKA_BOOTSTRAP_SERVERS": bench.servers})
        assert (second.returncode, second.stdout) == (3, "")
        assert f"Cannot listen on HTTP_PORT={port}" in second.stderr
        process.signal(signal.SIGTERM)
        assert process.end() == 0
    gone = run_main("--mode", "health", env={"HTTP_PORT": port})
    assert (gone.returncode, gone.stdout) == (1, "")
    assert gone.stderr == f"Error: No worker responds on HTTP_PORT={port}: [Errno 111] Connection refused.\n"
    assert run_main("--mode", "health", env={"HTTP_PORT": "0"}).returncode == 2
    answered, failed = process.events("request answered")
    assert (answered["request_id"], answered["correlation_id"], answered["outcome"]) == ("r", "c", "success")
    assert {"load_vae", "load_image", "scale", "encode", "save", "topic", "partition", "offset"} <= answered.keys()
    assert (failed["outcome"], failed["error_code"], failed["dead_lettered"]) == ("error", "IMAGE_NOT_FOUND", False)
    assert other != port


def test_answer_of_another_service_is_no_health(run_main: RunMain) -> None:
    """Another program that listens on the port is not taken for a worker."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply() -> None:
            client, _ = server.accept()
            with client:
                client.recv(1000)
                client.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=reply, daemon=True).start()
        port = str(server.getsockname()[1])
        done = run_main("--mode", "health", env={"HTTP_PORT": port})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: No worker responds on HTTP_PORT={port}: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.core
def test_failed_warm_up_ends_the_start(bench: Bench) -> None:
    """A missing VAE stops the worker before it takes requests, all of which would fail."""
    bench.send({"request_id": "r"})
    with bench.process(VAE_MODEL_NAME="none.safetensors") as process:
        assert process.end() == 3
    (last,) = [event["event"] for event in process.log() if event["event"].startswith("Error: ")]
    assert last.startswith("Error: The warm-up failed: VAE model not found: none.safetensors.")
    assert "WARMUP=false" in last
    assert bench.committed() == {}
    with bench.process(VAE_MODEL_NAME="none.safetensors", WARMUP="false"):
        (response,) = read_responses(bench.responses, 1)
    assert response["error_code"] == "VAE_MODEL_NOT_FOUND"


def test_failed_request_keeps_nothing_in_memory(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """Its tensors and its VAE are freed without the garbage collector."""
    held: list[weakref.ref[Any]] = []

    class Failing(LatentEncoder):
        """An encoder that holds a large object when it fails."""

        def prepare(self, request: EncodeRequest, *more: Any) -> Any:  # noqa: ARG002
            pixels = torch.zeros(1)
            held.append(weakref.ref(pixels))
            raise ImageInvalid(f"{request.image_path} does not fit into {pixels.shape}")

    reported: list[str] = []
    stages = Stages[RecordJob](Failing(settings, encoder.runtime), lambda _, result: reported.append(str(result)), Health(60))
    gc.disable()
    try:
        stages.submit(request_job(tmp_path, settings))
        wait_until(lambda: bool(reported), "the outcome")
        wait_until(lambda: held[0]() is None, "the end of what it held")
    finally:
        gc.enable()
        stages.close()


def test_worker_without_a_partition_is_ready(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """A worker that gets no partition, because there are more workers than partitions, is ready as a standby."""
    with bench.worker(encoder, bench.settings(settings)) as first:
        wait_until(lambda: first.handler.health.ready().ok, "the first")
        with bench.worker(encoder, bench.settings(settings)) as second:
            wait_until(lambda: second.handler.health.ready().ok, "the second")
            assert first.handler.health.ready().ok


def test_only_the_encode_has_threads_of_torch(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """Only the encode has several threads: more OpenMP threads than CPUs would slow it down."""
    seen: dict[str, int] = {}

    class Counting(LatentEncoder):
        """An encoder that records how many threads torch uses in each stage."""

        def prepare(self, request: EncodeRequest, *more: Any) -> Any:
            seen["prepare"] = torch.get_num_threads()
            return super().prepare(request, *more)

        def encode_prepared(self, prepared: Any) -> Any:
            seen["encode"] = torch.get_num_threads()
            return super().encode_prepared(prepared)

        def write(self, encoded: Any) -> Any:
            seen["write"] = torch.get_num_threads()
            return super().write(encoded)

    before = torch.get_num_threads()
    done = threading.Event()
    stages = Stages[RecordJob](Counting(settings, encoder.runtime), lambda *_: done.set(), Health(60))
    stages.submit(request_job(tmp_path, settings))
    assert done.wait(60)
    stages.close()
    assert seen == {"prepare": 1, "encode": before, "write": 1}
    assert torch.get_num_threads() == before
