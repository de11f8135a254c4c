"""Slow, hung, dead: what the pages of ranks say, and what follows from it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.launch import hangs
from megascale.launch.board import Board, Ledger, fits
from megascale.launch.failures import FailureBook
from megascale.launch.hangs import NodeRanks, RankPulse, SlowWatch, find_hang
from megascale.launch.rank_watch import RankWatch
from megascale.runtime.heartbeat import (
    COLLECTIVES,
    FOLDER_VARIABLE,
    PHASES,
    PID,
    SINCE,
    Pulse,
    open_page,
)

WELL = RankPulse(
    rank=0, pid=1, state="runs", step=7, phase="gradients", waits=True, calls=50,
    last="all-reduce", quiet_s=0.5, limit_s=10.0, waited_s=0.0, memory_mib=9, device_mib=0,
    spent_s=(0.0,) * len(PHASES),
)  # fmt: skip
AT_WORK = {"waits": False, "phase": "micro-batches"}


def ranks(*changes, quiet_s=11.0):
    return [replace(WELL, **{"rank": i, "quiet_s": quiet_s, **c}) for i, c in enumerate(changes)]


@pytest.mark.parametrize(
    ("changes", "named", "why"),
    [
        ([{}, AT_WORK, {}], [1], "rank 1 in micro-batches after step 7; 2 wait in all-reduce"),
        ([{}, {"state": "stopped by a signal"}], [1], "stopped by a signal; 1 wait"),
        (
            [{}, {"state": "dead", **AT_WORK}, AT_WORK],
            [1],
            "in micro-batches after step 7, dead; 1 wait",
        ),
        (
            [{}, {"phase": "micro-batches", "last": "receive"}, {"calls": 40}],
            [1],
            "rank 1 in micro-batches, waiting in receive after step 7; 2 wait in all-reduce, in gr",
        ),
        ([{}, {"step": 6, "phase": "optimizer"}], [1], "rank 1 in optimizer"),
        ([{"phase": "planning"}, {"phase": "saving"}], [1], "rank 1 in saving"),
        ([{}, {}], [], "all 2 ranks stand still"),
        ([AT_WORK, AT_WORK], [], "all 2 ranks stand still"),
        ([{"state": "dead"}] * 2, [0, 1], "dead; rank 1"),
        ([AT_WORK, {}, AT_WORK], [0, 2], "; 1 wait in all-reduce, in gradients after step 7"),
        ([{"phase": "ended", "state": "dead", "waits": False}, AT_WORK], [1], "rank 1"),
    ],
)
def test_who_did_not_come_is_named(changes, named, why):
    hang = find_hang(ranks(*changes))
    assert [one.rank for one in hang.named] == named and why in hang.why
    assert hang.why.startswith("hang: nothing moved for 11 s: ")


def test_nobody_hangs_while_anybody_moves():
    assert find_hang([]) is None
    assert find_hang(ranks({}, AT_WORK, quiet_s=9.0)) is None
    assert find_hang(ranks({}, {"limit_s": 0.0})) is None  # it may be quiet for ever
    moving = ranks({}, {}, AT_WORK)
    assert find_hang([*moving[:2], replace(moving[2], quiet_s=0.1)]) is None
    long = ranks({}, {"limit_s": 50.0, "phase": "saving", "waits": False})
    assert find_hang(long) is None


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("megascale.launch.hangs.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def node(tmp_path, clock):
    """A rank, its driver's view of it, and `pass_time(seconds, look every)`."""
    rank = Pulse()
    node = NodeRanks(tmp_path, 1, hang_s=10.0)
    rank._page = open_page(tmp_path / "rank0.page")
    rank._page[SINCE] = time.monotonic_ns()

    def pass_time(seconds, every_s=1.0):
        for _ in range(round(seconds / every_s)):
            clock[0] += every_s
            seen = node.look()[0]
        return seen

    return rank, pass_time


