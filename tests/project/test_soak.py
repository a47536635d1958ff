"""The soak's ledger, its arithmetic and its requests; the run itself is not tested."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from benchmarks.draw_soak import STAGE_COLOURS, means
from benchmarks.kafka_soak import bad_end, disagreements, not_flat
from benchmarks.soak_ledger import NUMBER, Ledger
from benchmarks.soak_requests import GOOD, KEPT, REPEATED, Expected, Generator, Planned, bad_kinds
from benchmarks.soak_samples import Sample, Trend, total
from errors import ErrorCode
from latent_encoder.kafka.records import ERROR_CODE, ORIGINAL_OFFSET, ORIGINAL_PARTITION, Incoming
from models import Timings
from tests.helpers import IMAGES

PLACE = (2, 7)
FIRST = {NUMBER: 0}  # headers of the first request
BOTH = Expected(ErrorCode.OUTPUT_DIR_NOT_WRITABLE, dead_letter=True)


@pytest.fixture
def ledger() -> Ledger:
    seconds = count()
    return Ledger(lambda *_: None, lambda: float(next(seconds)))


def record(value: bytes, headers: Mapping[str, object] = FIRST) -> Incoming:
    return Incoming("topic", *PLACE, 0, None, value, tuple((name, str(text).encode()) for name, text in headers.items()))


def response(code: str | None = None, files: Path | None = None, **fields: Any) -> Incoming:
    given: Mapping[str, Any] = {
        "request_id": "id",
        "status": "error" if code else "success",
        "error_code": code,
        "error_message": "why",
        "latent_file_path": f"{files}/a.pt",
        "scaled_image_path": f"{files}/a.png",
        "metadata": {"timestamp": "then"},
        **fields,
    }
    return record(json.dumps(given).encode())


def dead_letter(code: str, offset: int = PLACE[1], number: int = 0) -> Incoming:
    return record(b"", {NUMBER: number, ERROR_CODE: code, ORIGINAL_PARTITION: PLACE[0], ORIGINAL_OFFSET: offset})


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("a.pt", "a.png", "a.pt.json"):
        (tmp_path / name).touch()
    return tmp_path


def test_lost_until_something_comes(ledger: Ledger) -> None:
    """A request that expects a response and a dead letter is settled by both, in either order, and counted once."""
    ledger.sent(Planned("bad", b"", BOTH, "id"), PLACE)
    (entry,) = ledger.entries
    assert (entry.lost, entry.wrong, ledger.outstanding) == (True, False, 1)
    ledger.dead_letter(dead_letter(BOTH.code or ""))
    assert (entry.lost, entry.wrong, ledger.outstanding) == (False, True, 1)
    ledger.response(response(BOTH.code))
    assert (entry.lost, entry.wrong, entry.duplicates, ledger.outstanding) == (False, False, 0, 0)
    assert (ledger.codes(), ledger.faults(), entry.answered_after) == ({BOTH.code: 1}, [], 1.0)


def test_duplicates_are_counted(ledger: Ledger, files: Path) -> None:
    """Each response after the first is counted as a duplicate."""
    ledger.sent(Planned(GOOD, b"", Expected(), "id"), PLACE)
    for _ in range(3):
        ledger.response(response(files=files))
    assert [entry.duplicates for entry in ledger.entries] == [2]
    assert len(ledger.faults()) == 1


@pytest.mark.parametrize(
    ("expected", "received"),
    [
        (Expected(), response("IMAGE_INVALID")),
        (Expected(ErrorCode.IMAGE_INVALID), response("IMAGE_NOT_FOUND")),
        (Expected(ErrorCode.IMAGE_INVALID), response("IMAGE_INVALID", request_id="another")),
        (Expected(), response(files=Path("/nowhere"))),
    ],
    ids=["error", "code", "id", "files"],
)
def test_other_responses_are_wrong(ledger: Ledger, expected: Expected, received: Incoming) -> None:
    """An error instead of a success, another code, another request's id and missing files are wrong."""
    ledger.sent(Planned("kind", b"", expected, "id"), PLACE)
    ledger.response(received)
    assert ledger.entries[0].wrong


def test_dead_letters_say_why_and_of_what(ledger: Ledger) -> None:
    """A dead letter with another code or with another record's place is wrong."""
    expected = Expected(ErrorCode.MESSAGE_UNUSABLE, response=False, dead_letter=True)
    for number, (code, offset) in enumerate((("MESSAGE_UNUSABLE", 7), ("ENCODING_FAILED", 7), ("MESSAGE_UNUSABLE", 8))):
        ledger.sent(Planned("kind", b"", expected, None), PLACE)
        ledger.dead_letter(dead_letter(code, offset, number))
    assert [entry.wrong for entry in ledger.entries] == [False, True, True]


