"""Claims in a bucket: one process at a time publishes the files of a name.

A claim is a hidden object that is created only if it is absent. Its process removes it when the files are published. A bucket
has no locks that end with their process, so a claim that has stayed the same for CLAIM_S, by the clock of the one who waits,
counts as abandoned and is taken over. No two clocks are compared. The one who waits looks at the other claims of the folder,
too: a process that was killed may have left several, and they are waited for together. A process that lost its claim finds out
before it reports a success: it renews the claim by a write that expects the version it wrote last.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from errors import OutputDirNotWritable
from latent_encoder.outputs.bucket import QUICK_S, BucketFolder, reported
from latent_encoder.outputs.locks import LOCK, PREFIX
from latent_encoder.storage.retrying import Unavailable
from latent_encoder.storage.stores import Conflict, NotThere, Refused, Unusable, Version
from latent_encoder.telemetry.logs import get_logger
from latent_encoder.telemetry.metrics import STORAGE_CLAIMS

log = get_logger("latent_encoder")

CLAIM_S = 15.0
"""Seconds after which a claim that nobody renewed is taken over: a publication takes a second or two, and one that is
throttled renews its claim between its calls."""

RENEW_S = 5.0
"""Age in seconds at which a claim is renewed before the next call: a third of CLAIM_S, so that one slow call does no harm."""

WAIT_S = 25.0
"""Longest wait for a claim, in seconds: that of a killed process ends within it."""

REMEMBERED_S = 3600.0
"""Seconds for which the sight of a claim is remembered, some 200 bytes each: a worker needs minutes for the requests that a
killed one had in hand."""

POLL_S = 0.25
"""Seconds until the second look at another process's claim: a publication often takes no longer."""

LONGEST_POLL_S = 2.0
"""Longest pause between two looks, in seconds. Each look is a PUT and a GET, which cost money. The pauses grow by a half, so
the claim of a killed process is looked at 12 times, and one that is held for longer than WAIT_S 17 times."""

CONDITIONAL = "conditional writes"


