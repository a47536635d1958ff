"""Dead letters sent back: the chosen ones, unchanged, each at most once in all replays."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, Producer, TopicPartition

from config import Settings
from errors import ErrorCode, KafkaFailed, MessageUnusable, OutputDirNotWritable, RequestCrashesWorker, RequestError
from latent_encoder.kafka.places import Places
from latent_encoder.kafka.records import DLQ_HEADERS, REPLAY_HEADERS, VALUE_OMITTED, Headers, Incoming, dead_letter
from latent_encoder.kafka.replay import Replay, ReplayTally, Selection
from latent_encoder.kafka.replay_memory import ReplayMemory
from service import LatentEncoder
from tests.broker.apache_kafka import ApacheKafka
from tests.helpers import IMAGES, PROJECT, RunMain, clean_environment
from tests.kafka_tools import QUIET, Bench, MakeBench, read_responses, wait_until

pytestmark = pytest.mark.usefixtures("apache_kafka")  # a replay needs transactions

GOOD_HEADERS = (("tenant", b"\xff"),)
NOT_WRITABLE = frozenset({ErrorCode.OUTPUT_DIR_NOT_WRITABLE})


@pytest.fixture
def filled(bench: Bench, encoder: LatentEncoder, settings: Settings) -> Bench:
    """Make two dead letters for a folder that cannot be written, three for unusable messages, and a foreign record."""
    (bench.folder / "file").touch()
    with failing_worker(bench, encoder, settings):
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


def failing_worker(bench: Bench, encoder: LatentEncoder, settings: Settings) -> Any:
    """Return a worker that makes a dead letter of each failure at once."""
    return bench.worker(encoder, bench.settings(settings, kafka_max_retries=0))


def put_letters(
    bench: Bench,
    settings: Settings,
    *ids: str,
    error: RequestError | None = None,
    partition: int = 0,
    topic: str | None = None,
    headers: Headers = (),
) -> None:
    """Write the dead letters of requests with these ids, each in a transaction, which leaves an offset without a record."""
    producer = Producer({**QUIET, "bootstrap.servers": bench.servers, "transactional.id": bench.group})
    producer.init_transactions()
    for n, name in enumerate(ids):
        value = json.dumps({"request_id": name, "image_path": str(IMAGES / "photo.jpg")}).encode()
        record = Incoming(topic or bench.request_topic, 0, n, None, None, value, ())
        letter = dead_letter(record, error or OutputDirNotWritable("full"), 4, settings)
        producer.begin_transaction()
        all_headers: list[tuple[str, str | bytes | None]] = [*letter.headers, *headers]
        producer.produce(letter.topic, value=letter.value, headers=all_headers, partition=partition)
        producer.commit_transaction()


def replay(
    bench: Bench, settings: Settings, *, dry_run: bool = False, rate: float | None = None, **selection: Any
) -> tuple[ReplayTally, list[dict[str, Any]]]:
    lines: list[str] = []
    tally = Replay(bench.settings(settings), Selection(**selection), dry_run, lines.append, rate).run()
    return tally, [json.loads(line) for line in lines]


def environment_of(bench: Bench) -> dict[str, str]:
    return {
        "KAFKA_BOOTSTRAP_SERVERS": bench.servers,
        "KAFKA_REQUEST_TOPIC": bench.request_topic,
        "KAFKA_DLQ_TOPIC": bench.dlq_topic,
        "KAFKA_CONSUMER_GROUP": bench.group,
    }


class Command:
    """A replay as a process."""

    def __init__(self, bench: Bench, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, PROJECT / "main.py", "--mode", "dlq-replay", *arguments],
            env=clean_environment() | environment_of(bench),
            cwd=bench.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def first_lines(self, count: int) -> list[dict[str, Any]]:
        assert self.popen.stdout is not None
        return [json.loads(self.popen.stdout.readline()) for _ in range(count)]

    def end(self) -> tuple[int, list[dict[str, Any]], str]:
        """Wait for the end, and return the status, the remaining lines and the last line of standard error."""
        stdout, stderr = self.popen.communicate(timeout=120)
        return self.popen.returncode, [json.loads(line) for line in stdout.splitlines()], stderr.splitlines()[-1]


@contextmanager
def command(bench: Bench, *arguments: str) -> Iterator[Command]:
    """Run a replay as a process, and kill it at the end if it is still there."""
    started = Command(bench, *arguments)
    try:
        yield started
    finally:
        if started.popen.poll() is None:
            os.kill(started.popen.pid, signal.SIGKILL)
        started.popen.communicate()


def ids_of(records: list[Incoming]) -> list[str]:
    return [json.loads(record.value or b"")["request_id"] for record in records]


# Never more than once


def test_letters_that_keep_failing_do_not_double(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """Two letters are 4, 6 and 8 after one, two and three replays that fail: each replay sends the two newest."""
    (bench.folder / "file").touch()
    letters = bench.dead_letters
    with failing_worker(bench, encoder, settings):
        for n in range(2):
            bench.send({"request_id": f"r{n}", "output_dir": str(bench.folder / "file")})
        letters.take(2)
        for replays in (1, 2, 3):
            tally, _ = replay(bench, settings)
            assert (tally.chosen, tally.sent) == (2, 2)
            letters.take(2 + 2 * replays)
            wait_until(lambda: bench.committed() != {}, "a commit")
    assert len(letters.all_within(1)) == 8


def test_again_does_not_double_either(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """Letters with a successor are left to it, also if the group's offsets are gone; a success is sent again on demand."""
    (bench.folder / "file").touch()
    letters = bench.dead_letters
    with failing_worker(bench, encoder, settings):
        bench.send({"request_id": "r", "output_dir": str(bench.folder / "file")})
        letters.take(1)
        for replays in (1, 2):
            assert replay(bench, settings, again=True)[0].sent == 1
            letters.take(1 + replays)
        bench.admin.delete_consumer_groups([f"{bench.group}-dlq-replay"])[f"{bench.group}-dlq-replay"].result()
        assert replay(bench, settings)[0] == ReplayTally(read=3, sent_before=2, chosen=1, sent=1)
        letters.take(4)
        (bench.folder / "file").unlink()
        responses = bench.responses
        assert replay(bench, settings)[0].sent == 1
        assert read_responses(responses, 5)[-1]["status"] == "success"
        assert replay(bench, settings)[0] == ReplayTally(read=4, sent_before=4)
        assert replay(bench, settings, again=True)[0] == ReplayTally(read=4, sent_before=3, chosen=1, sent=1)
        assert read_responses(responses, 6)[-1]["status"] == "success"


