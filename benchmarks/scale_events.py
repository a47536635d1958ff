"""A simulation of one consumer group, its broker and its bucket, by discrete events.

Each worker does as `latent_encoder/stages.py` and `kafka/work.py` do. It holds at most `prefetch` requests, fetches and
prepares them in some threads, encodes one, makes the files of one, publishes the files of some, and commits in the order of
each partition. Broker and bucket are queues with a rate. Time is in seconds of the simulation.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

STAGES = ("fetch", "prepare", "encode", "write", "publish")
FETCH, PREPARE, ENCODE, WRITE, PUBLISH = range(5)
"""The stages of a request in its worker. Without storage, fetching and publishing take no time."""

SAMPLE = 16
"""Workers among which a rebalance looks for one with few or many partitions: nearly as even as the best of all, and quick."""


@dataclass(frozen=True)
class Steps:
    """The steps of a request: the seconds of each without storage, its round trips to storage, and its calls."""

    prepare_s: float
    encode_s: float
    write_s: float
    fetch_trips: float = 0.0
    publish_trips: float = 0.0
    fetch_reads: int = 0
    """GET and HEAD calls before the encode."""
    publish_reads: int = 0
    publish_writes: int = 0
    """PUT and DELETE calls."""
    variation: float = 0.0
    """Coefficient of variation of each step's time, which has a gamma distribution."""


@dataclass(frozen=True)
class Group:
    """The group protocol, as the broker and its members see it."""

    protocol: str = "consumer"
    heartbeat_s: float = 5.0
    session_s: float = 45.0
    member_s: float = 0.0
    """Seconds of the coordinator for each member in a rebalance."""
    base_s: float = 0.0
    static: bool = False
    """Members have a `group.instance.id`, so a restart that ends within the session timeout moves nothing."""


@dataclass(frozen=True)
class Faults:
    """Deaths of workers and restarts."""

    death_every_s: float = 0.0
    """Mean life of a worker; 0 is for ever."""
    kill_at_s: float = 0.0
    """Death of the first worker; 0 is none."""
    start_s: float = 10.0
    """From the start of a process until it joins."""
    rolling_from_s: float = 0.0
    """Start of a rolling restart; 0 is none."""
    rolling_at_once: int = 1
    claim_s: float = 15.0
    """Time after which the claim of a killed worker is taken over."""


@dataclass(frozen=True)
class Scenario:
    """A whole run."""

    workers: int
    partitions: int
    steps: Steps
    seconds: float
    """Time during which completions count, behind the warm-up."""
    warm_up_s: float = 0.0
    rate: float = 0.0
    """Requests that arrive in a second; 0 is a backlog that never ends."""
    backlog: int = 0
    """Requests in all, there from the start and evenly spread; 0 is no limit."""
    skew: float = 0.0
    """Coefficient of variation of the partitions' rates of arrival."""
    prefetch: int = 2
    threads: int = 1
    """Threads that prepare. Two images more may have their pixels in memory: PREPARE_THREADS."""
    waiting: int = 16
    """Threads that fetch, and as many that publish."""
    latency_s: float = 0.0
    """A round trip to storage."""
    prefixes: int = 1
    reads_a_second: float = 5500.0
    writes_a_second: float = 3500.0
    burst_s: float = 0.5
    """Work that a prefix takes in advance, in seconds, before it responds 503."""
    retries: int = 4
    commits_a_second: float = 0.0
    """Requests that the coordinator serves in a second; 0 is no limit."""
    commits_an_image: int = 3
    group: Group = Group()
    faults: Faults = Faults()
    seed: int = 1


