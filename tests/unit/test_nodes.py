"""`megascale doctor --nodes`: who meets whom, who stands out, and what a device says of itself."""

import argparse
import dataclasses
from collections import Counter

import numpy as np
import pytest

from megascale.cli import main
from megascale.commands import doctor_nodes as nodes_command
from megascale.errors import UserError
from megascale.launch.node_check import check_node
from megascale.runtime import self_test
from megascale.runtime.nodes import _Board
from megascale.runtime.placement import meetings, tournament
from megascale.runtime.self_test import cpu, examine_device
from megascale.runtime.verdict import Report, describe, judge, parse_expected

FIGURES = {"matmul": 100.0, "memory": 50.0, "in-node": 10.0, "between-nodes": 2.0}
HOSTS = ["a", "a", "b", "b", "c", "c"]


def pairs(opponent):
    assert [opponent[other] for other in opponent] == list(range(len(opponent)))  # of both alike
    return [(one, other) for one, other in enumerate(opponent) if one < other]


@pytest.mark.parametrize("n", range(1, 14))
def test_each_meets_each_once_in_linear_time(n):
    rounds = tournament(n)
    assert len(rounds) == (n - 1 if n % 2 == 0 else n)
    met = Counter(pair for opponent in rounds for pair in pairs(opponent))
    assert met == Counter((a, b) for b in range(n) for a in range(b))


@pytest.mark.parametrize("sizes", [(1,), (3,), (2, 2), (4, 4, 4), (3, 1, 2), (8,) * 5])
def test_ranks_meet_in_their_node_and_nodes_meet_rank_by_rank(sizes):
    hosts = [name for name, size in zip("abcde", sizes) for _ in range(size)]
    places = [place for size in sizes for place in range(size)]
    rounds = meetings(hosts)
    assert len(rounds) <= max(sizes) + len(sizes)
    met = Counter((kind, pair) for kind, opponent in rounds for pair in pairs(opponent))
    wanted = {
        ("in-node" if hosts[a] == hosts[b] else "between-nodes", (a, b))
        for b in range(len(hosts))
        for a in range(b)
        if hosts[a] == hosts[b] or places[a] == places[b]
    }
    assert met == Counter(wanted)


def reports(**changes):
    """Six ranks on three nodes; `r3={...}` replaces figures of rank 3."""
    made = []
    for rank, host in enumerate(HOSTS):
        links = {k: (10.0 if HOSTS[k] == host else 2.0) for k in range(6) if k != rank}
        one = Report(rank, host, (), FIGURES | {"all-reduce": 1.0 + rank / 10}, links)
        made.append(dataclasses.replace(one, **changes.get(f"r{rank}", {})))
    return made


def named(given, least=0.75, told=None):
    verdict = judge(given, dict(enumerate(HOSTS)), least, told or {})
    return [(one.host, one.rank, one.what.split()[0]) for one in verdict.outliers]


def test_a_rank_that_answers_nothing_of_use_has_not_answered():
    from torch.distributed import HashStore, PrefixStore

    store = HashStore()
    board = _Board(store, 0, 5)
    for rank, value in enumerate(["null", "[]", "{", '{"faults": []}']):
        PrefixStore("nodes", store).set(f"alone/{rank}", value)
    assert board.hear("alone", 0.1) == {3: {"faults": []}}


def test_who_stands_out():
    assert named(reports()) == []
    slow = reports(r3={"figures": FIGURES | {"matmul": 74.0}})
    assert named(slow) == [("b", 3, "matmul")] and named(slow, least=0.7) == []
    (outlier,) = judge(slow, dict(enumerate(HOSTS)), 0.75, {}).outliers
    said = "matmul 74 FLOP/s, median 100 FLOP/s, expected at least 75 FLOP/s"
    assert str(outlier) == f"FAIL  node b rank 3: {said}"
    assert named(reports(r1={"figures": FIGURES | {"memory": float("nan")}}))[0][2] == "memory"
    assert named(reports(r5={"faults": ("memory is broken",)})) == [("c", 5, "memory")]
    assert named(reports()[:-1]) == [("c", 5, "no")]


def test_what_is_told_counts_instead_of_the_median():
    assert [rank for _, rank, _ in named(reports(), told={"matmul": 200.0})] == list(range(6))
    assert named(reports(), told={"all-reduce": 1.3}) == []
    assert named(reports(), told={"all-reduce": 2.0}) == [("a", 0, "all-reduce")]  # of all, once


def test_a_slow_pair_is_named_where_none_of_the_two_is():
    links = {1: 10.0, 2: 2.0, 3: 2.0, 4: 0.5, 5: 2.0}
    assert named(reports(r0={"links": links})) == [("a", 0, "with")]
    slow = {"links": {1: 10.0} | dict.fromkeys(range(2, 6), 0.5)}
    slow["figures"] = FIGURES | {"between-nodes": 0.5}
    assert named(reports(r0=slow)) == [("a", 0, "between-nodes")]


