"""Claims in a bucket: waiting for those of killed workers, renewing, removing, and the proof that conditions are heeded."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from config import Settings
from errors import OutputDirNotWritable
from latent_encoder.access import AllowedFolders
from latent_encoder.outputs import claims
from latent_encoder.outputs.bucket import BucketFolder, open_bucket_folder
from latent_encoder.outputs.locks import key_of
from latent_encoder.outputs.run_requests import files_of
from latent_encoder.storage.locations import ObjectPath
from models import EncodeRequest
from service import LatentEncoder
from tests.storage.conftest import Bucket

MakeWorker = Callable[..., LatentEncoder]
Ask = Callable[..., EncodeRequest]


def test_the_claims_of_a_killed_worker_are_waited_for_together(
    bucket: Bucket, worker: MakeWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several claims that nobody renews are taken over after the wait for the first, if all are in the folder by then."""
    monkeypatch.setattr(claims, "CLAIM_S", 3.0)
    monkeypatch.setattr(claims, "RENEW_S", 1.0)
    monkeypatch.setattr(claims, "QUICK_S", 0.2)
    requests = [ask(bucket.add(), f"{bucket.url}/out", request_id=f"r{number}") for number in range(4)]
    for request in requests:
        claims.Claim(folder_of(request), key_of(files_of(request).shared_name)).take("it")
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(claims, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    for request in requests:
        worker().encode(request)
    assert 0 < sum(pauses) < 2 * 3.0
    assert not [name for name in bucket.names() if name.endswith(".lock")]


def folder_of(request: EncodeRequest) -> BucketFolder:
    return open_bucket_folder(ObjectPath(request.output_dir), AllowedFolders.of_outputs(Settings(_env_file=None)))


def test_a_claim_that_changes_is_not_taken_over(bucket: Bucket, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that was seen long ago, and that its process renewed since, is waited for anew."""
    monkeypatch.setattr(claims, "CLAIM_S", 1.0)
    folder = folder_of(ask(bucket.add(), f"{bucket.url}/out"))
    held = claims.Claim(folder, "0" * 16)
    held.take("it")
    claims.see_others(folder)
    time.sleep(0.7)
    held.renew()
    with pytest.raises(OutputDirNotWritable, match="another process has been writing"):
        claims.Claim(folder, "0" * 16).take("it", wait_s=0.6)
    held.renew()


def test_the_removal_of_a_claim_is_tried_again(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """A claim is gone although the call that removes it failed once."""
    bucket.proxy.fault("drop", "DELETE", "lock")
    worker().encode(ask(bucket.add(), f"{bucket.url}/out"))
    assert not [name for name in bucket.names() if name.endswith(".lock")]


def test_conditions_are_proved_once_by_several_threads(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """Requests that are the first ones at the same time find out once that the server heeds conditions."""
    requests = [ask(bucket.add(), f"{bucket.url}/out", request_id=f"r{number}") for number in range(4)]
    client = worker()
    encoded = [client.encode_prepared(client.prepare(request)) for request in requests]
    bucket.proxy.latency_s = 0.05
    with ThreadPoolExecutor() as pool:
        list(pool.map(client.write, encoded))
    assert sum(call.method == "PUT" and "lock" in call.path and call.status == 412 for call in bucket.proxy.calls) == 1


def test_files_of_a_failed_publication_are_not_own(bucket: Bucket, worker: MakeWorker, ask: Ask) -> None:
    """Files that appeared although their publication failed stay if another worker may have sent a response with them."""
    client, out = worker(storage_max_retries=0), f"{bucket.url}/out"
    requests = [ask(bucket.add(), out, megapixels=megapixels) for megapixels in (0.02, 0.03)]
    failing, later = [client.encode_prepared(client.prepare(request)) for request in requests]
    lost = bucket.proxy.fault("lose", "PUT", r"\.json$")
    lost.then = away = bucket.proxy.fault("status", "GET", r"\.json$", times=0, status=500)
    with pytest.raises(OutputDirNotWritable):
        client.write(failing)
    away.times = 0
    sent = worker().stored_response(requests[0])
    assert sent is not None
    with pytest.raises(OutputDirNotWritable, match="another process has written other files"):
        client.write(later)
    assert worker().stored_response(requests[0]) == sent
