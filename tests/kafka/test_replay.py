"""Dead letters sent back: the chosen ones, unchanged, each once in a run."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from errors import ErrorCode, KafkaFailed
from latent_encoder.kafka.records import DLQ_HEADERS
from latent_encoder.kafka.replay import Replay, ReplayTally, Selection
from service import LatentEncoder
from tests.helpers import RunMain
from tests.kafka_tools import Bench, read_responses

GOOD_HEADERS = (("tenant", b"\xff"),)


@pytest.fixture
def filled(bench: Bench, encoder: LatentEncoder, settings: Settings) -> Bench:
    """Make two dead letters for a folder that cannot be written, three for unusable messages, and a foreign record."""
    (bench.folder / "file").touch()
    with bench.worker(encoder, bench.settings(settings, kafka_max_retries=0)):
        for n in range(2):
            bench.send({"request_id": f"r{n}", "output_dir": str(bench.folder / "file")}, key=b"k", headers=GOOD_HEADERS)
        for n in range(3):
            bench.send(f"not JSON {n}".encode())
        bench.dead_letters.take(5)
        bench.wait_for_commit({0: 5})
    own_topic, bench.request_topic = bench.request_topic, bench.dlq_topic
    bench.send(b"foreign", headers=(("dlq.error.code", b"IMAGE_INVALID"),))
    bench.request_topic = own_topic
    return bench


def replay(
    bench: Bench, settings: Settings, *, dry_run: bool = False, **selection: Any
) -> tuple[ReplayTally, list[dict[str, Any]]]:
    lines: list[str] = []
    tally = Replay(bench.settings(settings), Selection(**selection), dry_run, lines.append).run()
    return tally, [json.loads(line) for line in lines]


def test_dead_letters_go_back_as_they_were(filled: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """Key, value and headers are the original's; the cause is gone, so the requests succeed now."""
    (filled.folder / "file").unlink()
    tally, lines = replay(filled, settings, error_codes=frozenset({ErrorCode.OUTPUT_DIR_NOT_WRITABLE}))
    assert tally == ReplayTally(read=6, foreign=1, chosen=2, sent=2)
    requests = filled.topic(filled.request_topic).take(7)
    for original, again in zip(requests[:2], requests[5:], strict=True):
        assert (again.key, again.value, again.headers) == (original.key, original.value, GOOD_HEADERS)
    for n, line in enumerate(lines):
        assert "Cannot write to output folder" in line.pop("error_message")
        assert line == {
            "action": "sent",
            "dead_letter": f"{filled.dlq_topic}/0/{n}",
            "request": f"{filled.request_topic}/0/{n}",
            "error_code": "OUTPUT_DIR_NOT_WRITABLE",
        }
    responses = filled.responses
    with filled.worker(encoder, filled.settings(settings)):
        got = read_responses(responses, 4)
    assert [response["status"] for response in got if response["request_id"] in ("r0", "r1")] == ["error"] * 2 + [
        "success"
    ] * 2


