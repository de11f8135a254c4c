"""Batches and their plans, made one step ahead while the step before trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megascale.corpus.batches import Cursor, GlobalBatch, GlobalBatches
from megascale.planner.plan import StepPlan
from megascale.runtime.distributed import Ranks, broadcast_bytes

Planner = Callable[[np.ndarray], StepPlan]


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch with its plan, the same on every rank."""

    batch: GlobalBatch
    after: Cursor
    """The cursor after the batch."""
    plan: StepPlan
    plan_wait_s: float
    """Seconds the training loop waited for it."""


class Feed:
    """Deals planned batches in order.

    Every rank derives the batch from the cursor; rank 0 alone plans, and sends the bytes of
    the plan to the others.
    """

    def __init__(self, batches: GlobalBatches, planner: Planner, ranks: Ranks) -> None:
        self._batches, self._planner, self._ranks = batches, planner, ranks
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self._ahead: tuple[Cursor, Future[tuple[GlobalBatch, Cursor, bytes | None]]] | None = None

    def take(self, cursor: Cursor, last: bool = False) -> PlannedBatch:
        """The batch after `cursor`; unless it is the `last`, the next one is begun too.

        Raises UserError where a source is used up.
        """
        began = time.perf_counter()
        if self._ahead is None or self._ahead[0] != cursor:
            self._begin(cursor)
        assert self._ahead is not None
        batch, after, payload = self._ahead[1].result()
        if last:
            self._ahead = None
        else:
            self._begin(after)
        plan = StepPlan.from_bytes(broadcast_bytes(payload, self._ranks))
        return PlannedBatch(batch, after, plan, time.perf_counter() - began)

    def close(self) -> None:
        """Drop what was made ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, cursor: Cursor) -> None:
        self._ahead = (cursor, self._thread.submit(self._make, cursor))

    def _make(self, cursor: Cursor) -> tuple[GlobalBatch, Cursor, bytes | None]:
        batch, after = self._batches.next(cursor)
        if self._ranks.rank != 0:
            return batch, after, None
        plan = self._planner(batch.length)
        plan.check(batch.length)
        return batch, after, plan.to_bytes()