def test_request_without_an_id_keeps_its_id_and_files(bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """Every response has the id of the first one, and the files are those of one request."""
    (bench.folder / "output").touch()
    letters, responses = bench.dead_letters, bench.responses
    with failing_worker(bench, encoder, settings):
        bench.send({})
        letters.take(1)
        assert replay(bench, settings)[0].sent == 1
        letters.take(2)
        (bench.folder / "output").unlink()
        assert replay(bench, settings)[0].sent == 1
        read_responses(responses, 3)
        assert replay(bench, settings, again=True)[0].sent == 1
        got = read_responses(responses, 4)
    assert [response["status"] for response in got] == ["error", "error", "success", "success"]
    (request_id,) = {response["request_id"] for response in got}
    names = sorted(path.name for path in (bench.folder / "output").iterdir())
    assert len(names) == 3
    assert all(request_id in name for name in names)
    (*_, last) = bench.topic(bench.request_topic).take(4)
    assert [dict(last.headers)[name] for name in ("dlq.replays", "dlq.attempts")] == [b"2", b"2"]


@pytest.mark.parametrize("forged", [b"", b"\xff", b"a\0b", None], ids=["empty", "not UTF-8", "NUL", "null"])
def test_forged_id_is_not_used(forged: bytes | None, bench: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """A header that is no valid id counts as absent, and forged counts as zero; the request is encoded as usual."""
    headers = (("dlq.request.id", forged), ("dlq.replays", b"9" * 5000), ("dlq.attempts", b"-1"), ("dlq.replay.of", b"\xff"))
    responses = bench.responses
    with failing_worker(bench, encoder, settings):
        bench.send({}, headers=headers)
        bench.send({"request_id": "own"}, headers=(("dlq.request.id", b"other"),))
        bench.send({"output_dir": str(IMAGES / "photo.jpg")}, headers=headers)
        first, own, failed = read_responses(responses, 3)
    assert (first["status"], own["request_id"], failed["status"]) == ("success", "own", "error")
    assert re.fullmatch("[0-9a-f-]{36}", first["request_id"])
    tally, (line,) = replay(bench, settings)
    assert (tally.sent, line["replays"], line["attempts"], line["request_id"]) == (1, 0, 1, failed["request_id"])


def test_forged_successor_holds_nothing_back(bench: Bench, settings: Settings) -> None:
    """A letter that names another request's letter as its predecessor does not stand for it."""
    put_letters(bench, bench.settings(settings), "victim")
    put_letters(bench, bench.settings(settings), "attacker", headers=(("dlq.replay.of", f"{bench.dlq_topic}/0/0".encode()),))
    assert replay(bench, settings)[0] == ReplayTally(read=2, chosen=2, sent=2)


def test_killed_replay_is_continued(bench: Bench, settings: Settings) -> None:
    """Each letter is sent exactly once, wherever the kill falls."""
    names = [f"r{n}" for n in range(30)]
    put_letters(bench, bench.settings(settings), *names)
    for lines in (1, 7, 4):
        with command(bench, "--rate", "30") as killed:
            killed.first_lines(lines)
            killed.popen.kill()
    tally, _ = replay(bench, settings)
    assert (tally.read, tally.sent + tally.sent_before) == (30, 30)
    assert ids_of(bench.topic(bench.request_topic).take(30)) == names
    assert replay(bench, settings)[0] == ReplayTally(read=30, sent_before=30)
    assert bench.topic(bench.request_topic).take(30)


def test_second_replay_takes_over(bench: Bench, settings: Settings) -> None:
    """The first one ends with status 3 and a true tally, and no letter is sent by both."""
    names = [f"r{n}" for n in range(20)]
    put_letters(bench, bench.settings(settings), *names)
    requests = bench.topic(bench.request_topic)
    with command(bench, "--rate", "4") as first:
        seen = first.first_lines(2)
        tally, lines = replay(bench, settings)
        status, more, error = first.end()
    assert status == 3
    assert f"Another replay of group {bench.group} has begun" in error
    assert f" {len(seen + more)} sent, " in error
    assert tally.sent == len(lines) == 20 - len(seen + more)
    assert sorted(ids_of(requests.all_within(2))) == sorted(names)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_replay_counts_what_it_sent(number: int, status: int, bench: Bench, settings: Settings) -> None:
    """The tally is true, and the next replay sends the others."""
    put_letters(bench, bench.settings(settings), *(f"r{n}" for n in range(20)))
    requests = bench.topic(bench.request_topic)
    with command(bench, "--rate", "5") as interrupted:
        seen = interrupted.first_lines(2)
        interrupted.popen.send_signal(number)
        ended, more, error = interrupted.end()
    assert ended == status
    assert error.startswith("Error: Interrupted. So far: ")
    assert f" {len(seen + more)} sent, " in error
    assert len(requests.all_within(1)) == len(seen + more)
    assert replay(bench, settings)[0].sent == 20 - len(seen + more)


def test_broker_that_comes_back(make_bench: MakeBench, own: ApacheKafka, settings: Settings) -> None:
    """A replay waits for a broker that is killed and started again; each letter is sent exactly once."""
    bench = make_bench(servers=own.bootstrap_servers)
    put_letters(bench, bench.settings(settings), *(f"r{n}" for n in range(20)))
    with command(bench, "--rate", "10") as run:
        seen = run.first_lines(3)
        own.kill()
        own.start()
        status, more, error = run.end()
    assert (status, len(seen + more)) == (0, 20), error
    assert Counter(ids_of(bench.topic(bench.request_topic).take(20))) == Counter(f"r{n}" for n in range(20))


# The choice


@pytest.fixture
def mixed(make_bench: MakeBench, settings: Settings) -> Bench:
    """Put a letter each of a and b into partition 0, of c and d into partition 1, and an unusable one into each."""
    bench = make_bench(partitions=2)
    for partition, ids in enumerate(("ab", "cd")):
        put_letters(bench, bench.settings(settings), *ids, partition=partition)
        put_letters(bench, bench.settings(settings), "x", partition=partition, error=MessageUnusable("broken"))
    return bench


def sent_ids(lines: list[dict[str, Any]]) -> list[str]:
    return sorted(line["request_id"] for line in lines if line["action"] == "sent")


def test_unusable_letters_are_left_out(mixed: Bench, settings: Settings) -> None:
    """They are counted, and sent only if their code is asked for; then once, as all."""
    tally, lines = replay(mixed, settings)
    assert (tally, sent_ids(lines)) == (ReplayTally(read=6, left_out=2, chosen=4, sent=4), ["a", "b", "c", "d"])
    assert replay(mixed, settings)[0] == ReplayTally(read=6, left_out=2, sent_before=4)
    codes = frozenset({ErrorCode.MESSAGE_UNUSABLE})
    assert replay(mixed, settings, error_codes=codes)[0] == ReplayTally(read=6, chosen=2, sent=2)
    assert replay(mixed, settings)[0] == ReplayTally(read=6, sent_before=6)
    assert offsets(mixed) == {0: (5, ""), 1: (5, "")}


def offsets(bench: Bench) -> dict[int, tuple[int, str]]:
    """Return the committed offset and metadata of the replays in each partition."""
    group = f"{bench.group}-dlq-replay"
    wanted = [TopicPartition(bench.dlq_topic, n) for n in range(bench.partitions)]
    found = bench.admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group, wanted)], require_stable=True)[
        group
    ].result()
    return {place.partition: (place.offset, place.metadata or "") for place in found.topic_partitions}