def test_who_lost_another_is_named_only_if_nobody_else_is():
    lost = {f"r{rank}": {"lost": "the all-reduce failed"} for rank in range(5)}
    assert len(named(reports(**lost))) == 5
    assert named(reports(**lost)[:-1]) == [("c", 5, "no")]


def test_the_table_says_what_was_measured():
    told = describe(judge(reports(), dict(enumerate(HOSTS)), 0.5, {})).splitlines()
    assert told[0] == "6 ranks, nodes: 3" and told[-1] == "no rank and no pair stands out"
    assert [line.split()[0] for line in told[1:-1]] == [*FIGURES, "all-reduce"]


@pytest.mark.parametrize("text", ["matmul", "matmul=5", "flops=5T", "matmul=-1T", "matmul=nanG"])
def test_what_cannot_be_expected(text):
    assert parse_expected(["matmul=1.5T", "in-node=3M"]) == {"matmul": 1.5e12, "in-node": 3e6}
    with pytest.raises(UserError, match="--expect"):
        parse_expected([text])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ranks=2"], "--ranks goes with --nodes"),
        (["--nodes", "--folder=."], "without --nodes"),
        (["--nodes", "--least=1.5"], "--least is above 0"),
        (["--nodes", "--timeout-s=0"], "--timeout-s from 1"),
        (["--nodes", "--ranks=many"], "--ranks must be"),
    ],
)
def test_bad_input_ends_with_status_2(words, says, capsys):
    assert main(["doctor", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_step_of_slurm_says_which_rank_this_is(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not nodes_command._join_slurm()
    given = {"STEP_NUM_TASKS": "16", "PROCID": "9", "LOCALID": "1", "JOB_ID": "420007"}
    for name, value in {**given, "STEP_NODELIST": "n[0-1]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        nodes_command._join_slurm()
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert nodes_command._join_slurm()
    taken = [
        nodes_command.os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    ]
    assert taken == ["9", "16", "1", "10007"]


def small(**changes):
    return dataclasses.replace(cpu(size=64, memory_bytes=2 << 22), **changes)


def test_a_device_that_is_fit():
    found = examine_device(small(), 0.0)
    assert found.faults == () and set(found.figures) == {"matmul", "memory", "loopback"}
    assert all(figure > 0 for figure in found.figures.values())


class Flips(np.ndarray):
    """A matrix whose products are right but for one entry, from the second product on."""

    calls = 0

    def __matmul__(self, other):
        product = np.asarray(self) @ np.asarray(other)
        Flips.calls += 1
        product[3, 5] += Flips.calls > 1
        return product


def test_wrong_products_are_found():
    def wrong(array):
        product = array.astype(np.float64)
        product[7, 9] += 1.0
        return product

    found = examine_device(small(fetch=wrong), 0.0)
    assert found.faults == ("matmul on cpu is wrong in 1 of 64 rows",)
    flips = small(place=lambda array: array.astype(np.float32).view(Flips))
    assert "another result the 2. time" in examine_device(flips, 0.0).faults[0]


class Forgets(np.ndarray):
    """Words, one of which keeps its lowest bit set."""

    def __setitem__(self, where, value):
        super().__setitem__(where, value)
        self.reshape(-1).view(np.ndarray)[12345] |= 1


def test_broken_memory_and_broken_devices_are_found():
    forgets = small(empty=lambda rows, words: np.empty((rows, words), np.int64).view(Forgets))
    assert "1 words of" in examine_device(forgets, 0.0).faults[0]

    def raises(array):
        raise RuntimeError("CUDA error:\nuncorrectable ECC error")

    found = examine_device(small(place=raises), 0.0)
    assert found.faults == ("matmul: RuntimeError: CUDA error: uncorrectable ECC error",)
    assert set(found.figures) == {"memory", "loopback"}


def test_launch_tests_devices_after_a_failure(monkeypatch, tmp_path, capsys):
    assert check_node(str(tmp_path), None, lambda: None, "n1", ranks_after_failure=1) is None
    monkeypatch.setattr(self_test, "local_devices", lambda ranks, memory_share: [small()] * ranks)
    monkeypatch.setattr("sys.argv", ["self_test", "--ranks=2"])
    assert self_test.main() == 0
    monkeypatch.setattr(self_test, "loopback", lambda: ("deaf", 1.0))
    assert self_test.main() == 1
    assert capsys.readouterr().out == "fit\ndeaf; deaf\n"


def test_fewer_devices_than_ranks_are_a_fault(monkeypatch, capsys):
    monkeypatch.setattr(self_test, "DRIVERS", (self_test.Path("/"),))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    monkeypatch.setattr("sys.argv", ["self_test", "--ranks=8"])
    assert self_test.main() == 1
    assert capsys.readouterr().out == "7 CUDA devices for 8 ranks\n"


def test_local_ranks_end_with_the_status_of_rank_0(monkeypatch):
    monkeypatch.setattr(nodes_command, "_local_rank", _end_with_1)
    assert nodes_command._start_ranks(argparse.Namespace(ranks="2")) == 1


def _end_with_1(rank, world, port, args):
    raise SystemExit(1 if rank == 0 else 0)