def test_quiet_is_measured_by_looks(node):
    rank, pass_time = node
    assert pass_time(100).quiet_s == 100 and pass_time(1).limit_s == 300  # the first step
    rank.begin_at(4)
    rank.step(5, 3 << 20)
    seen = pass_time(1)
    assert (seen.quiet_s, seen.step, seen.device_mib, seen.limit_s) == (0, 5, 3, 50)
    rank.enter("micro-batches")
    assert pass_time(1).quiet_s == 0 and pass_time(1).limit_s == 10
    assert pass_time(3600, every_s=3600).quiet_s == 3  # this driver was stopped
    assert pass_time(9).quiet_s == 12


def test_what_has_been_quiet_for_long_may_be_so_again(node):
    rank, pass_time = node
    rank.step(1, 0)
    rank.enter("micro-batches")
    pass_time(8)
    rank.mark()
    assert pass_time(1).limit_s == pytest.approx(5 * 7)
    rank.enter("gradients")
    assert pass_time(1).limit_s == 10
    rank.enter("evaluation")
    assert pass_time(1).limit_s == 50


@given(
    quiets=st.lists(st.floats(0.1, 9.9), min_size=1, max_size=30),
    every_s=st.floats(0.2, 20.0),
)
@settings(max_examples=50)
def test_a_slow_rank_is_not_taken_for_a_hung_one(tmp_path_factory, quiets, every_s):
    """However slow the ranks are and however seldom the driver gets to look."""
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megascale.launch.hangs.time.monotonic", lambda: now[0])
        folder = tmp_path_factory.mktemp("pages")
        rank, node = Pulse(), NodeRanks(folder, 1, hang_s=10.0)
        rank._page = open_page(folder / "rank0.page")
        rank.step(1, 0)
        rank.enter("micro-batches")
        looked = 0.0
        for quiet_s in quiets:
            rank.mark()
            moved = now[0]
            while now[0] < moved + quiet_s:
                now[0] = min(moved + quiet_s, now[0] + every_s)
                if now[0] >= looked + every_s:
                    looked = now[0]
                    assert find_hang(node.look()) is None


def shares(watch, *share, seconds=60, changes=({}, {}, {})):
    """What a watch names when ranks wait for such shares of the time."""
    named = []
    for second in range(seconds):
        told = [
            replace(WELL, rank=i, waited_s=part * second, **change)
            for i, (part, change) in enumerate(zip(share, changes))
        ]
        named += [one.rank for one in watch.see(told, float(second))]
    return named


def test_who_keeps_the_others_waiting_is_slow_and_said_to_be_once():
    assert shares(SlowWatch(), 0.7, 0.05, 0.8) == [1]
    assert shares(SlowWatch(), 0.05, 0.7) == [0]
    assert shares(SlowWatch(), 0.7, 0.05, 0.8, seconds=20) == []
    assert shares(SlowWatch(), 0.4, 0.1, 0.4) == [] and shares(SlowWatch(), 0.7, 0.4, 0.7) == []
    assert shares(SlowWatch(), 0.0) == []
    starting = ({}, {}, {"phase": "starting"})
    assert shares(SlowWatch(), 0.7, 0.05, 0.8, changes=starting) == []


