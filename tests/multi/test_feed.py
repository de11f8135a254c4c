"""Batches and plans on their way to 1, 2 and 3 ranks: the same everywhere, and not waited for."""

import contextlib
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import planners
import psutil
import pytest
from crash_drill import start
from test_train import command
from tiny_corpus import tiny_config, write_tiny_corpus

from megascale.monitor.metric_fields import LEAST_WAIT_S
from megascale.planner import PlanError, Ring, StepPlan
from megascale.training.feed import Feed, check_own

PINNED = "planner.name=longest_first"
"""The planners of these tests go by this name, and it is what stands in for them."""

VARIED = (
    PINNED,
    "data.context_tokens=30000",
    "planner.capacity_tokens=30000",
    "data.global_batch_tokens=150000",
)
"""Steps of about ten whole files, so that no two have the same plan."""
SHORT = (PINNED, "train.tokens=20000", "eval.every_steps=0", "checkpoint.save_every_steps=0")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    path = tiny_config(folder)
    write_tiny_corpus(folder, files=80, max_bytes=30_000)
    return path


def open_feed(config, planner, *words, kind=Feed, steps=1000):
    """(feed, plans, ranks, batches, what plans a batch in this process) on this rank."""
    from megascale.corpus.batches import GlobalBatches
    from megascale.corpus.shards import Shard
    from megascale.planner.service.ahead import PlansAhead
    from megascale.run.resolve import load_run
    from megascale.run.step_problem import plan_lengths, step_problem
    from megascale.runtime import distributed

    config, sources, _ = load_run(config, [*VARIED, *words])
    ranks = distributed.start(config)
    shards = {name: Shard.open(info.train) for name, info in sources.items()}
    batches = GlobalBatches(config.data, shards, config.seed)
    plans = PlansAhead(planner, config.planner.timeout_s) if ranks.rank == 0 else None
    layout, ahead = ranks.layout, config.planner.ahead_steps
    feed = kind(
        batches,
        lambda lengths: step_problem(config, layout, lengths),
        ranks,
        plans,
        ahead,
        lambda cursor: cursor.step >= steps,
    )
    return feed, plans, ranks, batches, lambda lengths: plan_lengths(config, layout, lengths)


def close_feed(feed, plans):
    feed.close()
    if plans is not None:
        plans.close()


# ---------------------------------------------------------------------------------- what is dealt


def digests(config, steps, room, words):
    """Digests of the plans taken, and of those made in this process; batches must agree."""
    from megascale.corpus.batches import Cursor
    from megascale.planner import plan_longest_first
    from megascale.training import feed as feeds

    before, feeds.FIRST_ROOM_BYTES = feeds.FIRST_ROOM_BYTES, room
    feed, plans, _, batches, plan_here = open_feed(config, plan_longest_first, *words, steps=steps)
    feeds.FIRST_ROOM_BYTES = before
    taken, expected, cursor = [], [], Cursor()
    for _ in range(steps):
        batch, after = batches.next(cursor)
        planned = feed.take(cursor)
        assert planned.after == after and (planned.batch.length == batch.length).all()
        assert planned.trouble is None
        taken.append(planned.plan.digest())
        expected.append(plan_here(batch.length).digest())
        cursor = planned.after
    close_feed(feed, plans)
    return taken, expected


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "room, words", [(1 << 14, ()), (16, ()), (1 << 14, ("planner.ahead_steps=1",))]
)
def test_every_rank_takes_the_plans_made_in_process(ranks, config, world, room, words):
    """Also where no plan fits the first envelopes."""
    answers = ranks(world, digests, config, 12, room, words)
    assert len(set(answers[0][0])) == 12
    assert all(taken == expected for taken, expected in answers)
    assert all(answer == answers[0] for answer in answers)


def take_again(config):
    """Digests of steps 0, 1, 2, 1, 2, 3 and 0, where each was gone back to."""
    from megascale.corpus.batches import Cursor

    feed, plans, *_ = open_feed(config, planners.plan_slowly, steps=10)
    cursors, found = [Cursor()], []
    for step in (0, 1, 2, 1, 2, 3, 0):
        planned = feed.take(cursors[step])
        cursors[step + 1 :] = [planned.after]
        found.append(planned.plan.digest())
    close_feed(feed, plans)
    return found


def test_one_may_go_back(ranks, config):
    first, second = ranks(2, take_again, config)
    assert first == second
    assert first[1:3] == first[3:5] and first[0] == first[6] and len(set(first)) == 4


# ----------------------------------------------------------------------------- what is waited for


