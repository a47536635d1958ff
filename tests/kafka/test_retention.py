"""OUTPUT_TTL_DAYS in a worker: expired files go, and those of a request in flight stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from config import Settings
from latent_encoder.access import ANYWHERE
from latent_encoder.outputs.expiry import Sweep
from service import LatentEncoder
from tests.broker import ApacheKafka
from tests.kafka_tools import Bench, Events, MakeBench, read_responses, wait_until
from tests.outputs.test_expiry import DAY_S, age


@pytest.fixture
def forgetting(encoder: LatentEncoder, settings: Settings) -> tuple[LatentEncoder, Settings]:
    """Return an encoder and its settings, with files that are removed after a day."""
    settings = settings.model_copy(update={"output_ttl_days": 1.0})
    return LatentEncoder(settings, encoder.runtime), settings


def expired_sets() -> float:
    return REGISTRY.get_sample_value("latent_encoder_expired_sets_total") or 0.0


def test_worker_removes_expired_files(
    bench: Bench, forgetting: tuple[LatentEncoder, Settings], events: Events, tmp_path: Path
) -> None:
    """It removes, counts and logs the files of two days before; a request that comes again is encoded anew."""
    encoder, settings = forgetting
    before = expired_sets()
    responses = bench.responses
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": "r"})
        (first,) = read_responses(responses, 1)
        bench.wait_for_commit({0: 1})
    age(f"{first['latent_file_path']}.json")
    with bench.worker(encoder, bench.settings(settings)):
        wait_until(lambda: expired_sets() == before + 1, "the sweep")
        bench.send({"request_id": "r"})
        second = read_responses(responses, 2)[1]
    (event,) = events("expired output files removed")
    assert (event["sets"], event["files"], event["folder"]) == (1, 3, str(tmp_path / "output"))
    assert [event["redelivered"] for event in events("request answered")] == [False, False]
    assert second["metadata"]["latent_sha256"] == first["metadata"]["latent_sha256"]


def test_files_stay_for_ever_by_default(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """Without the setting a worker removes nothing."""
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": "r"})
        (first,) = read_responses(bench.responses, 1)
        age(f"{first['latent_file_path']}.json")
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": "another"})
        read_responses(bench.responses, 2)
    assert Path(first["latent_file_path"]).exists()


def test_repeated_request_keeps_its_files_for_another_day(
    bench: Bench, forgetting: tuple[LatentEncoder, Settings], events: Events
) -> None:
    """The time begins anew with each stored response."""
    encoder, settings = forgetting
    responses = bench.responses
    with bench.worker(encoder, bench.settings(settings)):
        bench.send({"request_id": "r"})
        (first,) = read_responses(responses, 1)
        metadata = Path(f"{first['latent_file_path']}.json")
        os.utime(metadata, (0, 0))
        bench.send({"request_id": "r"})
        assert read_responses(responses, 2)[1]["metadata"] == first["metadata"]
    assert metadata.stat().st_mtime > DAY_S
    assert [event["redelivered"] for event in events("request answered")] == [False, True]


def test_files_of_a_request_in_flight_stay(
    own: ApacheKafka, make_bench: MakeBench, forgetting: tuple[LatentEncoder, Settings]
) -> None:
    """While a response waits for a broker that does not respond, its files stay, however old; they go after the job ended."""
    bench = make_bench(servers=own.bootstrap_servers)
    encoder, settings = forgetting
    folder, gate = bench.folder / "output", bench.gate()

    def removed_by_another_worker() -> int:
        sweep = Sweep(DAY_S, 10)
        sweep.run(folder, ANYWHERE)
        return sweep.removed.sets

    with gate.holding(), bench.worker(encoder, bench.settings(settings, shutdown_timeout_s=1.0)) as worker:
        bench.send({"request_id": "r"})
        gate.wait()
        own.freeze()
        gate.open()
        lanes = worker.handler._lanes
        wait_until(lambda: any(lanes.ready()) or bool(lanes.sent_before(float("inf"))), "a response")
        (metadata,) = folder.glob("*.json")
        age(metadata)
        assert removed_by_another_worker() == 0
        worker.handler.stop()
        worker.end()
    assert removed_by_another_worker() == 1
