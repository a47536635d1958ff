"""The order of commits: whatever the order in which encodes end, no offset is committed past work that is not answered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from latent_encoder.kafka.lanes import Job, Lanes, Partition
from latent_encoder.kafka.records import Incoming

TOPIC = "requests"


def job_at(partition: int, offset: int) -> Job:
    return Job(Incoming(TOPIC, partition, offset, None, None, b"{}", ()))


@given(st.data())
def test_offsets_are_committed_in_order_and_never_past_unfinished_work(data: st.DataObject) -> None:
    """Jobs arrive, get their answers, and have them acknowledged in any order that the broker and the encodes allow."""
    lanes, next_offset, committed = Lanes(), dict.fromkeys(range(3), 0), dict.fromkeys(range(3), 0)
    unanswered: list[Job] = []
    on_their_way: list[Job] = []
    for _ in range(data.draw(st.integers(1, 60))):
        step = data.draw(st.sampled_from(["arrive", "encode", "publish", "acknowledge", "revoke"]))
        if step == "arrive":
            partition = data.draw(st.integers(0, 2))
            job = job_at(partition, next_offset[partition])
            next_offset[partition] += 1
            lanes.add(job)
            unanswered.append(job)
        elif step == "encode" and unanswered:
            unanswered.pop(data.draw(st.integers(0, len(unanswered) - 1))).answer = ()
        elif step == "publish":
            for job in lanes.ready():
                job.sent_at = 0.0
                on_their_way.append(job)
        elif step == "acknowledge" and on_their_way:
            job = on_their_way.pop(data.draw(st.integers(0, len(on_their_way) - 1)))
            lanes.answered(job)
            assert job.record.offset == committed[job.record.partition], "each offset once, one after the other"
            committed[job.record.partition] += 1
            held = {other.record.offset for other in lanes.jobs({job.partition})}
            assert all(offset >= committed[job.record.partition] for offset in held)
        elif step == "revoke":
            partition = data.draw(st.integers(0, 2))
            dropped = lanes.drop({(TOPIC, partition)})
            assert [job.record.offset for job in dropped] == list(range(committed[partition], next_offset[partition]))
            assert all(job.dropped for job in dropped)
            unanswered = [job for job in unanswered if not job.dropped]
            on_their_way = [job for job in on_their_way if not job.dropped]
            next_offset[partition] = committed[partition]  # where the next owner begins
        assert len(lanes) == sum(next_offset.values()) - sum(committed.values())


def test_work_that_has_not_begun_is_dropped_with_all_behind_it() -> None:
    """What is being encoded or answered stays, up to the first that is not: nothing behind that could be committed."""
    lanes = Lanes()
    jobs = [job_at(0, 0), job_at(0, 1), job_at(0, 2), job_at(1, 0), job_at(1, 1)]
    for job in jobs:
        lanes.add(job)
    jobs[0].answer, jobs[1].encoding, jobs[4].encoding = (), True, True
    assert lanes.drop_unstarted() == [jobs[2], jobs[3], jobs[4]]
    assert list(lanes.jobs()) == jobs[:2]
    assert [job.dropped for job in jobs] == [False, False, True, True, True]


def test_only_the_named_partitions_are_touched() -> None:
    """A rebalance takes some partitions; the work on the others goes on."""
    lanes = Lanes()
    kept, lost = job_at(0, 0), job_at(1, 0)
    partitions: set[Partition] = {(TOPIC, 1), (TOPIC, 7)}
    for job in (kept, lost):
        lanes.add(job)
    assert lanes.drop_unstarted(partitions) == [lost]
    assert list(lanes.jobs()) == [kept]
    assert lanes.drop(partitions) == []