class WatchedFeed(Feed):
    """Knows which steps began without their plan; so a test needs no clock."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.waited, self.planned = [], []
        WatchedFeed.last = self

    def take(self, cursor):
        planned = super().take(cursor)
        self.planned.append(planned)
        return planned

    def _send_now(self, step):
        self.waited.append(len(self.planned))
        return super()._send_now(step)

    def train_until_all_is_planned(self):
        """As long as a long step would; on rank 0, which has the plans made."""
        for step in list(self._steps) if self._plans is not None else ():
            dealt = step.dealt.result()
            while dealt and step.outcome is None and not self._plans.ready(dealt.request):
                time.sleep(0.005)


def waits(config):
    """The steps of 12 that waited for their plan, and how long the first one did."""
    from megascale.corpus.batches import Cursor

    feed, plans, *_ = open_feed(config, planners.plan_slowly, kind=WatchedFeed, steps=12)
    cursor = Cursor()
    for _ in range(12):
        cursor = feed.take(cursor).after
        feed.train_until_all_is_planned()
    close_feed(feed, plans)
    return feed.waited, feed.planned[0].plan_wait_s


@pytest.mark.parametrize("world", [1, 2])
def test_plans_are_not_waited_for(ranks, config, world):
    for waited, first_s in ranks(world, waits, config):
        assert waited in ([0], [0, 1]) and first_s > 0.05  # nothing could be done ahead


def train_with(planner, *words):
    """Like `command`, with another planner behind the name `longest_first`."""
    from megascale.planner import PLANNERS

    honest, PLANNERS["longest_first"] = PLANNERS["longest_first"], getattr(planners, planner)
    try:
        return command("train", *words)
    finally:
        PLANNERS["longest_first"] = honest


def rows_of(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def train_slowly(*words):
    """`train_with` a slow planner and steps that last longer; which steps waited, and how long."""
    from megascale.training import begin, loop

    honest = loop.train_step

    def slow_step(*args, **others):
        WatchedFeed.last.train_until_all_is_planned()
        return honest(*args, **others)

    with patch.object(loop, "train_step", slow_step), patch.object(begin, "Feed", WatchedFeed):
        answer = train_with("plan_slowly", *words)
    feed = WatchedFeed.last
    return *answer, feed.waited, [planned.plan_wait_s for planned in feed.planned]


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_does_not_wait_and_says_so(ranks, config, tmp_path, world):
    words = (config, f"run_dir={tmp_path}", *SHORT, "monitor.log_every_steps=1")
    status, said, waited, waits_s = ranks(world, train_slowly, *words)[0]
    assert status == 0, said
    steps = [row for row in rows_of(tmp_path) if "loss" in row]
    assert waited in ([0], [0, 1])
    assert [row["plan_wait_s"] for row in steps] == waits_s
    assert all(row["plan_s"] > 0 and row["plan_over_bound"] >= 1 - 1e-9 for row in steps)
    assert said.count("plan wait") == sum(wait_s >= LEAST_WAIT_S for wait_s in waits_s)
    assert [row["speedup_over_static"] for row in steps] == speedups(config, words[2:], world)
    assert said.count("x static") == len(steps)


def speedups(config, words, world):
    """Of the plans of `plan_slowly` over static's, made here."""
    from megascale.config import Layout
    from megascale.corpus.batches import Cursor
    from megascale.planner import PLANNERS, plan_longest_first
    from megascale.run.resolve import load_run
    from megascale.run.step_problem import batches_of, step_problem

    config, sources, _ = load_run(config, words)
    layout, batches = Layout.of(config, world), batches_of(config, sources)
    cursor, found = Cursor(), []
    while cursor.tokens_seen < config.train.tokens:
        batch, cursor = batches.next(cursor)
        problem = step_problem(config, layout, batch.length)
        static = PLANNERS["static"](problem)
        found.append(static.predicted_s / plan_longest_first(problem).predicted_s)
    return found


# ------------------------------------------------------------------------------------- what fails


def kill_the_planner(*words):
    """Like `command`, with the planner process killed once there are steps."""
    run_dir = Path(str(words[2]).removeprefix("run_dir="))

    def kill():
        metrics = run_dir / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 3:
            time.sleep(0.01)
        for child in filter(is_planner, psutil.Process().children()):
            child.send_signal(signal.SIGKILL)

    if os.environ["RANK"] == "0":
        threading.Thread(target=kill, daemon=True).start()
    return command(*words)


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_planner_is_one_warning_and_the_same_run(ranks, config, tmp_path, world):
    calm, shaken = tmp_path / "calm", tmp_path / "shaken"
    assert ranks(world, command, "train", config, f"run_dir={calm}", *SHORT)[0][0] == 0
    answers = ranks(world, kill_the_planner, "train", config, f"run_dir={shaken}", *SHORT)
    assert [status for status, _ in answers] == [0] * world, answers
    said = answers[0][1]
    assert said.count("warning: step") == 1 and "was killed by SIGKILL" in said
    (event,) = [row for row in rows_of(shaken, "events.jsonl") if row["event"] == "planner"]
    assert "longest_first made this plan" in event["problem"] and event["step"] > 2
    assert [row["loss"] for row in rows_of(calm) if "loss" in row] == [
        row["loss"] for row in rows_of(shaken) if "loss" in row
    ]
    assert all("warning" not in words for _, words in answers[1:])