def test_choice_by_request_id(mixed: Bench, settings: Settings) -> None:
    """Only that request is sent; the next replay sends the others, wherever they stand."""
    assert sent_ids(replay(mixed, settings, request_id="b")[1]) == ["b"]
    assert sent_ids(replay(mixed, settings)[1]) == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("places", "ids"),
    [(("1",), ["c", "d"]), (("0/2",), ["b"]), (("1/0-1", "0/2-9"), ["b", "c"]), (("0/1",), []), (("7",), [])],
)
def test_choice_by_place(places: tuple[str, ...], ids: list[str], mixed: Bench, settings: Settings) -> None:
    """A partition, an offset, stretches of offsets; an offset without a letter is no error."""
    assert sent_ids(replay(mixed, settings, places=tuple(map(Places.of, places)))[1]) == ids


def test_choice_by_time(bench: Bench, settings: Settings) -> None:
    """A letter that is written at `since` is taken, one that is written at `until` is not."""
    for name in "abc":
        put_letters(bench, bench.settings(settings), name)
    times = [datetime.fromtimestamp((letter.timestamp or 0) / 1000, UTC) for letter in bench.dead_letters.take(3)]
    assert times[0] < times[1] < times[2]
    assert sent_ids(replay(bench, settings, since=times[1], until=times[2])[1]) == ["b"]
    assert sent_ids(replay(bench, settings, until=times[1])[1]) == ["a"]
    assert sent_ids(replay(bench, settings, since=times[1])[1]) == ["c"]