@dataclass
class Outcome:
    """The figures of a run."""

    completed: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    repeated: int = 0
    """Encodes that had been done before."""
    throttled: int = 0
    failed: int = 0
    """Attempts that ended because storage refused a call for too long."""
    deaths: int = 0
    rolled_at: float = 0.0
    """End of the rolling restart; 0 if there was none, or if it did not end."""
    rebalances: int = 0
    longest_rebalance_s: float = 0.0
    lag: int = 0
    """Requests that wait at the end."""
    most_lag: int = 0
    coordinator_busy_s: float = 0.0
    prefix_busy_s: float = 0.0
    last_at: float = 0.0

    @property
    def per_second(self) -> float:
        return self.completed / self.seconds if self.seconds else 0.0

    def quantile(self, share: float) -> float:
        """Return a quantile of the latencies."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Queue:
    """A server with a rate, such as a coordinator or a prefix of a bucket."""

    def __init__(self, rate: float) -> None:
        self._each_s = 1 / rate if rate else 0.0
        self._free_at = 0.0
        self.busy_s = 0.0

    def wait(self, now: float) -> float:
        """Return the seconds until it is free."""
        return max(0.0, self._free_at - now)

    def take(self, now: float, calls: float) -> float:
        """Add calls; return the time at which they are served."""
        self._free_at = max(self._free_at, now) + calls * self._each_s
        self.busy_s += calls * self._each_s
        return self._free_at


@dataclass
class Partition:
    """A partition: its requests that wait, and those that were taken and are not committed, in order."""

    waiting: deque[Request] = field(default_factory=deque)
    taken: deque[Request] = field(default_factory=deque)
    owner: Worker | None = None
    heir: Worker | None = None
    """The next owner, while the last one finishes the requests in hand."""


@dataclass(eq=False)
class Request:
    """A request."""

    arrived: float
    partition: int
    stored: bool = False
    """Its files are whole: another attempt needs no encode."""
    claimed_until: float = 0.0
    stage: int = -1
    """The last stage that it has begun."""
    done: bool = False
    """Its response may be published, when it is its turn."""
    dropped: bool = False
    """Left to the next owner of the partition, which gets a copy."""
    published: int = 0

    @property
    def unstarted(self) -> bool:
        return not self.done and self.stage < ENCODE


@dataclass(eq=False)
class Worker:
    """A worker. An event of an earlier life has another `life`."""

    number: int
    alive: bool = True
    stopping: bool = False
    life: int = 0
    partitions: list[int] = field(default_factory=list)
    next_partition: int = 0
    in_hand: int = 0
    pixels: int = 0
    """Images whose pixels are in memory."""
    busy: list[int] = field(default_factory=lambda: [0] * len(STAGES))
    queues: list[deque[Request]] = field(default_factory=lambda: [deque() for _ in STAGES])

    @property
    def takes(self) -> bool:
        return self.alive and not self.stopping


@dataclass(eq=False)
class StorageStep:
    """A step of a request with calls to storage."""

    worker: Worker
    seconds: float
    reads: int
    writes: int
    prefix: int
    then: Callable[[], None]
    attempts: int = 0


class Simulation:
    """The run of a scenario; `run` returns its outcome."""

    def __init__(self, scenario: Scenario) -> None:
        self._of = scenario
        self._random = random.Random(scenario.seed)  # noqa: S311  # nothing secret
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._now = 0.0
        self._end = scenario.warm_up_s + scenario.seconds
        self._coordinator = Queue(scenario.commits_a_second)
        self._reads = [Queue(scenario.reads_a_second) for _ in range(scenario.prefixes)]
        self._writes = [Queue(scenario.writes_a_second) for _ in range(scenario.prefixes)]
        self._rebalance_ends = self._next_ends = 0.0
        self._waiting = 0
        self._left = scenario.backlog
        self._workers = [Worker(number) for number in range(scenario.workers)]
        self._partitions = [Partition() for _ in range(scenario.partitions)]
        self._threads = (scenario.waiting, scenario.threads, 1, 1, scenario.waiting)
        self.outcome = Outcome()

    # The loop.

    def run(self) -> Outcome:
        """Run until the end, or until the backlog is worked off."""
        self._share_out()
        self._supply()
        self._plan_faults()
        while self._events:
            at, _, call = heapq.heappop(self._events)
            if at > self._end:
                break
            self._now = at
            call()
            if self._of.backlog and self.outcome.completed >= self._of.backlog:
                break
        self.outcome.seconds = (self.outcome.last_at if self._of.backlog else self._end) - self._of.warm_up_s
        self.outcome.lag = self._waiting
        self.outcome.coordinator_busy_s = self._coordinator.busy_s
        self.outcome.prefix_busy_s = max((queue.busy_s for queue in (*self._reads, *self._writes)), default=0.0)
        return self.outcome

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._order), call))

    def _of_life(self, worker: Worker, call: Callable[[], None]) -> Callable[[], None]:
        """Return a call that does nothing if the worker has died by then."""
        life = worker.life
        return lambda: call() if worker.life == life else None

    # Requests arrive.

    def _share_out(self) -> None:
        for number, partition in enumerate(self._partitions):
            worker = self._workers[number % len(self._workers)]
            worker.partitions.append(number)
            partition.owner = worker

    def _supply(self) -> None:
        scenario = self._of
        for number in range(scenario.backlog):
            self._arrive(number % scenario.partitions)
        if scenario.rate:
            weights = [self._varied(1.0, scenario.skew) for _ in self._partitions]
            self._cumulated = list(_sums(weights))
            self._next_arrival()
        for worker in self._workers:
            self._after(0.0, lambda worker=worker: self._take(worker))  # type: ignore[misc]

    def _next_arrival(self) -> None:
        self._after(self._random.expovariate(self._of.rate), self._arrival)

    def _arrival(self) -> None:
        (number,) = self._random.choices(range(len(self._partitions)), cum_weights=self._cumulated)
        self._arrive(number)
        owner = self._partitions[number].owner
        if owner is not None:
            self._take(owner)
        self._next_arrival()

    def _arrive(self, number: int) -> None:
        self._partitions[number].waiting.append(Request(self._now, number))
        self._waiting += 1
        self.outcome.most_lag = max(self.outcome.most_lag, self._waiting)

    def _varied(self, mean: float, variation: float) -> float:
        if not variation:
            return mean
        shape = variation**-2
        return self._random.gammavariate(shape, mean / shape)

    # The way of a request through its worker.

    def _take(self, worker: Worker) -> None:
        """Let a worker take requests, in turns from its partitions, as long as it may hold more."""
        while worker.takes and worker.in_hand < self._of.prefetch and (request := self._next_of(worker)) is not None:
            self._partitions[request.partition].taken.append(request)
            worker.in_hand += 1
            # The note of the start: a commit, and its confirmation.
            noted = self._coordinator.take(self._now, self._of.commits_an_image - 1)
            begin = self._of_life(worker, lambda request=request: self._submit(worker, request))  # type: ignore[misc]
            self._after(noted - self._now, begin)

    def _next_of(self, worker: Worker) -> Request | None:
        endless = not self._of.rate and not self._of.backlog
        for turn in range(len(worker.partitions)):
            place = (worker.next_partition + turn) % len(worker.partitions)
            number = worker.partitions[place]
            partition = self._partitions[number]
            if partition.waiting:
                self._waiting -= 1
                worker.next_partition = place + 1
                return partition.waiting.popleft()
            if endless:
                worker.next_partition = place + 1
                return Request(self._now, number)
        return None

    def _submit(self, worker: Worker, request: Request) -> None:
        if not request.dropped:
            self._enter(worker, request, FETCH if self._of.steps.fetch_trips else PREPARE)

    def _enter(self, worker: Worker, request: Request, stage: int) -> None:
        worker.queues[stage].append(request)
        self._serve(worker, stage)

    def _serve(self, worker: Worker, stage: int) -> None:
        """Let the threads of a stage that are free take its requests."""
        queue = worker.queues[stage]
        while queue and worker.busy[stage] < self._threads[stage]:
            if stage == PREPARE and worker.pixels >= self._of.threads + 2:
                return
            request = queue.popleft()
            if request.dropped:
                worker.pixels -= stage in (ENCODE, WRITE)
                continue
            worker.busy[stage] += 1
            worker.pixels += stage == PREPARE
            self._do(worker, request, stage)

    def _do(self, worker: Worker, request: Request, stage: int) -> None:
        steps, latency_s = self._of.steps, self._of.latency_s
        request.stage = stage

        def ended() -> None:
            worker.busy[stage] -= 1
            self._go_on(worker, request, stage)
            self._serve(worker, stage)

        if stage == FETCH:
            self._with_storage(worker, steps.fetch_trips * latency_s, (steps.fetch_reads, 0), ended)
        elif stage == PUBLISH:
            seconds = max(0.0, request.claimed_until - self._now) + steps.publish_trips * latency_s
            self._with_storage(worker, seconds, (steps.publish_reads, steps.publish_writes), ended)
        else:
            mean = (0.0, steps.prepare_s, steps.encode_s, steps.write_s)[stage]
            self._after(self._varied(mean, steps.variation), self._of_life(worker, ended))

    def _go_on(self, worker: Worker, request: Request, stage: int) -> None:
        """Bring a request to its next stage, or end it: its files are there, or it was left to another worker."""
        ends = request.dropped or request.stored
        if (ends and PREPARE <= stage < WRITE) or stage == WRITE:
            worker.pixels -= 1
            self._serve(worker, PREPARE)
        if request.dropped:
            return
        if stage == PUBLISH or (stage == WRITE and not self._of.steps.publish_trips):
            request.stored = True
        if request.stored and stage >= PREPARE:
            self._done(worker, request)
        else:
            self._enter(worker, request, stage + 1)

    def _with_storage(self, worker: Worker, seconds: float, calls: tuple[int, int], then: Callable[[], None]) -> None:
        """Do a step with its reads and writes, in a prefix chosen at random."""
        self._attempt(StorageStep(worker, seconds, *calls, self._random.randrange(self._of.prefixes), then))

    def _attempt(self, step: StorageStep) -> None:
        """Make the calls of a step; a prefix that has too much to do responds 503, and they are repeated after a pause."""
        reads, writes = self._reads[step.prefix], self._writes[step.prefix]
        burst_s = self._of.burst_s
        full = (step.reads and reads.wait(self._now) > burst_s) or (step.writes and writes.wait(self._now) > burst_s)
        if not full:
            reads.take(self._now, step.reads)
            writes.take(self._now, step.writes)
            self._after(step.seconds, self._of_life(step.worker, step.then))
            return
        self.outcome.throttled += 1
        if step.attempts >= self._of.retries:  # the request is tried again as a whole, which is simplified to a further round
            self.outcome.failed += 1
            step.attempts = 0
        pause_s = min(10.0, 0.2 * 2**step.attempts) * self._random.uniform(0.75, 1.25)
        step.attempts += 1
        self._after(pause_s, self._of_life(step.worker, lambda: self._attempt(step)))

    def _done(self, worker: Worker, request: Request) -> None:
        """Publish the requests that are the first of their partition, and commit them."""
        request.done = True
        for first in self._partitions[request.partition].taken:
            if first.done and not first.published:
                first.published = 1
                committed = self._coordinator.take(self._now, 1)
                respond = self._of_life(worker, lambda first=first: self._respond(worker, first))  # type: ignore[misc]
                self._after(committed - self._now, respond)
            elif not first.done:
                return

    def _respond(self, worker: Worker, request: Request) -> None:
        partition = self._partitions[request.partition]
        partition.taken.popleft()
        worker.in_hand -= 1
        if self._now >= self._of.warm_up_s:
            self.outcome.completed += 1
            self.outcome.last_at = self._now
            self.outcome.latencies.append(self._now - request.arrived)
        if worker.stopping and not worker.in_hand:
            self._end_of(worker)
        if partition.heir is not None and not partition.taken:
            self._give(request.partition, partition.heir)
        self._take(worker)

    # Workers die, are restarted, and the group rebalances.

    def _plan_faults(self) -> None:
        faults = self._of.faults
        if faults.death_every_s:
            for worker in self._workers:
                self._plan_death(worker)
        if faults.kill_at_s:
            self._after(faults.kill_at_s, lambda: self._die(self._workers[0]))
        if faults.rolling_from_s:
            for number in range(min(faults.rolling_at_once, len(self._workers))):
                self._after(faults.rolling_from_s, lambda number=number: self._roll(number))  # type: ignore[misc]

    def _plan_death(self, worker: Worker) -> None:
        mean = self._of.faults.death_every_s
        self._after(self._random.expovariate(1 / mean), self._of_life(worker, lambda: self._die(worker)))

    def _die(self, worker: Worker) -> None:
        """End a worker at once. Its partitions wait for the session timeout, or for its return as a static member."""
        group, start_s = self._of.group, self._of.faults.start_s
        self.outcome.deaths += 1
        self._stop(worker, killed=True)
        self._after(start_s, lambda: self._start(worker))
        if not (group.static and start_s < group.session_s):
            held = self._abandoned(worker)
            self._after(group.session_s, lambda: self._rebalance(lambda: self._hand_over(held), joins=False))

    def _roll(self, number: int) -> None:
        """Stop a worker in good order: it takes no more requests, and ends when those whose encode has begun are published."""
        worker = self._workers[number]
        worker.stopping = True
        for held in worker.partitions:
            self._drop_unstarted(worker, held)
        if worker.alive and not worker.in_hand:
            self._end_of(worker)

    def _end_of(self, worker: Worker) -> None:
        self._stop(worker, killed=False)
        self._after(self._of.faults.start_s, lambda: self._start(worker))
        if not self._of.group.static:
            held = self._abandoned(worker)
            self._rebalance(lambda: self._hand_over(held), joins=False)

    def _stop(self, worker: Worker, *, killed: bool) -> None:
        """End a life. Its uncommitted requests go back to their partitions, from which the next owner gets them."""
        worker.alive = False
        worker.life += 1
        for number in worker.partitions:
            self._give_back(number, killed=killed)
        worker.in_hand = worker.pixels = 0
        worker.busy = [0] * len(STAGES)
        for queue in worker.queues:
            queue.clear()

    def _give_back(self, number: int, *, killed: bool) -> None:
        """Put all uncommitted requests of a partition back."""
        partition = self._partitions[number]
        while partition.taken:
            self._put_back(partition, killed=killed)

    def _drop_unstarted(self, worker: Worker, number: int) -> None:
        """Put the requests of a partition back, from the first whose encode has not begun."""
        partition = self._partitions[number]
        kept = next((n for n, request in enumerate(partition.taken) if request.unstarted), len(partition.taken))
        while len(partition.taken) > kept:
            worker.in_hand -= 1
            self._put_back(partition, killed=False)

    def _put_back(self, partition: Partition, *, killed: bool) -> None:
        """Put the last request that was taken back, as a copy, because its worker may still have the other in a thread."""
        request = partition.taken.pop()
        request.dropped = True
        self.outcome.repeated += not request.stored and request.stage >= ENCODE
        copy = Request(request.arrived, request.partition, request.stored)
        if killed and not request.stored and request.stage == PUBLISH:
            copy.claimed_until = self._now + self._of.faults.claim_s
        partition.waiting.appendleft(copy)
        self._waiting += 1
        self.outcome.most_lag = max(self.outcome.most_lag, self._waiting)

    def _abandoned(self, worker: Worker) -> list[int]:
        """Return the partitions of a worker that has ended; they have no owner from now on."""
        held, worker.partitions = worker.partitions, []
        for number in held:
            self._partitions[number].owner = None
        return held

    def _start(self, worker: Worker) -> None:
        worker.alive = True
        if worker.stopping:
            worker.stopping = False
            self._roll_next(worker.number + self._of.faults.rolling_at_once)
        if self._of.faults.death_every_s:
            self._plan_death(worker)
        if worker.partitions:  # a static member that was back in time
            self._after(self._of.group.base_s, self._of_life(worker, lambda: self._take(worker)))
        else:
            self._rebalance(self._of_life(worker, lambda: self._fill(worker)), joins=True)

    def _roll_next(self, number: int) -> None:
        if number < len(self._workers):
            self._roll(number)
        else:
            self.outcome.rolled_at = self._now

    def _rebalance(self, then: Callable[[], None], *, joins: bool) -> None:
        """Make a change once the group has come to it. Changes that come during a rebalance share the next one.

        In a join one member gives up a partition before another takes it, which takes two rounds. Classic: a round ends with
        the slowest heartbeat of all members. Consumer: with the next heartbeat of the one that is concerned.
        """
        group, rounds = self._of.group, 1 + joins
        work = group.base_s + group.member_s * len(self._workers)
        if group.protocol == "classic":
            ends = self._batched(rounds * (work + group.heartbeat_s))
        else:
            ends = self._batched(work) + sum(self._random.uniform(0, group.heartbeat_s) for _ in range(rounds))
        self.outcome.longest_rebalance_s = max(self.outcome.longest_rebalance_s, ends - self._now)
        self._after(ends - self._now, then)

    def _batched(self, seconds: float) -> float:
        """Return the end of a rebalance that takes so long and begins now, or behind the one that runs."""
        if self._now >= self._rebalance_ends:
            self._rebalance_ends = max(self._now + seconds, self._next_ends)
            self.outcome.rebalances += 1
            return self._rebalance_ends
        if self._next_ends <= self._rebalance_ends:
            self._next_ends = self._rebalance_ends + seconds
            self.outcome.rebalances += 1
            self._after(self._rebalance_ends - self._now, self._next_runs)
        return self._next_ends

    def _next_runs(self) -> None:
        self._rebalance_ends = self._next_ends

    def _hand_over(self, held: list[int]) -> None:
        """Give partitions without an owner to living workers with few, which are looked for among some at random."""
        for number in held:
            some = [worker for worker in self._random.choices(self._workers, k=SAMPLE) if worker.takes]
            if some:
                self._give(number, min(some, key=lambda worker: len(worker.partitions)))
            else:
                self._after(1.0, lambda number=number: self._hand_over([number]))  # type: ignore[misc]

    def _fill(self, worker: Worker) -> None:
        """Let workers with the most partitions, found among some at random, give one that joined its share."""
        share = len(self._partitions) // len(self._workers)
        coming = 0
        while len(worker.partitions) + coming < share:
            richest = max(self._random.choices(self._workers, k=SAMPLE), key=lambda other: len(other.partitions))
            if len(richest.partitions) <= share:
                return
            number = richest.partitions.pop()
            richest.next_partition = 0
            self._partitions[number].owner = None
            self._drop_unstarted(richest, number)
            if self._partitions[number].taken:  # those whose encode has begun are finished first
                self._partitions[number].heir = worker
                coming += 1
            else:
                self._give(number, worker)
            self._take(richest)

    def _give(self, number: int, worker: Worker) -> None:
        partition = self._partitions[number]
        partition.owner, partition.heir = worker, None
        worker.partitions.append(number)
        self._take(worker)


def _sums(values: list[float]) -> list[float]:
    found, total = [], 0.0
    for value in values:
        total += value
        found.append(total)
    return found