def test_each_is_sent_once_though_it_fails_again(filled: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """Dead letters that a worker makes of them meanwhile are left to the next run, and their headers are new."""
    with filled.worker(encoder, filled.settings(settings, kafka_max_retries=0)):
        tally, _ = replay(filled, settings)
        assert (tally.chosen, tally.sent) == (5, 5)
        letters = filled.dead_letters.take(11)
    assert len(filled.topic(filled.request_topic).all_within(1)) == 10
    for letter in letters[6:]:
        names = [name for name, _ in letter.headers]
        assert len(names) == len(set(names))
        assert set(DLQ_HEADERS) <= set(names)
        assert int(dict(letter.headers)["dlq.original.offset"] or b"") >= 5


def test_limit_time_and_dry_run(filled: Bench, settings: Settings) -> None:
    """The limit counts chosen ones, `since` is the dead letter's time, and a dry run reports and sends nothing."""
    tally, lines = replay(filled, settings, limit=1, error_codes=frozenset({ErrorCode.MESSAGE_UNUSABLE}), dry_run=True)
    assert (tally.chosen, tally.sent) == (1, 0)
    assert [line["action"] for line in lines] == ["would be sent"]
    assert replay(filled, settings, limit=2)[0].sent == 2
    now = datetime.now(UTC)
    assert replay(filled, settings, since=now + timedelta(minutes=1))[0].chosen == 0
    assert replay(filled, settings, since=now - timedelta(minutes=5), dry_run=True)[0].chosen == 5
    assert len(filled.topic(filled.request_topic).all_within(1)) == 5 + 2


def test_command_prints_what_it_did(filled: Bench, run_main: RunMain) -> None:
    """Standard output has a line of JSON for each, standard error the tally."""
    environment = {
        "KAFKA_BOOTSTRAP_SERVERS": filled.servers,
        "KAFKA_DLQ_TOPIC": filled.dlq_topic,
        "KAFKA_TRANSACTIONAL_ID": "the-workers",
    }
    arguments = ("--mode", "dlq-replay", "--error-code", "MESSAGE_UNUSABLE", "--error-code", "IMAGE_INVALID", "--limit", "2")
    done = run_main(*arguments, "--since", "2026-01-01T00:00:00Z", env=environment)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["action"] for line in done.stdout.splitlines()] == ["sent", "sent"]
    assert done.stderr.splitlines()[-1].endswith("2 chosen, 2 sent, 0 refused.")


def test_full_standard_output_ends_the_replay_with_a_true_tally(filled: Bench, run_main: RunMain) -> None:
    """The status is 3, and the topic has as many records as the tally counts."""
    environment = {"KAFKA_BOOTSTRAP_SERVERS": filled.servers, "KAFKA_DLQ_TOPIC": filled.dlq_topic}
    requests = filled.topic(filled.request_topic)
    requests.take(5)
    done = run_main("--mode", "dlq-replay", env=environment, prefix=["sh", "-c", 'exec "$@" >/dev/full', "sh"])
    assert done.returncode == 3
    told = re.fullmatch(
        r"Error: Cannot write to standard output \(No space left on device\)\. So far: .* (\d+) sent, 0 refused\.",
        done.stderr.splitlines()[-1],
    )
    assert told is not None, done.stderr
    assert int(told[1]) > 0
    assert len(requests.all_within(2)) == 5 + int(told[1])


@pytest.mark.usefixtures("apache_kafka")
def test_topic_that_is_gone_is_refused(filled: Bench, run_main: RunMain) -> None:
    """If the original topic is gone, each record is reported as refused, with the reason, and the status is 1."""
    for deleted in filled.admin.delete_topics([filled.request_topic]).values():
        deleted.result()
    properties = filled.folder / "client.properties"
    properties.write_text("topic.metadata.propagation.max.ms=500\n")
    environment = {
        "KAFKA_BOOTSTRAP_SERVERS": filled.servers,
        "KAFKA_DLQ_TOPIC": filled.dlq_topic,
        "KAFKA_CLIENT_CONFIG": str(properties),
    }
    done = run_main("--mode", "dlq-replay", "--limit", "1", env=environment)
    assert done.returncode == 1
    (line,) = map(json.loads, done.stdout.splitlines())
    assert line["action"] == "refused"
    assert "nknown topic" in line["reason"]


def test_missing_dlq_topic_is_said(bench: Bench, settings: Settings) -> None:
    """The error has the setting that names the topic."""
    bench.dlq_topic = "no-such-topic"
    with pytest.raises(KafkaFailed, match="Topic no-such-topic does not exist; KAFKA_DLQ_TOPIC"):
        replay(bench, settings)


def test_broker_that_cannot_be_reached_is_said(run_main: RunMain, tmp_path: Path) -> None:
    """The error is one line, and the status is 3."""
    done = run_main("--mode", "dlq-replay", "--kafka-bootstrap-servers", "127.0.0.1:1")
    assert done.returncode == 3
    assert done.stderr.startswith("Error: Cannot read topic latent-encoder-requests-dlq at 127.0.0.1:1: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
