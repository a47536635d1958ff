"""Workers that are killed while they write into a bucket."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from latent_encoder.outputs import claims
from models import EncodeRequest
from service import LatentEncoder
from tests.helpers import COMFYUI, PATIENCE_S, PROJECT, VAE, clean_environment
from tests.storage.conftest import Bucket
from tests.storage.test_buckets import assert_whole


@pytest.mark.parametrize("path", ["lock", r"\.pt$", "scaled_image", r"\.json$"])
@pytest.mark.parametrize("kind", ["hold", "lose"])
def test_a_killed_worker_leaves_nothing_that_a_reader_trusts(
    bucket: Bucket,
    worker: Callable[..., LatentEncoder],
    ask: Callable[..., EncodeRequest],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    kind: str,
) -> None:
    """A worker that is killed at any write leaves no metadata without whole files, and the next one writes them all.

    `hold` kills it before the storage has done the write, `lose` after that and before the response.
    """
    monkeypatch.setattr(claims, "CLAIM_S", 0.5)
    image, out = bucket.add(), f"{bucket.url}/out"
    met = bucket.proxy.fault(kind, "PUT", path)  # type: ignore[arg-type]
    stopped = bucket.proxy.fault("hold", "PUT", "", times=0)
    if kind == "lose":  # the repetition of the write, or the next one, waits
        met.then = stopped
    command = [sys.executable, str(PROJECT / "main.py"), "--image_path", image, "--output_dir", out, "--request_id", "test"]
    command += ["--megapixels", "0.02", "--vae_model_name", VAE]
    environment = {**clean_environment(), **bucket.environment, "COMFYUI_PATH": str(COMFYUI), "DEVICE": "cpu"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert (stopped if kind == "lose" else met).met.wait(PATIENCE_S)
        process.send_signal(signal.SIGKILL)
        process.wait()
    met.release.set()
    stopped.times = 0
    stopped.release.set()
    request = ask(image, out)
    stored = worker().stored_response(request)
    has_metadata = any(name.endswith(".json") for name in bucket.names())
    assert has_metadata == (path == r"\.json$" and kind == "lose")
    if stored is not None:
        assert_whole(bucket, stored)
    response = stored or worker().encode(request)
    assert_whole(bucket, response)