class Claim:
    """The claim of a name, held by this process."""

    def __init__(self, folder: BucketFolder, key: str) -> None:
        self._folder = folder
        self._name = f"{PREFIX}{key}{LOCK}"
        self._owner = secrets.token_hex(16)
        self._count = 0
        self._data = b""
        self._version: Version = {}
        self._since = 0.0
        self._renewing = threading.Lock()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._since

    def take(self, shown: str, wait_s: float = WAIT_S) -> None:
        """Wait for the claim and take it.

        Raises:
            OutputDirNotWritable: another process holds it, or the storage fails.
        """
        deadline, waiting, pause = time.monotonic() + wait_s, False, POLL_S
        while not self._written(None):
            try:
                found = self._folder.content(self._name)
            except FileNotFoundError:
                continue
            if found.data == self._data:  # the response to our own write was lost
                self._version = found.facts.version
                break
            seen = found.facts.version
            since = seen_since(self._folder, self._name, seen["e_tag"])
            if not waiting:
                waiting = True
                STORAGE_CLAIMS.labels("waited").inc()
                see_others(self._folder)
            now = time.monotonic()
            if now - since >= CLAIM_S and self._written(seen):
                self._note_taken_over(shown)
                break
            if now >= deadline:
                raise OutputDirNotWritable(
                    f"Cannot write to output folder: {self._folder.path} (for {wait_s:g} s another process has been writing "
                    f"{shown})"
                )
            time.sleep(max(POLL_S, min(pause, since + CLAIM_S - now)))
            pause = min(1.5 * pause, LONGEST_POLL_S)
        try:
            self._prove()
        except BaseException:
            self.release()
            raise

    def _note_taken_over(self, shown: str) -> None:
        STORAGE_CLAIMS.labels("taken_over").inc()
        log.warning(
            "claim of another process is taken over, because it was not renewed",
            place=f"{self._folder.path}/{shown}",
            after_s=CLAIM_S,
        )

    def keep(self) -> None:
        """Renew the claim if it is not fresh. After this, the next call may be made in its name.

        Raises:
            OutputDirNotWritable: another process has taken it over.
        """
        with self._renewing:
            if self.age_s >= RENEW_S:
                self.renew()

    def renew(self) -> None:
        """Show that this process still has the claim.

        Raises:
            OutputDirNotWritable: another process has taken it over.
        """
        if not self._written(self._version) and not self._is_ours():
            STORAGE_CLAIMS.labels("lost").inc()
            raise OutputDirNotWritable(
                f"Cannot write to output folder: {self._folder.path} (this process was held up for more than {CLAIM_S:g} s, "
                "and another one has taken over the same files)"
            )

    def release(self) -> None:
        """Remove the claim, unless another process may have it before the call ends: removing knows no condition.

        A call that fails is made once more, if it is not too late for that.
        """
        for _ in range(2):
            if self.age_s >= CLAIM_S - QUICK_S:
                return
            with suppress(Unavailable):
                with suppress(NotThere, Refused, Unusable):
                    self._folder.quick.remove_once(self._folder.key(self._name))
                return

    def clear(self) -> None:
        """Take over the claim of a killed process that has not changed for long, and remove it; leave it if it changes."""
        with suppress(FileNotFoundError):
            if self._written(self._folder.version(self._name)):
                self.release()

    def _written(self, expected: Version | None) -> bool:
        """Write the claim if it has the expected version; return whether it was written."""
        self._count += 1
        self._data = f"{self._owner} {self._count}\n".encode()
        began = time.monotonic()
        try:
            self._version = self._folder.put(self._name, self._data, expected, quick=True)
        except Conflict:
            return False
        self._since = began
        return True

    def _is_ours(self) -> bool:
        """Return whether the claim is the one that was written last, so that only the response to the write was lost."""
        try:
            found = self._folder.content(self._name)
        except FileNotFoundError:
            return False
        if found.data != self._data:
            return False
        self._version, self._since = found.facts.version, time.monotonic()
        return True

    def _prove(self) -> None:
        """Find out once if the server heeds the conditions of writes: some ignore them, and would lose files silently.

        Raises:
            OutputDirNotWritable: it does not.
        """
        store = self._folder.store
        with nullcontext() if CONDITIONAL in store.proved else store.proving:
            if CONDITIONAL in store.proved:
                return
            try:
                self._folder.put(self._name, self._data, None, quick=True)
            except Conflict:
                store.proved.add(CONDITIONAL)
                return
        raise OutputDirNotWritable(
            f"Cannot write to output folder: {self._folder.path} (the server ignores If-None-Match, so two workers could "
            "overwrite each other's files; use a storage with conditional writes)"
        ) from OSError(95, str(Unusable("no conditional writes")))


def seen_since(folder: BucketFolder, name: str, e_tag: str | None) -> float:
    """Return the time since when a claim has had this ETag, as far as this process has seen it; now if it is new."""
    sightings, key = folder.store.sightings, folder.key(name)
    known = sightings.get(key)
    if known is None or known[0] != e_tag:
        known = sightings[key] = (e_tag, time.monotonic())
    return known[1]


def see_others(folder: BucketFolder) -> None:
    """Look at all claims of a folder, so that those of a killed process are waited for together, and forget older ones."""
    with suppress(OutputDirNotWritable, NotThere), reported(folder.path):
        for found in folder.store.names_from(folder.path.key, PREFIX):
            seen_since(folder, found.name, found.e_tag)
    forgotten = time.monotonic() - REMEMBERED_S
    for key, (_, since) in [*folder.store.sightings.items()]:
        if since < forgotten:
            folder.store.sightings.pop(key, None)


@contextmanager
def claimed(folder: BucketFolder, key: str, shown: str) -> Iterator[Claim]:
    """Hold the claim of a name as long as the context lasts.

    Raises:
        OutputDirNotWritable: another process holds it, or the storage fails.
    """
    claim = Claim(folder, key)
    claim.take(shown)
    try:
        yield claim
    finally:
        with suppress(OutputDirNotWritable):  # it is taken over later
            claim.release()
