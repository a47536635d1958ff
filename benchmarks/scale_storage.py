"""Calls of a worker to object storage: their times on a local S3 server, and the round trips of each step of a request."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

from benchmarks.stage_runs import Observed
from config import Settings
from tests.helpers import IMAGES
from tests.storage.faulty_proxy import FaultyProxy
from tests.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

BUCKET = "scale"
LATENCY_S = 0.1  # long beside the work of a step, so that the round trips of a step can be counted by its time
REQUESTS = 8
STEPS = ("prepare", "encode", "write")


def measure_storage() -> dict[str, object]:
    """Return seconds of each step without and with latency, its round trips, and the calls of a request."""
    with tempfile.TemporaryDirectory(prefix="scale-storage-") as name, S3Server(Path(name) / "s3") as server:
        (server.data / BUCKET / "in").mkdir(parents=True)
        (server.data / BUCKET / "in" / "a.png").write_bytes((IMAGES / "astronaut.png").read_bytes())
        with FaultyProxy(server.port) as proxy:
            os.environ |= {
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "AWS_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
                "AWS_ALLOW_HTTP": "true",
            }
            settings = Settings(_env_file=None, device="cpu", vae_model_name="tiny_qwen_vae.safetensors", megapixels=0.05)
            encoder = Observed.set_up(settings)
            assert isinstance(encoder, Observed)
            times_of(encoder, "warm-up")
            near = times_of(encoder, "near")
            proxy.latency_s = LATENCY_S
            proxy.calls.clear()
            far = times_of(encoder, "far")
            calls = Counter(call.method for call in proxy.calls)
    return {
        "seconds": near,
        "round_trips": {step: round((far[step] - near[step]) / LATENCY_S, 1) for step in (*STEPS, "look")},
        "calls": {method: count / REQUESTS for method, count in sorted(calls.items())},
    }


def times_of(encoder: Observed, folder: str) -> dict[str, float]:
    """Return the median seconds of each step of some requests; `look` is for a stored response."""
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(step: str, call: object, *arguments: object) -> object:
        began = time.perf_counter()
        result = call(*arguments)  # type: ignore[operator]
        seconds[step].append(time.perf_counter() - began)
        return result

    from latent_encoder.requests import parse_request

    for number in range(REQUESTS):
        given = {"image_path": f"s3://{BUCKET}/in/a.png", "output_dir": f"s3://{BUCKET}/{folder}", "request_id": f"r{number}"}
        request = parse_request(given, encoder._settings.request_defaults)
        timed("look", encoder.stored_response, request, "origin")
        prepared = timed("prepare", encoder.prepare, request, "origin")
        encoded = timed("encode", encoder.encode_prepared, prepared)
        timed("write", encoder.write, encoded)
    return {step: median(times) for step, times in seconds.items()}