def test_rate(bench: Bench, settings: Settings) -> None:
    """Ten letters at 5 in a second take at least the 1.8 s between the first and the last."""
    put_letters(bench, bench.settings(settings), *(f"r{n}" for n in range(10)))
    begun = time.monotonic()
    assert replay(bench, settings, rate=5)[0].sent == 10
    assert time.monotonic() - begun >= 1.8


def test_dry_run_lists_letters_and_their_history(mixed: Bench, settings: Settings) -> None:
    """Each letter has its facts and the action that a replay would take; nothing is sent or remembered."""
    replay(mixed, settings, request_id="a")
    before = offsets(mixed)
    tally, lines = replay(mixed, settings, dry_run=True)
    assert tally == ReplayTally(read=6, sent_before=1, left_out=2, chosen=3)
    found = {line["request_id"] + str(line["dead_letter"].split("/")[1]): line for line in lines}
    actions = {name: line["action"] for name, line in found.items()}
    assert actions == {
        "a0": "sent before",
        "b0": "would be sent",
        "c1": "would be sent",
        "d1": "would be sent",
        "x0": "left out",
        "x1": "left out",
    }
    assert 0 <= found["b0"].pop("age_s") < 60
    assert found["b0"] == {
        "action": "would be sent",
        "dead_letter": f"{mixed.dlq_topic}/0/2",
        "request": f"{mixed.request_topic}/0/1",
        "key": None,
        "request_id": "b",
        "error_code": "OUTPUT_DIR_NOT_WRITABLE",
        "error_message": "full",
        "attempts": 4,
        "replays": 0,
    }
    assert offsets(mixed) == before
    assert len(mixed.topic(mixed.request_topic).all_within(1)) == 1


