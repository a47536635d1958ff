"""The outcome of each request of a soak. Its headers have a number, which its response and dead letter carry, too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak_requests import Planned, Response, files_of
from latent_encoder.kafka.records import ERROR_CODE, ORIGINAL_OFFSET, ORIGINAL_PARTITION, Headers, Incoming

NUMBER = "soak-number"
SUCCESS = "success"


@dataclass
class Entry:
    """A request that was sent, and the records that came for it so far."""

    request: Planned
    place: tuple[int, int]
    """Partition and offset."""
    sent_at: float
    answered_after: float | None = None
    code: str | None = None
    """`success` or an error code, that of the dead letter if there is no response."""
    responses: int = 0
    dead_letters: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """True if every expected record came."""
        expected = self.request.expected
        return self.responses >= expected.response and self.dead_letters >= expected.dead_letter

    @property
    def lost(self) -> bool:
        return self.responses + self.dead_letters == 0

    @property
    def wrong(self) -> bool:
        """True if other records came than were expected."""
        expected = self.request.expected
        came = (self.responses > 0, self.dead_letters > 0)
        return not self.lost and (came != (expected.response, expected.dead_letter) or bool(self.faults))

    @property
    def duplicates(self) -> int:
        return max(self.responses - 1, 0) + max(self.dead_letters - 1, 0)


class Ledger:
    """All requests of a soak, by their number."""

    def __init__(self, on_success: Callable[[Planned, Response], None], clock: Callable[[], float]) -> None:
        """`on_success` is called with the first response of each request that succeeded as expected."""
        self.entries: list[Entry] = []
        self._outstanding: set[int] = set()
        self._on_success = on_success
        self._clock = clock

    @property
    def outstanding(self) -> int:
        return len(self._outstanding)

    def next_headers(self) -> Headers:
        """Return the headers of the request that is sent next."""
        return ((NUMBER, str(len(self.entries)).encode()),)

    def sent(self, request: Planned, place: tuple[int, int]) -> None:
        self._outstanding.add(len(self.entries))
        self.entries.append(Entry(request, place, self._clock()))

    def response(self, record: Incoming) -> None:
        """Note a record of the response topic."""
        entry = self._entry(record)
        response = json.loads(record.value or b"")
        entry.responses += 1
        if entry.responses == 1:
            entry.code = response["error_code"] or response["status"]
            entry.faults += faults_of(entry.request, response)
            if entry.code == SUCCESS and not entry.faults:
                self._on_success(entry.request, response)
        self._settle(record, entry)

    def dead_letter(self, record: Incoming) -> None:
        """Note a record of the dead letter topic."""
        entry = self._entry(record)
        headers = {name: (value or b"").decode() for name, value in record.headers}
        entry.dead_letters += 1
        if entry.dead_letters == 1:
            entry.code = headers[ERROR_CODE]
            if entry.code != entry.request.expected.code:
                entry.faults.append(f"dead letter for {entry.code}")
            if entry.place != (int(headers[ORIGINAL_PARTITION]), int(headers[ORIGINAL_OFFSET])):
                entry.faults.append("dead letter that names another record")
        self._settle(record, entry)

    def _entry(self, record: Incoming) -> Entry:
        return self.entries[number_of(record)]

    def _settle(self, record: Incoming, entry: Entry) -> None:
        if entry.settled and entry.answered_after is None:
            entry.answered_after = self._clock() - entry.sent_at
            self._outstanding.discard(number_of(record))

    def codes(self) -> Counter[str]:
        """Count the requests by their outcome."""
        return Counter(entry.code for entry in self.entries if entry.code)

    def kinds(self) -> dict[str, list[Entry]]:
        """Return the requests by their kind."""
        kinds: dict[str, list[Entry]] = {}
        for entry in self.entries:
            kinds.setdefault(entry.request.kind, []).append(entry)
        return kinds

    def faults(self) -> list[Mapping[str, Any]]:
        """Return all faults, with the place of each record."""
        return [
            {
                "kind": entry.request.kind,
                "request_id": entry.request.request_id,
                "partition, offset": entry.place,
                "code": entry.code,
                "responses": entry.responses,
                "dead_letters": entry.dead_letters,
                "faults": entry.faults,
            }
            for entry in self.entries
            if entry.lost or entry.wrong or entry.duplicates
        ]


def number_of(record: Incoming) -> int:
    return int(dict(record.headers)[NUMBER] or b"")


def faults_of(request: Planned, response: Response) -> Iterator[str]:
    """Yield the faults of the first response to a request."""
    if request.request_id not in (None, response["request_id"]):
        yield f"response with another id: {response['request_id']}"
    if response["error_code"] != request.expected.code:
        yield f"{response['error_code'] or SUCCESS}: {response['error_message']}"
    if response["status"] != SUCCESS:
        return
    if missing := [str(file) for file in files_of(response) if not file.is_file()]:
        yield f"missing files: {', '.join(missing)}"
    if request.stored not in (None, response["metadata"]):
        yield "encoded again, though its files were there"
