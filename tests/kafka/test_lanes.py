"""The order of commits: no offset is committed past a request without a response, in whatever order the encodes end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import EncodingFailed
from latent_encoder.kafka.jobs import Partition, RecordJob, State
from latent_encoder.kafka.lanes import Lanes
from latent_encoder.kafka.records import Incoming

TOPIC = "requests"
RESULT = EncodingFailed("No memory.")


def job_at(partition: int, offset: int) -> RecordJob:
    return RecordJob(Incoming(TOPIC, partition, offset, None, None, b"{}", ()))


def finish(job: RecordJob) -> None:
    job.finish(RESULT, (), dead_lettered=False)


@given(st.data())
def test_offsets_are_committed_in_order_and_never_past_unfinished_work(data: st.DataObject) -> None:
    """Jobs arrive, finish, and are acknowledged in any order that the broker and the encodes allow."""
    lanes, next_offset, committed = Lanes(), dict.fromkeys(range(3), 0), dict.fromkeys(range(3), 0)
    unfinished: list[RecordJob] = []
    on_their_way: list[RecordJob] = []
    for _ in range(data.draw(st.integers(1, 60))):
        step = data.draw(st.sampled_from(["arrive", "encode", "publish", "refuse", "acknowledge", "revoke"]))
        if step == "arrive":
            partition = data.draw(st.integers(0, 2))
            job = job_at(partition, next_offset[partition])
            next_offset[partition] += 1
            lanes.add(job)
            unfinished.append(job)
        elif step == "encode" and unfinished:
            finish(unfinished.pop(data.draw(st.integers(0, len(unfinished) - 1))))
        elif step == "publish":
            for job in lanes.ready():
                job.sent(0.0)
                on_their_way.append(job)
        elif step == "refuse" and on_their_way:
            on_their_way.pop(data.draw(st.integers(0, len(on_their_way) - 1))).resend()
        elif step == "acknowledge" and on_their_way:
            job = on_their_way.pop(data.draw(st.integers(0, len(on_their_way) - 1)))
            lanes.acknowledged(job)
            assert job.record.offset == committed[job.record.partition], "each offset once, one after the other"
            committed[job.record.partition] += 1
            held = {other.record.offset for other in lanes.jobs({job.partition})}
            assert all(offset >= committed[job.record.partition] for offset in held)
        elif step == "revoke":
            partition = data.draw(st.integers(0, 2))
            dropped = lanes.drop({(TOPIC, partition)})
            assert [job.record.offset for job in dropped] == list(range(committed[partition], next_offset[partition]))
            assert all(job.dropped for job in dropped)
            unfinished = [job for job in unfinished if not job.dropped]
            on_their_way = [job for job in on_their_way if not job.dropped]
            next_offset[partition] = committed[partition]  # the offset at which the next owner begins
        assert len(lanes) == sum(next_offset.values()) - sum(committed.values())


def test_work_that_has_not_begun_is_dropped_with_all_behind_it() -> None:
    """The jobs before the first unstarted one stay; no job behind it could be committed."""
    lanes = Lanes()
    jobs = [job_at(0, 0), job_at(0, 1), job_at(0, 2), job_at(1, 0), job_at(1, 1)]
    for job in jobs:
        lanes.add(job)
    finish(jobs[0])
    jobs[1].encoding, jobs[4].encoding = True, True
    assert lanes.drop_unstarted() == [jobs[2], jobs[3], jobs[4]]
    assert list(lanes.jobs()) == jobs[:2]
    assert [job.dropped for job in jobs] == [False, False, True, True, True]


def test_only_the_named_partitions_are_touched() -> None:
    """A rebalance that takes some partitions leaves the jobs of the others."""
    lanes = Lanes()
    kept, lost = job_at(0, 0), job_at(1, 0)
    partitions: set[Partition] = {(TOPIC, 1), (TOPIC, 7)}
    for job in (kept, lost):
        lanes.add(job)
    assert lanes.drop_unstarted(partitions) == [lost]
    assert list(lanes.jobs()) == [kept]
    assert lanes.drop(partitions) == []


def test_job_goes_through_its_states() -> None:
    """A failed attempt, a second one, a refused record and an acknowledgement leave the expected state behind each."""
    job, states = job_at(0, 0), []
    for step in (
        job.begin,
        lambda: job.wait(0.0),
        job.begin,
        lambda: finish(job),
        lambda: job.sent(1.0),
        job.resend,
        lambda: job.sent(2.0),
    ):
        step()
        states.append(job.state)
    assert states == [
        State.SUBMITTED,
        State.WAITING,
        State.SUBMITTED,
        State.FINISHED,
        State.SENT,
        State.FINISHED,
        State.SENT,
    ]
    assert (job.attempts, job.sent_at, job.result) == (2, 2.0, RESULT)
    job.acknowledged()
    assert job.state is State.ACKNOWLEDGED


def test_step_that_a_state_does_not_allow_is_an_error() -> None:
    """A job is not sent before it is finished, and neither an acknowledged nor a dropped one changes any more."""
    unfinished, done, dropped = job_at(0, 0), job_at(0, 1), job_at(0, 2)
    finish(done)
    done.sent(0.0)
    done.acknowledged()
    dropped.drop()
    with pytest.raises(AssertionError, match="WAITING cannot become SENT"):
        unfinished.sent(0.0)
    for job in (done, dropped):
        for step in (job.begin, lambda job=job: job.wait(0.0), job.resend, job.acknowledged, job.drop):
            with pytest.raises(AssertionError, match="cannot become"):
                step()


def test_next_attempt_counts_as_unstarted() -> None:
    """A job that waits for its next attempt has no encode under way that would be lost."""
    job = job_at(0, 0)
    job.begin()
    job.encoding = True
    assert not job.unstarted
    job.wait(0.0)
    assert job.unstarted