def test_requests_that_crash_workers_are_left_out(bench: Bench, settings: Settings) -> None:
    """No replay brings the workers down by accident; after a move to larger workers, their code chooses them."""
    put_letters(bench, bench.settings(settings), "large", error=RequestCrashesWorker("3 workers died"))
    assert replay(bench, settings)[0] == ReplayTally(read=1, left_out=1)
    codes = frozenset({ErrorCode.REQUEST_CRASHES_WORKER})
    assert replay(bench, settings, error_codes=codes)[0] == ReplayTally(read=1, chosen=1, sent=1)


def test_letters_without_their_value_are_not_sent(bench: Bench, settings: Settings) -> None:
    """They are counted, also with `again` and their code."""
    put_letters(bench, bench.settings(settings), "cut", error=MessageUnusable("large"), headers=((VALUE_OMITTED, b"true"),))
    put_letters(bench, bench.settings(settings), "whole")
    tally, _ = replay(bench, settings, again=True)
    assert tally == ReplayTally(read=2, not_whole=1, chosen=1, sent=1)
    codes = frozenset({ErrorCode.MESSAGE_UNUSABLE})
    assert replay(bench, settings, error_codes=codes)[0] == ReplayTally(read=2, not_whole=1)


def test_letter_of_another_topic_is_refused(bench: Bench, settings: Settings) -> None:
    """A header cannot send a record to any topic; the settings can name the topic."""
    bench.create("other-" + bench.request_topic)
    put_letters(bench, bench.settings(settings), "a", topic="other-" + bench.request_topic)
    tally, (line,) = replay(bench, settings)
    assert tally == ReplayTally(read=1, refused=1)
    assert (line["action"], "--request-topic" in line["reason"]) == ("refused", True)
    bench.request_topic = "other-" + bench.request_topic
    assert replay(bench, settings)[0].sent == 1


def test_letter_of_another_group_is_foreign(bench: Bench, settings: Settings) -> None:
    """It is left to that service; `--consumer-group` with its group sends it."""
    put_letters(bench, bench.settings(settings), "a")
    bench.group += "-other"
    put_letters(bench, bench.settings(settings), "b")
    tally, lines = replay(bench, settings)
    assert (tally, sent_ids(lines)) == (ReplayTally(read=2, foreign=1, chosen=1, sent=1), ["b"])


def test_damaged_headers_are_foreign(bench: Bench, settings: Settings) -> None:
    """Numbers that are none, and text that is not UTF-8, end no replay."""
    for name in (
        "dlq.original.topic",
        "dlq.original.partition",
        "dlq.original.offset",
        "dlq.error.code",
        "dlq.consumer.group",
    ):
        put_letters(bench, bench.settings(settings), "a", headers=((name, b"\xff"),))
    put_letters(bench, bench.settings(settings), "b", headers=(("dlq.error.message", b"\xff"), ("dlq.attempts", b"\xff")))
    assert replay(bench, settings)[0] == ReplayTally(read=6, foreign=5, chosen=1, sent=1)


# The memory at the broker


def test_memory_survives_tools_and_retention(bench: Bench, settings: Settings) -> None:
    """An offset that Kafka's tools set means that the letters before it were sent; deleted letters are forgotten."""
    put_letters(bench, bench.settings(settings), *"abcd")
    set_offset(bench, 4)
    assert sent_ids(replay(bench, settings)[1]) == ["c", "d"]
    set_offset(bench, 0)
    assert sent_ids(replay(bench, settings, request_id="c")[1]) == ["c"]
    assert offsets(bench)[0][0] == 0
    bench.admin.delete_records([TopicPartition(bench.dlq_topic, 0, 2)])[TopicPartition(bench.dlq_topic, 0)].result()
    assert sent_ids(replay(bench, settings)[1]) == ["b", "d"]


