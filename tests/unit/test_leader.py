"""The leader of a job, with drivers that only pretend."""

import threading
import time

import pytest

from megascale.config import parse_config
from megascale.launch.board import (
    Answer,
    Board,
    BoardLost,
    Ledger,
    join_board,
    serve_board,
)
from megascale.launch.failures import Cause, FailureBook
from megascale.launch.leader import AGAIN, BAD_INPUT, FINISHED, GIVE_UP, Fleet, Leader, Timing
from megascale.monitor.events import read_events

QUICK = Timing(join_s=20.0, lost_s=2.0, backoff_s=0.01, reports_s=0.3, farewell_s=0.2, poll_s=0.01)
KILLED = Cause("killed by SIGKILL", 5.0, rank=1, kind="kill")
BROKEN = Cause("boom", 5.0, rank=1)
MISTAKE = Cause("UserError: seed was 1", 5.0, rank=1, kind="mistake")
GONE = Cause("Connection closed by peer", 1.0, rank=0)


class Pretender(threading.Thread):
    """A driver that answers as told for each attempt: how its ranks end, or what is wrong."""

    def __init__(self, store, node, ends, answers=None):
        super().__init__(daemon=True)
        self.board, self.node, self.ends = Board(store), node, ends
        self.answers, self.dead = answers or {}, False
        self.start()

    def run(self):
        for attempt in range(len(self.ends) + 1):
            answer = Answer(f"n{self.node}", self.answers.get(attempt))
            self.board.answer(attempt, self.node, answer)
            order = self.until(lambda: self.board.order(attempt))  # noqa: B023
            if order is None or order.stop is not None:
                break
            if self.node in order.members:
                end = self.ends[attempt]
                if end == "silence":
                    return
                if end != "hangs":
                    self.board.report(attempt, self.node, end)
            over = self.until(lambda: self.board.over(attempt))  # noqa: B023
            if over is None or over.stop is not None:
                break
        self.board.leave(self.node)

    def until(self, look):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            self.board.beat(self.node)
            if (seen := look()) is not None:
                return seen
            time.sleep(0.01)
        return None


@pytest.fixture
def lead(tmp_path):
    """`lead(ends, least)`: how the job of these pretenders ended, and its attempts."""

    def run(ends, least=1, most=9, config="{}", answers=None):
        store = Ledger()
        for node, its in enumerate(ends):
            Pretender(store, node, its, (answers or {}).get(node))
        book = FailureBook([str(tmp_path / "run")], "7")
        fleet = Fleet(parse_config(config), len(ends), least, most, ranks_per_node=2)
        order = Leader(Board(store), book, fleet, QUICK).run()
        return order, [
            event for event in read_events(tmp_path / "run") if event["event"] != "launch"
        ]

    return run


def kinds(events, kind, *names):
    return [tuple(event[name] for name in names) for event in events if event["event"] == kind]


def test_all_is_well(lead):
    order, events = lead([[None], [None], [None]])
    assert order.status == FINISHED
    assert kinds(events, "attempt", "number", "nodes", "world") == [(0, ["n0", "n1", "n2"], 6)]


def test_a_failure_is_followed_by_another_attempt_and_the_culprit_is_named(lead):
    order, events = lead([[GONE, None], [KILLED, None], ["hangs", None]])
    assert order.status == FINISHED
    assert kinds(events, "failure", "error", "rank") == [("killed by SIGKILL", 1)]
    assert len(kinds(events, "attempt")) == 2


def test_a_node_without_a_word_is_lost(lead):
    order, events = lead([[GONE, None], ["silence"]])
    assert order.status == FINISHED
    assert kinds(events, "failure", "error", "node") == [
        ("the node is lost: no word for 2 s", "n1")
    ]
    assert kinds(events, "attempt", "nodes") == [(["n0", "n1"],), (["n0"],)]


