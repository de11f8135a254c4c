"""Batches and their plans, made ahead of time while the steps before train.

A message between ranks begins with its digest: ranks with different plans would wait forever.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megascale.config.schema import PlannerConfig
from megascale.corpus.batches import Cursor, GlobalBatch, GlobalBatches
from megascale.planner import PlanError, Problem, StepPlan, find_planner
from megascale.planner.chunk_rules import check_rank_chunks
from megascale.planner.service.ahead import Planned, PlansAhead
from megascale.runtime.distributed import Ranks, begin_broadcast, broadcast_bytes
from megascale.runtime.first_rank import error_bytes, error_from, on_first_rank

FIRST_ROOM_BYTES = 1 << 14
LENGTH = struct.Struct("<Q")
DIGEST_BYTES = 32
PLAN, ERROR = b"p", b"e"
"""What a message holds, after its digest."""


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch with its plan, the same on every rank."""

    batch: GlobalBatch
    after: Cursor
    """The cursor after the batch."""
    plan: StepPlan
    plan_wait_s: float
    """Seconds the training loop waited for it."""
    trouble: str | None = None
    """On rank 0, one line where the planner failed and a faster one made the plan."""
    static: Future[float | None] | None = None
    """On rank 0, `Planned.static_s`."""

    @property
    def static_s(self) -> float | None:
        """Predicted seconds of static context parallelism, on rank 0; else None.

        They are known before the next step's plan, so the end of a step rarely waits for them.
        """
        return None if self.static is None else self.static.result()


class _Dealt(NamedTuple):
    batch: GlobalBatch
    after: Cursor
    request: int | Exception | None
    """On rank 0, the number of the request for its plan, or why none could be made."""


class _Step:
    """A step on its way: first its batch is dealt, then its plan is sent."""

    def __init__(self, dealt: Future[_Dealt | None]) -> None:
        self.dealt = dealt
        """None after the last step of the run."""
        self.outcome: Planned | Exception | None = None
        """On rank 0, once it is known."""
        self.sent: Callable[[], Planned | None] | None = None
        """Once an envelope for it is on its way: waits, and says what it held; raises what it
        told of; None where it was empty."""