class Clock:
    """A leader's time."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("megascale.launch.rank_watch.time.monotonic", lambda: self.now)


def test_the_leader_has_the_stacks_written_and_tells_why(tmp_path, monkeypatch):
    clock, board = Clock(monkeypatch), Board(Ledger())
    book = FailureBook([str(tmp_path)], None)
    watch = RankWatch(board, book, 3, (0, 4), lambda node: f"n{node}")

    def tell(attempt, **changes):
        clock.now += 1.5
        for node, its in zip((0, 4), ranks({}, {**AT_WORK, **changes})):
            value = json.loads(json.dumps({"attempt": attempt, "ranks": [asdict(its)]}))
            assert fits(value, hangs.PULSES)
            board.pulse(node, value)
        return watch.look()

    assert tell(2) is None  # of the attempt before
    assert tell(3, quiet_s=1.0) is None and not board.look(3)
    shown = json.loads((tmp_path / "heartbeats.json").read_text())
    assert [(one["rank"], one["node"]) for one in shown["ranks"]] == [(0, "n0"), (1, "n4")]
    for node in (0, 4):
        board.looked(3, node)
    cause = tell(3)
    assert (cause.rank, cause.node) == (1, "n4") and not cause.lost_a_peer
    [event] = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["event"] == "hang" and event["ranks"] == [1] and event["nodes"] == ["n4"]
    assert event["stacks"] == f"hangs/{board.look(3)}" and event["why"] == cause.error


def test_ranks_that_have_ended_do_not_hide_a_hang(tmp_path, monkeypatch):
    clock, board = Clock(monkeypatch), Board(Ledger())
    watch = RankWatch(board, FailureBook([str(tmp_path)], None), 3, (0, 4), str)
    quiet, at_work = ranks({}, AT_WORK)
    for node, its in ((0, quiet), (4, replace(at_work, quiet_s=0.0))):
        board.pulse(node, {"attempt": 3, "ranks": [json.loads(json.dumps(asdict(its)))]})
    clock.now += 1.5
    assert watch.look() is None
    board.report(3, 4, None)
    board.looked(3, 0)
    board.looked(3, 4)
    clock.now += 1.5
    assert "stand still" in watch.look().error


RANK = """
import time
from megascale.runtime.heartbeat import begin_pulse, pulse
import torch, torch.distributed as dist
begin_pulse()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def a_name_to_find():
    dist.all_reduce(torch.ones(1), async_op=True).wait()
    with pulse.waiting():
        time.sleep(0.05)
    pulse.enter("gradients")
    pulse.step(4, 0)
    time.sleep(1000)
a_name_to_find()
"""


def test_stacks_and_flight_records_of_running_and_stopped_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(hangs, "BEFORE_STOPPED_S", 0.5)
    folder, out = tmp_path / "pages", tmp_path / "out"
    folder.mkdir()
    node = NodeRanks(folder, 3, hang_s=10.0)
    names = {FOLDER_VARIABLE: str(folder), "TORCH_FR_BUFFER_SIZE": "10", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, **names, "RANK": str(6 + local), "LOCAL_RANK": str(local)},
        )
        for local in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while not all(one.step == 4 for one in node.look()[:2]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGSTOP)
        while node.look()[1].state != "stopped by a signal":
            time.sleep(0.01)
        node.write_stacks(out)
        while node.look()[1].state == "runs" and time.monotonic() < deadline:
            time.sleep(0.01)  # it stops again, and not at once
        seen = node.look()
        assert [one.state for one in seen[:2]] == ["runs", "stopped by a signal"]
        assert seen[0].calls >= 1 and seen[0].last == "all-reduce" and not seen[0].waits
        assert seen[0].memory_mib > 10 and seen[0].waited_s >= 0.05
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert node.look()[0].is_dead
    for rank in (6, 7):
        text = (out / f"rank{rank}.txt").read_text()
        assert f"rank {rank} in gradients after step 4" in text and "in a_name_to_find" in text
        record = json.loads((out / f"rank{rank}.flight.json").read_text())
        assert record["entries"][-1]["profiling_name"] == "gloo:all_reduce"
    [other] = out.glob("*-local2.txt")
    assert "(it gave no stack)" in other.read_text()


def test_every_phase_has_its_place():
    assert set(hangs.AFTER_STEP) == set(PHASES)


def test_all_operations_of_this_torch_are_known():
    from torch.distributed import ProcessGroup

    kinds = re.compile("_?(all|reduce|gather|scatter|broadcast|send|recv|barrier)")
    unknown = {name for name in dir(ProcessGroup) if kinds.match(name)} - COLLECTIVES.keys()
    assert not unknown


def test_without_a_driver_nothing_is_written(monkeypatch):
    from megascale.runtime.heartbeat import begin_pulse, pulse

    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    begin_pulse()
    assert pulse._page[PID] == 0