def test_repeated_requests_get_the_stored_response(ledger: Ledger, files: Path) -> None:
    """Metadata of another run show that a repeated request was encoded again, which is wrong."""
    for stored in ({"timestamp": "then"}, {"timestamp": "before"}):
        ledger.entries.clear()
        ledger.sent(Planned(REPEATED, b"", Expected(), "id", stored), PLACE)
        ledger.response(response(files=files))
        assert ledger.entries[0].wrong == (stored["timestamp"] == "before")


def test_generator_repeats_successes_and_removes_old_files(tmp_path: Path) -> None:
    """A repetition is the same message, and files stay until KEPT other requests have succeeded."""
    generator = Generator(tmp_path, [IMAGES / "photo.jpg"], seed=0)
    request = next(request for request in iter(generator.any_one, None) if request.kind == GOOD)
    for number in range(KEPT + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("a.pt", "a.png", "a.pt.json"):
            (folder / name).touch()
        content = json.loads(response(files=folder).value or b"")
        generator.answered(request, content)
    assert [path.name for path in tmp_path.iterdir() if not any(path.iterdir())] == ["0"]
    repeated = next(request for request in iter(generator.any_one, None) if request.kind == REPEATED)
    assert (repeated.value, repeated.stored) == (request.value, {"timestamp": "then"})


def test_generator_is_seeded(tmp_path: Path) -> None:
    """The same seed gives the same requests, another seed others, and every bad kind is among them."""

    def requests(seed: int) -> list[Planned]:
        generator = Generator(tmp_path, [IMAGES / "photo.jpg"], seed)
        return [*generator.one_of_each(), *(generator.any_one() for _ in range(100))]

    assert requests(1) == requests(1) != requests(2)
    assert {kind.name for kind in bad_kinds(tmp_path)} <= {request.kind for request in requests(1)}


def trend(second: float, last: float, other: float = 0) -> Trend:
    """Return a trend whose other sixths do not matter."""
    return Trend((other, second, other, other, other, last))


def test_flat_means_within_three_percent() -> None:
    """From the second sixth to the last, memory may rise or fall by 3 %, and files and threads must not grow by one."""
    flat = {"resident_bytes": trend(100, 102.9), "open_files": trend(10, 10, 12), "threads": trend(10, 9)}
    assert list(not_flat(flat)) == []
    for name, changed in (
        ("resident_bytes", trend(100, 103.1)),
        ("resident_bytes", trend(100, 96.9)),
        ("open_files", trend(10, 11)),
        ("threads", trend(10, 11)),
    ):
        assert len(list(not_flat(flat | {name: changed}))) == 1


def test_trend_is_of_medians() -> None:
    """A trend has the medians of each sixth of the samples, so that one outlier changes nothing; none is left out."""
    values = [9.0, 9, 9, 2, 99, 2, 4, 4, 4, 5, 5, 5, 6, 6, 6, 1, 1, -50]
    assert Trend.of(values) == Trend((9, 2, 4, 5, 6, 1))
    assert Trend.of(values).deviation == pytest.approx(-0.5)
    assert Trend.of(range(8)).sixths == (0, 1, 2.5, 4, 5, 6.5)


def test_metrics_have_to_agree(ledger: Ledger, files: Path) -> None:
    """A difference between the worker's counts and the records that came is reported."""
    ledger.sent(Planned(GOOD, b"", Expected(), "id"), PLACE)
    ledger.response(response(files=files))
    success: Mapping[str, str] = {"outcome": "success", "error_code": ""}
    metrics = [("latent_encoder_requests_total", success, 1.0)]
    assert total(metrics, "latent_encoder_requests_total", outcome="success") == 1
    assert list(disagreements(ledger, metrics)) == []
    more = ("latent_encoder_dead_letters_total", {"error_code": "ENCODING_FAILED"}, 1.0)
    assert len(list(disagreements(ledger, [*metrics, more]))) == 1
    assert len(list(disagreements(ledger, []))) == 1


def test_end_is_clean_where_all_is_committed() -> None:
    """Status 0 and a commit for each record is a good end; each of the two that is missing is reported."""
    assert list(bad_end(0, 5, {0: 3, 1: 2})) == []
    assert len(list(bad_end(3, 5, {0: 3}))) == 2


def test_stages_are_drawn_that_ran() -> None:
    """A stage that ran is drawn with its mean time since the previous sample, and every stage has its own colour."""
    samples = [
        Sample(
            60.0 * n,
            0,
            0,
            0,
            [
                ("latent_encoder_stage_seconds_count", {"stage": "encode"}, 4.0 * n),
                ("latent_encoder_stage_seconds_sum", {"stage": "encode"}, 2.0 * n),
            ],
        )
        for n in range(3)
    ]
    assert means(samples, "encode") == [(1.0, 0.5), (2.0, 0.5)]
    assert means(samples, "roundtrip") == []
    assert STAGE_COLOURS.keys() == Timings.model_fields.keys()
    assert len(set(STAGE_COLOURS.values())) == len(STAGE_COLOURS)