class Feed:
    """Deals planned batches in order.

    Every rank derives the batches of the next `ahead_steps` steps from the cursor. Rank 0 alone
    has them planned, by `plans` (None on the other ranks). At the begin of a step it sends the
    next step's plan in an envelope, which travels and is read while the step trains. Envelopes
    are of a size that all ranks know; one stays empty where the plan is not ready or too big, and
    then that plan is sent, and waited for, when its step begins. All collectives are begun by
    `take`, in the same order on every rank. `is_over` says after which cursor no step follows, so
    that none is begun there. `slowdown_at` gives what `Problem.slowdown` is in a step.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        problem_of: Callable[[np.ndarray], Problem],
        ranks: Ranks,
        plans: PlansAhead | None,
        ahead_steps: int,
        is_over: Callable[[Cursor], bool],
        slowdown_at: Callable[[int], tuple[float, ...]] = lambda step: (),
    ) -> None:
        self._batches, self._problem_of, self._ranks = batches, problem_of, ranks
        self._plans, self._ahead_steps = plans, ahead_steps
        self._is_over, self._slowdown_at = is_over, slowdown_at
        self._dealer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed-dealer")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed-reader")
        self._steps: deque[_Step] = deque()
        self._cursor: Cursor | None = None
        self._room = FIRST_ROOM_BYTES

    def take(self, cursor: Cursor) -> PlannedBatch:
        """The batch after `cursor`, after which the run is not over.

        Raises UserError, on every rank, where a source is used up or no plan exists.
        """
        began = time.perf_counter()
        if cursor != self._cursor:
            self._start_over(cursor)
        while len(self._steps) <= self._ahead_steps:
            self._begin(self._steps[-1].dealt if self._steps else cursor)
        step = self._steps.popleft()
        dealt = step.dealt.result()
        assert dealt is not None, "a run that is over takes no step"
        batch, after, _ = dealt
        planned = step.sent() if step.sent is not None else None
        if planned is None:
            planned = self._send_now(step)
        if not self._is_over(after):
            self._send_ahead(self._steps[0])
        self._cursor = after
        waited_s = time.perf_counter() - began
        return PlannedBatch(batch, after, planned.plan, waited_s, planned.trouble, planned.static_s)

    def close(self) -> None:
        """Drop what was made ahead."""
        for thread in (self._dealer, self._reader):
            thread.shutdown(wait=True, cancel_futures=True)

    def _start_over(self, cursor: Cursor) -> None:
        for step in self._steps:
            if self._plans and step.outcome is None and _is_asked(step):
                self._plans.forget(_request(step))
        self._steps.clear()
        self._cursor = cursor

    def _begin(self, after: Cursor | Future[_Dealt | None]) -> None:
        self._steps.append(_Step(self._dealer.submit(self._deal, after)))

    def _deal(self, after: Cursor | Future[_Dealt | None]) -> _Dealt | None:
        if isinstance(after, Cursor):
            cursor = after
        else:
            before = after.result()
            if before is None or self._is_over(before.after):
                return None
            cursor = before.after
        batch, following = self._batches.next(cursor)
        return _Dealt(batch, following, self._ask(batch, following))

    def _ask(self, batch: GlobalBatch, following: Cursor) -> int | Exception | None:
        """Ask for the plan, on rank 0. An error is kept, so that every rank is told of it."""
        if self._plans is None:
            return None
        try:
            slowdown = self._slowdown_at(following.step)
            problem = replace(self._problem_of(batch.length), slowdown=slowdown)
            return self._plans.request(problem)
        except Exception as error:
            return error

    def _send_now(self, step: _Step) -> Planned:
        if self._plans is not None and step.outcome is None:
            step.outcome = _outcome(self._plans, step)
        message = broadcast_bytes(_pack(step.outcome) or None, self._ranks)
        # next time there is room for it, on all ranks alike
        self._room = max(self._room, 2 * len(message))
        return _read(message, step, self._ranks)

    def _send_ahead(self, step: _Step) -> None:
        if self._plans is not None and _is_ready(self._plans, step):
            step.outcome = _outcome(self._plans, step)
        message = _pack(step.outcome)
        fits = LENGTH.size + len(message) <= self._room
        envelope = (LENGTH.pack(len(message)) + message) if fits else LENGTH.pack(0)
        arrived = begin_broadcast(envelope.ljust(self._room, b"\0"), self._room, self._ranks)
        step.sent = self._reader.submit(_open, arrived, step, self._ranks).result


def _request(step: _Step) -> int:
    """Number of the request for a plan. Raises what kept it from being made."""
    dealt = step.dealt.result()
    assert dealt is not None and dealt.request is not None, "only rank 0 asks for plans"
    if isinstance(dealt.request, Exception):
        raise dealt.request
    return dealt.request


def _is_asked(step: _Step) -> bool:
    """Whether a plan was asked for; waits until that is known."""
    if step.dealt.exception() is not None:
        return False
    dealt = step.dealt.result()
    return dealt is not None and isinstance(dealt.request, int)


def _is_ready(plans: PlansAhead, step: _Step) -> bool:
    asked = step.outcome is None and step.dealt.done() and _is_asked(step)
    return asked and plans.ready(_request(step))


def _outcome(plans: PlansAhead, step: _Step) -> Planned | Exception:
    """The plan, or why there is none: every rank must hear of that, so that none waits."""
    try:
        return plans.result(_request(step))
    except Exception as error:
        return error


def _pack(outcome: Planned | Exception | None) -> bytes:
    if outcome is None:
        return b""
    if isinstance(outcome, Planned):
        content = PLAN + outcome.payload
    else:
        content = ERROR + error_bytes(outcome)
    return hashlib.sha256(content).digest() + content


def _open(arrived: Callable[[], bytes], step: _Step, ranks: Ranks) -> Planned | None:
    envelope = arrived()
    (size,) = LENGTH.unpack_from(envelope)
    message = envelope[LENGTH.size : LENGTH.size + size]
    return _read(message, step, ranks) if message else None


def _read(message: bytes, step: _Step, ranks: Ranks) -> Planned:
    """What rank 0 sent, checked; on rank 0, what it keeps for itself."""
    if isinstance(step.outcome, Exception):
        raise step.outcome
    if step.outcome is not None:
        return step.outcome
    digest, content = message[:DIGEST_BYTES], message[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise PlanError(f"a plan reached rank {ranks.rank} damaged")
    kind, payload = content[:1], content[1:]
    if kind == ERROR:
        raise error_from(payload)
    plan = StepPlan.from_bytes(payload)
    dealt = step.dealt.result()
    assert dealt is not None, "a step without a batch has no plan"
    check_own(plan, ranks, dealt.batch.length.tolist())
    return Planned(plan, payload)


def check_own(plan: StepPlan, ranks: Ranks, lengths: Sequence[int]) -> None:
    """Raise PlanError for a plan that this rank cannot run as its part; rank 0 checks all of it."""
    layout, rings = ranks.layout, plan.rings_of(ranks.hdp_rank)
    fits = (plan.num_ranks, plan.mode) == (layout.hdp, layout.mode)
    known = all(0 <= one < len(lengths) for ring in rings for one in ring.sequences)
    in_order = all(a.id < b.id and a.index < b.index for a, b in pairwise(rings))
    if not (rings and fits and known and in_order):
        raise PlanError(f"rank {ranks.rank} cannot run its part of a plan for {plan.num_ranks}")
    check_rank_chunks(ranks.hdp_rank, rings, lengths)


def start_plans(config: PlannerConfig, ranks: Ranks, logs: Path | None) -> PlansAhead | None:
    """Start the planner process of a run, on rank 0; None on the others. All ranks call it."""
    log = logs / "planner.log" if logs is not None else None
    return on_first_rank(
        ranks, lambda: PlansAhead(find_planner(config.name), config.timeout_s, log)
    )