def set_offset(bench: Bench, offset: int, metadata: str = "") -> None:
    consumer = Consumer({**QUIET, "bootstrap.servers": bench.servers, "group.id": f"{bench.group}-dlq-replay"})
    consumer.commit(offsets=[TopicPartition(bench.dlq_topic, 0, offset, metadata)], asynchronous=False)
    consumer.close()


def test_topic_made_again_is_new(bench: Bench, settings: Settings) -> None:
    """The letters of a topic that was deleted and created again were not sent, whatever offsets they have."""
    put_letters(bench, bench.settings(settings), "a", "b")
    assert replay(bench, settings)[0].sent == 2
    bench.admin.delete_topics([bench.dlq_topic])[bench.dlq_topic].result()
    wait_until(lambda: bench.dlq_topic not in bench.admin.list_topics(timeout=10).topics, "a deleted topic")
    bench.create(bench.dlq_topic)
    put_letters(bench, bench.settings(settings), "c", "d", "e")
    assert sent_ids(replay(bench, settings)[1]) == ["c", "d", "e"]


def test_foreign_metadata_end_the_replay(bench: Bench, settings: Settings) -> None:
    """The error names group and partition, and how to set the memory; nothing is sent."""
    put_letters(bench, bench.settings(settings), "a")
    set_offset(bench, 0, "somebody else's")
    with pytest.raises(KafkaFailed, match=f"group {bench.group}-dlq-replay in partition 0.*--reset-offsets"):
        replay(bench, settings)
    assert bench.topic(bench.request_topic).all_within(1) == []