def test_too_few_nodes_end_the_job_but_not_the_run(lead):
    order, events = lead([[None], [None]], least=2, answers={1: {0: "no disk"}})
    assert order.status == AGAIN
    assert kinds(events, "failure", "error") == [
        ("1 of 2 nodes are fit, at least 2 are needed; n1: no disk",)
    ]


def test_an_unfit_node_is_left_out_and_may_come_back(lead):
    order, events = lead([[KILLED, None], [KILLED, None]], answers={1: {0: "no disk"}})
    assert order.status == FINISHED
    attempts = kinds(events, "attempt", "nodes", "left_out")
    assert attempts == [(["n0"], {"n1": "no disk"}), (["n0", "n1"], {})]


def test_a_crash_loop_is_given_up(lead):
    order, events = lead([[BROKEN] * 3, [GONE] * 3])
    assert order.status == GIVE_UP and len(kinds(events, "attempt")) == 3
    assert kinds(events, "gave_up", "why") == [("3 times the same failure at step 0: boom",)]


def test_kills_before_the_first_step_are_tried_again_for_longer(lead):
    order, events = lead([[KILLED] * 5 + [None], [GONE] * 5 + [None]])
    assert order.status == FINISHED and len(kinds(events, "attempt")) == 6
    assert kinds(events, "failure", "cause", "starting") == [("kill", True)] * 5
    assert not kinds(events, "gave_up")


def test_bad_input_on_all_nodes_ends_the_job_at_once(lead):
    order, events = lead([[MISTAKE], [MISTAKE]])
    assert order.status == BAD_INPUT and len(kinds(events, "attempt")) == 1
    why = "this must be mended first: UserError: seed was 1"
    assert order.stop == why and kinds(events, "gave_up", "why") == [(why,)]


def test_bad_input_that_one_node_alone_meets_is_a_fault_of_the_node(lead):
    order, events = lead([[MISTAKE, None], [GONE, None]])
    assert order.status == FINISHED and kinds(events, "failure", "cause") == [("fault",)]


def test_a_leader_that_was_stopped_takes_nobody_for_lost(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("megascale.launch.leader.time.monotonic", lambda: clock[0])
    board = Board(Ledger())
    fleet = Fleet(parse_config("{}"), 2, 1, 2, ranks_per_node=1)
    leader = Leader(board, FailureBook([str(tmp_path)], "7"), fleet, Timing(lost_s=4.0))
    board.beat(1)
    present = []
    for seconds in (0, 1, 3600, 1, 1, 1.5):
        clock[0] += seconds
        present.append(leader._present())
    assert present == [{1}] * 5 + [set()]


@pytest.mark.parametrize(
    ("config", "least", "most", "fit", "usable"),
    [
        ("{}", 1, 4, 3, 3),
        ("{}", 1, 2, 3, 2),
        ("{}", 4, 4, 3, 0),
        ("{parallel: {tensor: 4}}", 1, 8, 5, 4),
        ("{parallel: {pipeline: 4, expert: 2}}", 1, 8, 7, 4),
        ("{parallel: {tensor: 4}}", 1, 8, 1, 0),
    ],
)
def test_as_many_nodes_as_the_layout_divides_into_are_used(config, least, most, fit, usable):
    assert Fleet(parse_config(config), 8, least, most, ranks_per_node=2).usable(fit) == usable


def test_the_board_listens_where_it_is_told_and_says_when_it_is_gone():
    import psutil

    ledger, token = Ledger(), "t" * 32
    server = serve_board(ledger, "127.0.0.1", 0, token)
    port = server.port
    listening = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert [c.laddr.ip for c in listening if c.laddr.port == port] == ["127.0.0.1"]
    board = join_board("127.0.0.1", port, lambda: token, join_s=5, lost_s=0.5)
    board.report(3, 0, KILLED)
    board.report(3, 1, None)
    assert Board(ledger).reports(3, range(4)) == {0: KILLED, 1: None}
    assert board.order(0) is None and board.left([0, 1]) == set()
    server.close()
    with pytest.raises(BoardLost):
        for _ in range(100):
            board.beat(0)
            time.sleep(0.01)