@pytest.mark.parametrize("world", [1, 2])
def test_the_mistake_of_a_user_ends_all_ranks_with_2(ranks, config, tmp_path, world):
    answers = ranks(world, train_with, "plan_four_times", config, f"run_dir={tmp_path}", *SHORT)
    assert [status for status, _ in answers] == [2] * world
    assert answers[0][1].endswith("megascale: no fifth plan; ask for four\n")
    assert all(words == "" for _, words in answers[1:])
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def fail_on_the_way(config, how):
    """What a rank says where rank 0 has no plan, or where rank 1 gets damaged bytes."""
    from megascale.corpus.batches import Cursor
    from megascale.training import feed as feeds

    feed, plans, ranks, *_ = open_feed(config, planners.plan_slowly, steps=1)

    def fail(request):
        raise ZeroDivisionError("a mistake")

    def damage(message, ranks):
        message = bytearray(honest(message, ranks))
        message[-1] ^= ranks.rank
        return bytes(message)

    honest = feeds.broadcast_bytes
    if how == "fail" and plans is not None:
        plans.result = fail
    if how == "damage":
        feeds.broadcast_bytes = damage
    try:
        feed.take(Cursor())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        feeds.broadcast_bytes = honest
        close_feed(feed, plans)


def test_no_rank_waits_for_a_plan_that_is_not_to_be(ranks, config):
    first, second = ranks(2, fail_on_the_way, config, "fail")
    assert first == "ZeroDivisionError: a mistake"
    assert second == "FirstRankError: on rank 0: ZeroDivisionError: a mistake"


def test_damage_on_the_way_is_noticed(ranks, config):
    answers = ranks(2, fail_on_the_way, config, "damage")
    assert answers == [None, "PlanError: a plan reached rank 1 damaged"]


@pytest.mark.parametrize(
    "change",
    [
        {"num_ranks": 3},
        {"mode": "aligned"},
        {"rings": ()},
        {"rings": (Ring(0, (0, 1), (0, 5), 0.0, 0),)},
        {"rings": (Ring(1, (0,), (0,), 0.0, 0), Ring(0, (0, 1), (1,), 0.0, 1))},
        {"rings": (Ring(0, (0,), (0,), 0.0, 1), Ring(1, (0, 1), (1,), 0.0, 1))},
    ],
)
def test_a_rank_knows_what_it_cannot_run(change):
    rings = (Ring(0, (0,), (0,), 0.0, 0), Ring(1, (0, 1), (1, 2), 0.0, 1))
    plan = StepPlan(2, "free", 128, 1.0, 1.0, 0.0, rings)
    layout = SimpleNamespace(hdp=2, mode="free")
    rank = SimpleNamespace(rank=0, hdp_rank=0, layout=layout)
    check_own(plan, rank, [9, 9, 9])
    with pytest.raises(PlanError, match="rank 0 cannot run its part"):
        check_own(replace(plan, **change), rank, [9, 9, 9])


def test_a_rank_knows_chunks_that_it_cannot_run():
    chunks = [
        Ring(0, (0, 1), (0,), 0.0, 0, 0, 0, 2, ((0, 5),)),
        Ring(1, (0, 1), (0,), 0.0, 1, 0, 1, 2, ((5, 9),)),
    ]
    rank = SimpleNamespace(rank=3, hdp_rank=1, layout=SimpleNamespace(hdp=2, mode="aligned"))
    plan = StepPlan(2, "aligned", 128, 1.0, 1.0, 0.0, tuple(chunks), pipeline=2)
    check_own(plan, rank, [9])
    with pytest.raises(PlanError, match="chunks of group 0 end at token 9 of 10 of sequence 0"):
        check_own(plan, rank, [10])
    with pytest.raises(PlanError, match="rank 1 ends with chunk 0 of 2, ring 0"):
        check_own(replace(plan, rings=tuple(chunks[:1])), rank, [9])


def orphans(config):
    """Planner processes that this rank has left after a run."""
    status, said = command("train", *config)
    assert status == 0, said
    return [child.pid for child in psutil.Process().children() if is_planner(child)]


def is_planner(process):
    return "megascale.planner.service.worker" in process.cmdline()


def test_a_run_leaves_no_process(ranks, config, tmp_path):
    words = (config, f"run_dir={tmp_path}", *SHORT, "train.stop_after_steps=2")
    assert ranks(2, orphans, words) == [[], []]


def test_no_orphan_after_a_kill(config, tmp_path):
    run = start(config, tmp_path / "run", 2, "train.tokens=10M")
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 3:
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.02)
        children = psutil.Process(run.pid).children(recursive=True)
        (planner,) = [child for child in children if is_planner(child)]
        planner.parent().kill()
        psutil.wait_procs([planner], timeout=60)
        assert not planner.is_running() or planner.status() == psutil.STATUS_ZOMBIE
        assert run.wait(timeout=120) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
