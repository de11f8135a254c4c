"""The planner process: same plans as in this process, and every way in which it can fail."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError

import numpy as np
import planners
import psutil
import pytest

from megascale.config import finalize, parse_config
from megascale.errors import UserError
from megascale.planner import PLANNERS, CostModel, OffloadModel, Problem, plan_longest_first
from megascale.planner.service import ahead as ahead_module
from megascale.planner.service import process as process_module
from megascale.planner.service import static_time
from megascale.planner.service.ahead import MAX_RESTARTS, PlansAhead
from megascale.planner.service.static_time import static_seconds
from megascale.planner.service.worker import planner_path

COST = CostModel(a=1e-10, b=1e-7, fixed=1e-5)


def problem(num_sequences=3, seed=0, num_ranks=2):
    lengths = np.random.default_rng(seed).integers(1, 100, num_sequences)
    return Problem.of(lengths, num_ranks, 100, "free", COST)


@pytest.fixture
def start():
    """`start(planner, timeout_s=120)`: PlansAhead, ended with the test."""
    started = []

    def start_one(planner, timeout_s=120.0, log=None):
        started.append(PlansAhead(planner, timeout_s, log))
        return started[-1]

    yield start_one
    for plans in started:
        plans.close()


def process_of(plans):
    return psutil.Process(plans._process._process.pid)


def wait_until(happens, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not happens():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


# ----------------------------------------------------------------------------------- its planner


def test_a_planner_is_found_by_its_path():
    assert planner_path(planners.plan_slowly) == "planners:plan_slowly"
    for planner in PLANNERS.values():
        module, name = planner_path(planner).split(":")
        assert getattr(sys.modules[module], name) is planner
    with pytest.raises(ValueError, match="not a function at the top of a module"):
        planner_path(lambda problem: None)


# --------------------------------------------------------------------------- what it is there for


def test_a_problem_reaches_the_planner_whole(start, tmp_path):
    offload = OffloadModel(stage_layers=12, bytes_per_token=34.5, copy_bytes_per_s=2.5e10)
    cost = CostModel(**{field.name: 2 + i for i, field in enumerate(dataclasses.fields(CostModel))})
    whole = Problem.of(
        [3, 4_000_000_000, 1],
        8,
        2**33,
        "lockstep",
        cost,
        pipeline=3,
        expert_group=4,
        offload=offload,
        budget_s=1 / 3,
        slowdown=(1.0, 1.5) * 4,
        chunks=4,
    )
    for field in dataclasses.fields(Problem):
        if field.default is not dataclasses.MISSING:
            assert getattr(whole, field.name) != field.default, f"{field.name} is not tested"
    plans = start(planners.plan_aloud, log=tmp_path / "planner.log")
    assert plans.result(plans.request(whole)).trouble is None
    assert (tmp_path / "planner.log").read_text() == f"{whole} {whole.lengths.dtype}\n"


def test_plans_are_those_of_this_process_in_order(start):
    plans = start(plan_longest_first)
    problems = [problem(n % 40 + 1, seed=n) for n in range(60)]
    requests = [plans.request(one) for one in problems]
    for request, one in zip(requests, problems):
        planned = plans.result(request)
        assert planned.trouble is None
        assert planned.plan.digest() == plan_longest_first(one).digest()
        assert planned.plan.to_bytes() == planned.payload


def test_plans_are_made_while_others_work(start):
    plans = start(planners.plan_slowly)
    plans.result(plans.request(problem()))
    request = plans.request(problem())
    wait_until(lambda: plans.ready(request))  # nobody asks for the result
    assert plans.result(request).trouble is None


def test_a_large_problem_is_sent_in_the_background(start):
    plans = start(planners.plan_on_and_on)
    large = Problem.of(np.ones(1_000_000, np.int64), 2, 100, "free", COST)
    requests = [plans.request(large) for _ in range(3)]  # more than a socket holds
    wait_until(lambda: process_of(plans).cpu_times().user > 0.5)
    assert not any(map(plans.ready, requests))  # it still plans the first, and has read no other


def test_what_a_solver_prints_is_no_plan(start, tmp_path):
    plans = start(planners.plan_loudly, log=tmp_path / "planner.log")
    assert plans.result(plans.request(problem())).trouble is None
    assert (tmp_path / "planner.log").read_text().startswith("Solver 1.0\n")


def test_a_request_can_be_forgotten(start):
    plans = start(planners.plan_slowly)
    forgotten, kept = plans.request(problem(4)), plans.request(problem(5))
    plans.forget(forgotten)
    assert plans.result(kept).plan.digest() == plan_longest_first(problem(5)).digest()
    assert not plans._plans


def test_it_is_a_light_and_polite_process(start):
    plans = start(plan_longest_first)
    plans.result(plans.request(problem()))
    process = process_of(plans)
    mapped = [one.path for one in process.memory_maps()]
    assert any("/numpy/" in path for path in mapped)
    assert not any("/torch/" in path or "/scipy/" in path for path in mapped), mapped
    assert process.nice() > psutil.Process().nice()
    assert process.environ()["OMP_NUM_THREADS"] == "1"
    assert process.num_threads() <= 2


# ------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("after_s", [0.0, 0.02, 1.0])
def test_a_ctrl_c_of_the_run_does_not_reach_it(start, after_s):
    """Also while Python starts."""
    plans = start(plan_longest_first)
    time.sleep(after_s)
    process = process_of(plans)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    assert plans.result(plans.request(problem())).trouble is None
    assert process.is_running()


PARENT = """
import os, sys, time
from megascale.planner.service.ahead import PlansAhead
import planners
from test_planner_worker import problem
plans = PlansAhead(planners.plan_on_and_on, 30.0)
plans.request(problem())
if sys.argv[1] == "fork" and os.fork() == 0:
    time.sleep(200)  # as a writer of checkpoints does, with the socket still open
    os._exit(0)