def test_memory_that_does_not_fit_sends_nothing(bench: Bench, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice too scattered for the metadata ends the replay with the letters unsent; sending the neighbours too works."""
    put_letters(bench, bench.settings(settings), *"abcd")
    monkeypatch.setattr("latent_encoder.kafka.replay_transactions.LONGEST_METADATA", 20)
    with pytest.raises(KafkaFailed, match=r"partition 0 .* too scattered"):
        replay(bench, settings, request_id="c")
    assert bench.topic(bench.request_topic).all_within(1) == []
    assert replay(bench, settings)[0].sent == 4


def test_memory_that_the_broker_refuses_sends_nothing(
    bench: Bench, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction of a memory beyond `offset.metadata.max.bytes` is aborted."""
    put_letters(bench, bench.settings(settings), "a")
    monkeypatch.setattr("latent_encoder.kafka.replay_transactions.LONGEST_METADATA", 10_000)
    monkeypatch.setattr(ReplayMemory, "committed", lambda _: (0, "x" * 5000))
    with pytest.raises(KafkaFailed, match="too scattered"):
        replay(bench, settings)
    assert bench.topic(bench.request_topic).all_within(1) == []


# The command line, and faults


def test_dead_letters_go_back_as_they_were(filled: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """Key, value and headers are the original's; the cause is gone, so the requests succeed now."""
    (filled.folder / "file").unlink()
    tally, lines = replay(filled, settings, error_codes=NOT_WRITABLE)
    assert tally == ReplayTally(read=6, foreign=1, chosen=2, sent=2)
    requests = filled.topic(filled.request_topic).take(7)
    for original, again in zip(requests[:2], requests[5:], strict=True):
        assert (again.key, again.value, again.headers[:1]) == (original.key, original.value, GOOD_HEADERS)
        assert [name for name, _ in again.headers[1:]] == ["dlq.attempts", *REPLAY_HEADERS]
    for n, line in enumerate(lines):
        assert "Cannot write to output folder" in line.pop("error_message")
        assert line.pop("age_s") >= 0
        assert line == {
            "action": "sent",
            "dead_letter": f"{filled.dlq_topic}/0/{n}",
            "request": f"{filled.request_topic}/0/{n}",
            "key": "k",
            "request_id": f"r{n}",
            "error_code": "OUTPUT_DIR_NOT_WRITABLE",
            "attempts": 1,
            "replays": 0,
        }
    responses = filled.responses
    with filled.worker(encoder, filled.settings(settings)):
        got = read_responses(responses, 4)
    assert [response["status"] for response in got if response["request_id"] in ("r0", "r1")] == ["error"] * 2 + [
        "success"
    ] * 2


def test_each_is_sent_once_though_it_fails_again(filled: Bench, encoder: LatentEncoder, settings: Settings) -> None:
    """Dead letters that a worker makes of them meanwhile are left to the next run, and their headers are new."""
    with failing_worker(filled, encoder, settings):
        tally, _ = replay(filled, settings, error_codes=frozenset({*NOT_WRITABLE, ErrorCode.MESSAGE_UNUSABLE}))
        assert (tally.chosen, tally.sent) == (5, 5)
        letters = filled.dead_letters.take(11)
    assert len(filled.topic(filled.request_topic).all_within(1)) == 10
    for letter in letters[6:]:
        names = [name for name, _ in letter.headers]
        assert len(names) == len(set(names))
        assert set(DLQ_HEADERS) <= set(names)
        assert int(dict(letter.headers)["dlq.original.offset"] or b"") >= 5


def test_limit_and_dry_run(filled: Bench, settings: Settings) -> None:
    """The limit counts chosen ones, and a dry run reports and sends nothing."""
    tally, lines = replay(filled, settings, limit=1, error_codes=frozenset({ErrorCode.MESSAGE_UNUSABLE}), dry_run=True)
    assert (tally.chosen, tally.sent) == (1, 0)
    assert [line["action"] for line in lines] == ["would be sent"]
    assert replay(filled, settings, limit=1)[0].sent == 1
    assert replay(filled, settings, since=datetime.now(UTC) + timedelta(minutes=1))[0].chosen == 0
    assert replay(filled, settings, limit=2)[0].sent == 1
    assert len(filled.topic(filled.request_topic).all_within(1)) == 5 + 2


def test_command_prints_what_it_did(filled: Bench, run_main: RunMain) -> None:
    """Standard output has a line of JSON for each, standard error the tally."""
    environment = environment_of(filled) | {"KAFKA_TRANSACTIONAL_ID": "the-workers"}
    arguments = ("--mode", "dlq-replay", "--error-code", "MESSAGE_UNUSABLE", "--error-code", "IMAGE_INVALID", "--limit", "2")
    places = ("--dead-letter", "0", "--dead-letter", f"{filled.dlq_topic}/0/0-99")
    done = run_main(*arguments, *places, "--since", "2026-01-01T00:00:00Z", "--rate", "50", env=environment)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["action"] for line in done.stdout.splitlines()] == ["sent", "sent"]
    assert done.stderr.splitlines()[-1].endswith("2 chosen, 2 sent, 0 refused.")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--dead-letter", "x/0"), "'x/0': it is not PARTITION, PARTITION/OFFSET or PARTITION/FIRST-LAST."),
        (("--dead-letter", "other/0/1"), "--dead-letter names topic other, not the topic latent-encoder-requests-dlq."),
        (("--rate", "0"), "Invalid value for '--rate'"),
        (("--since", "2026-01-02T00:00:00Z", "--until", "2026-01-01T00:00:00Z"), "--until must be later than --since."),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], fault: str, run_main: RunMain) -> None:
    done = run_main("--mode", "dlq-replay", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert fault in done.stderr


def test_full_standard_output_ends_the_replay_with_a_true_tally(filled: Bench, run_main: RunMain) -> None:
    """The status is 3, and the topic has as many records as the tally counts."""
    environment = environment_of(filled)
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


def test_topic_that_is_gone_is_refused(filled: Bench, run_main: RunMain) -> None:
    """If the original topic is gone, each record is reported as refused, with the reason, and the status is 1."""
    for deleted in filled.admin.delete_topics([filled.request_topic]).values():
        deleted.result()
    properties = filled.folder / "client.properties"
    properties.write_text("topic.metadata.propagation.max.ms=500\n")
    environment = environment_of(filled) | {"KAFKA_CLIENT_CONFIG": str(properties)}
    done = run_main("--mode", "dlq-replay", env=environment)
    assert done.returncode == 1
    for line in map(json.loads, done.stdout.splitlines()):
        assert line["action"] == "refused"
        assert "nknown topic" in line["reason"]
    assert done.stderr.splitlines()[-1].endswith("2 chosen, 0 sent, 2 refused.")


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