print(plans._process._process.pid, flush=True)
time.sleep(200)
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_no_orphan_stays_when_the_parent_is_killed(how):
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path + os.pathsep + os.path.dirname(__file__)},
        start_new_session=True,
    )
    try:
        worker = psutil.Process(int(parent.stdout.readline()))
        wait_until(lambda: worker.cpu_times().user > 0.5)
        parent.kill()
        parent.wait()
        wait_until(lambda: is_gone(worker))
    finally:
        os.killpg(parent.pid, signal.SIGKILL)


def test_it_ends_at_once_in_the_midst_of_a_plan(start):
    plans = start(planners.plan_on_and_on)
    request, process = plans.request(problem()), process_of(plans)
    wait_until(lambda: process.cpu_times().user > 0.5)
    plans.close()
    assert is_gone(process)
    with pytest.raises(CancelledError):  # nor is another process started for it
        plans.result(request)


# ------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    "planner, message",
    [
        (planners.plan_or_die, "the planner was killed by SIGKILL"),
        (planners.plan_or_hang, "the planner took longer than planner.timeout_s = 3"),
        (planners.plan_or_raise, "the planner failed (ZeroDivisionError: a mistake)"),
        (
            planners.plan_or_lose,
            "the planner made no plan of this batch (6 sequences are",
        ),
        (
            planners.plan_or_mistake,
            "the planner made no plan of this batch (a plan for (3, 'free'",
        ),
        (planners.plan_or_babble, "the planner sent what is no plan (invalid load key, '\\x00'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_failure_costs_one_line_and_no_plan(start, planner, message):
    plans = start(planner, timeout_s=3.0 if planner is planners.plan_or_hang else 120.0)
    sizes = [3, planners.TROUBLE, 5, 6]
    requests = [plans.request(problem(size)) for size in sizes]
    found = [plans.result(request) for request in requests]
    for size, planned in zip(sizes, found):
        assert planned.plan.digest() == plan_longest_first(problem(size)).digest()
    assert [planned.trouble is None for planned in found] == [True, False, True, True]
    trouble = found[1].trouble
    assert trouble.startswith(message) and "\n" not in trouble
    assert "longest_first made this plan" in trouble and "started again (1 of 3 times)" in trouble


def test_a_process_that_is_killed_between_plans_is_started_again(start):
    plans = start(plan_longest_first)
    plans.result(plans.request(problem()))
    first = process_of(plans)
    first.kill()
    assert "killed by SIGKILL" in plans.result(plans.request(problem(4))).trouble
    assert plans.result(plans.request(problem(5))).trouble is None
    assert process_of(plans).pid != first.pid and is_gone(first)


@pytest.mark.parametrize("num_sequences", [4, 1_000_000])
def test_a_process_that_is_stopped_is_late(start, num_sequences):
    """Whether it is to read or to answer."""
    plans = start(plan_longest_first, timeout_s=3.0)
    plans.result(plans.request(problem()))
    process_of(plans).suspend()
    lengths = np.ones(num_sequences, np.int64)
    planned = plans.result(plans.request(Problem.of(lengths, 2, num_sequences, "free", COST)))
    assert planned.trouble.startswith("the planner took longer than planner.timeout_s = 3;")
    assert plans.result(plans.request(problem())).trouble is None


def test_a_death_that_a_fork_hides_is_noticed_in_time(start, monkeypatch):
    """A process that the run forked at the wrong moment holds the other end of the socket open."""
    honest, held = process_module._start, []

    def start_and_hold(path, descriptor, log):
        held.append(os.dup(descriptor))
        return honest(path, descriptor, log)

    monkeypatch.setattr(process_module, "_start", start_and_hold)
    plans = start(plan_longest_first, timeout_s=3.0)
    plans.result(plans.request(problem()))
    process_of(plans).kill()
    planned = plans.result(plans.request(problem()))
    assert planned.trouble.startswith("the planner took longer than planner.timeout_s = 3;")
    assert plans.result(plans.request(problem())).trouble is None
    for descriptor in held:
        os.close(descriptor)


def test_after_enough_restarts_the_fast_planner_stays(start):
    plans = start(planners.plan_or_raise)
    bad = problem(planners.TROUBLE)
    found = [plans.result(plans.request(bad)) for _ in range(MAX_RESTARTS + 3)]
    said = [planned.trouble for planned in found]
    assert ["of 3 times" in (line or "") for line in said] == [True] * 3 + [False] * 3
    assert "the fast planner makes all further plans" in said[MAX_RESTARTS]
    assert said[MAX_RESTARTS + 1 :] == [None, None]
    expected = plan_longest_first(bad).digest()
    assert all(planned.plan.digest() == expected for planned in found)
    assert plans.result(plans.request(problem(9))).trouble is None


def test_failures_that_are_long_ago_do_not_count(start, monkeypatch):
    monkeypatch.setattr(ahead_module, "RESTART_WINDOW", 4)
    plans = start(planners.plan_or_raise)
    said = []
    for size in [planners.TROUBLE, 3, 3] * 5:
        said.append(plans.result(plans.request(problem(size))).trouble)
    assert sum(line is not None for line in said) == 5
    assert "2 of 3 times" in said[-3]


def test_a_planner_that_cannot_start_is_no_end(start, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    plans = start(plan_longest_first)
    found = [plans.result(plans.request(problem(n))) for n in range(1, 7)]
    assert all("does not start" in planned.trouble for planned in found[:4])
    assert [planned.trouble for planned in found[4:]] == [None, None]


def test_a_module_that_is_gone_is_named(start, monkeypatch):
    monkeypatch.setattr(process_module, "planner_path", lambda planner: "nowhere:plan")
    plans = start(plan_longest_first)
    assert "ended with status 1" in plans.result(plans.request(problem())).trouble


def test_the_mistake_of_a_user_comes_through(start):
    plans = start(planners.plan_or_refuse)
    bad, good = plans.request(problem(planners.TROUBLE)), plans.request(problem())
    with pytest.raises(UserError, match="^a sequence does not fit; set planner.capacity"):
        plans.result(bad)
    assert plans.result(good).trouble is None


def test_sequences_that_are_too_long_for_a_rank_are_shared(start):
    plans = start(planners.plan_or_raise)
    lengths = [150, 20, 30, 1, 2, 3, 4]
    assert len(lengths) == planners.TROUBLE
    planned = plans.result(plans.request(Problem.of(lengths, 2, 100, "free", COST)))
    assert "bytescale made this plan" in planned.trouble


@pytest.mark.parametrize(
    "word, message",
    [
        ("ahead_steps=0", "planner.ahead_steps = 0 must be at least 1"),
        ("timeout_s=0", "planner.timeout_s = 0.0 must be a finite number above 0, such as 30"),
        ("timeout_s=1e7", "planner.timeout_s = 10000000.0 must be at most 1000000"),
    ],
)
def test_options_that_cannot_work(word, message):
    config = parse_config("data: {sources: {a: {path: b}}}", [f"planner.{word}"])
    with pytest.raises(UserError, match=message):
        finalize(config, {"a": 1}, 257)


# ------------------------------------------------------------------------ beside it, static's plan


@pytest.mark.parametrize(
    "mode, pipeline, planner",
    [("free", 1, "hybrid"), ("aligned", 2, "hybrid"), ("lockstep", 1, "static_best")],
)
def test_a_plan_comes_with_the_seconds_of_static(start, mode, pipeline, planner):
    lengths, slow = [400, 90, 80, 70, 30, 20, 10, 300], (1.0, 1.0, 1.5, 1.0)
    one = Problem.of(lengths, 4, 200, mode, COST, pipeline=pipeline, slowdown=slow)
    plans = start(PLANNERS[planner])
    planned = plans.result(plans.request(one))
    assert planned.static_s.result() == PLANNERS["static"](one).predicted_s
    assert planned.static_s.result() >= planned.plan.predicted_s


def test_where_there_is_no_time_of_static(start, monkeypatch):
    hybrid, static = PLANNERS["hybrid"], PLANNERS["static"]
    two = problem(8)
    assert static_seconds(two, hybrid) == static(two).predicted_s
    assert static_seconds(two, static) is None
    too_long = Problem.of([300, 5], 2, 100, "free", COST)
    assert static_seconds(too_long, hybrid) is None
    monkeypatch.setattr(static_time, "MOST_WORK", 16)
    assert static_seconds(two, hybrid) == static(two).predicted_s
    assert static_seconds(problem(17), hybrid) is None
    staged = Problem.of(two.lengths, 2, 100, "aligned", COST, pipeline=2)
    assert static_seconds(staged, hybrid) is not None
    three = Problem.of(two.lengths, 2, 100, "aligned", COST, pipeline=3)
    assert static_seconds(three, hybrid) is None
    plans = start(planners.plan_or_raise)
    failed = plans.result(plans.request(problem(planners.TROUBLE)))
    assert failed.trouble is not None and failed.static_s.result() is None


def test_a_process_that_dies_over_static_costs_no_plan(start):
    plans = start(planners.plan_and_spoil_static)
    first, second, third = [plans.request(problem(n)) for n in (3, planners.TROUBLE, 4)]
    assert plans.result(first).static_s.result() == PLANNERS["static"](problem(3)).predicted_s
    spoiled = plans.result(second)
    assert spoiled.trouble is None and spoiled.static_s.result() is None
    assert "killed by SIGKILL" in plans.result(third).trouble
    assert plans.result(plans.request(problem(5))).trouble is None
