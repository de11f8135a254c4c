"""`megascale launch`: what breaks is started again, and the run ends as if nothing had happened."""

import os
import signal
import stat
from pathlib import Path

import psutil
import pytest
from crash_drill import compare, curve
from drive import Job, kill
from tiny_corpus import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def calm(config, tmp_path_factory):
    """The curve of a run on two nodes of one rank that nothing befell."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    with Job(config, run_dir, 2) as job:
        assert job.finish() == [0, 0], job.said()
        assert not job.events("failure") and len(job.events("attempt")) == 1
        assert job.events("leave")[0]["why"] == "the ranks ended well"
    return curve(run_dir)


def failures(job, what="error"):
    return [(event["node"], event[what]) for event in job.events("failure")]


def test_killed_ranks_and_agents_leave_the_run_bit_equal(config, calm, tmp_path):
    words = ("checkpoint.save_every_steps=100", "checkpoint.emergency_every_steps=1")
    words += (f"checkpoint.emergency_dir={tmp_path / 'disk'}",)
    with Job(config, tmp_path / "run", 2, *words) as job:
        job.wait_for_steps(1)
        [secret] = (tmp_path / "run").glob(".token-*")
        token = secret.read_text()
        assert len(token) == 64 and stat.S_IMODE(secret.stat().st_mode) == 0o600
        job.wait_for(lambda: any(save["error"] is None for save in job.events("save")))
        kill(job.rank(1))
        job.wait_for_steps(2)
        assert job.events("start")[1]["step"] > 0  # from a copy on the nodes' own disks
        orphan = job.rank(0)
        kill(job.agent(0))
        assert not psutil.wait_procs([orphan], timeout=60)[1]
        assert job.finish() == [0, 0], job.said()
        killed = "killed by SIGKILL"
        assert failures(job) == [("n1", killed), ("n0", f"torchrun was {killed}")]
        assert len(job.events("attempt")) == 3
        assert not secret.exists() and token not in job.said()
    texts = [*(tmp_path / "run").glob("*.*"), *(tmp_path / "run/logs").iterdir()]
    assert len(texts) > 5 and not any(token.encode() in path.read_bytes() for path in texts)
    assert compare(calm, curve(tmp_path / "run")).bit_equal


def test_a_lost_node_and_an_unfit_one_are_left_out(config, calm, tmp_path):
    """Three nodes, one of them to spare; one falls sick, one is lost, and one finishes."""
    sick = tmp_path / "sick"
    check = f'echo "$SLURMD_NODENAME feels bad"; test ! -e {sick}-$SLURMD_NODENAME'
    with Job(config, tmp_path / "run", 3, "--nodes=1-2", f"--check={check}") as job:
        job.wait_for_steps(1)
        Path(f"{sick}-n1").touch()
        kill(job.rank(1))
        job.wait_for_steps(2)
        lost = [psutil.Process(job.drivers[2].pid), job.agent(2), job.rank(2)]
        kill(lost[0])
        assert not psutil.wait_procs(lost[1:], timeout=60)[1]
        assert job.finish() == [0, 0, -signal.SIGKILL], job.said()
        attempts = [(event["nodes"], event["left_out"]) for event in job.events("attempt")]
        unfit = {"n1": "the check failed: n1 feels bad"}
        assert attempts[:2] == [(["n0", "n1"], {}), (["n0", "n2"], unfit)]
        assert attempts[2] == (["n0"], {**unfit, "n2": "no word from it"})
        assert failures(job)[1] == ("n2", "the node is lost: no word for 8 s")
    assert compare(calm, curve(tmp_path / "run")).worst_relative < 1e-4


def test_a_signal_saves_and_the_next_job_goes_on(config, calm, tmp_path):
    """Then the driver of node 0 is killed, and the job after that tells of it and goes on."""
    with Job(config, tmp_path / "run", 2) as job:
        job.wait_for_steps(1)
        for driver in job.drivers:
            driver.send_signal(signal.SIGTERM)
        assert job.finish() == [0, 0], job.said()
        latest = (tmp_path / "run/checkpoints/latest").read_text().strip()
        assert int(latest) == max(curve(tmp_path / "run")) < 30
    with Job(config, tmp_path / "run", 2, job="8") as job:
        job.wait_for_steps(2)
        ranks = [job.rank(0), job.rank(1)]
        kill(job.drivers[0])
        assert job.finish() == [-signal.SIGKILL, 4], job.said()
        assert "the driver of node 0 is gone" in job.said()
        assert job.requeued.read_text() == "requeue 8\n"
        assert not psutil.wait_procs(ranks, timeout=60)[1]
    with Job(config, tmp_path / "run", 2, job="9") as job:
        assert job.finish() == [0, 0], job.said()
        assert [error.split(" (")[0] for _, error in failures(job)] == [
            "the job ended without a word"
        ]
    assert compare(calm, curve(tmp_path / "run")).bit_equal


def test_what_a_user_must_mend_ends_the_job_at_once(config, tmp_path):
    cpu = {"CUDA_VISIBLE_DEVICES": ""}
    with Job(config, tmp_path / "run", 1, "device=cuda", environment=cpu) as job:
        assert job.finish() == [2], job.said()
        [why] = [event["why"] for event in job.events("gave_up")]
        assert why.startswith("this must be mended first: UserError: device = cuda, but torch")
        assert failures(job, "cause") == [(job.events("attempt")[0]["nodes"][0], "mistake")]


def test_a_crash_loop_is_given_up(config, tmp_path):
    words = ("--backoff-s=0.1",)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("a file")
    with Job(config, tmp_path / "run", 1, *words) as job:
        assert job.finish() == [3], job.said()
        why = job.events("gave_up")[0]["why"]
        assert why.startswith("3 times the same failure at step 0: StorageError: ")
        assert [rank for _, rank in failures(job, "rank")] == [0] * 3
        assert len(job.events("attempt")) == 3
    with Job(config, tmp_path / "run", 1, *words) as job:  # requeued, against all odds
        assert job.finish() == [3], job.said()
        assert len(job.events("attempt")) == 3 and "the run is given up: 3 times" in job.said()


def test_a_loss_that_stays_bad_is_given_up(config, tmp_path):
    """Every loss above the median counts as a spike, so that no rollback helps for long."""
    spikes = "{action: rollback, window_steps: 8, deviations: 0, patience_steps: 1}"
    words = ("--backoff-s=0.1", f"train.spikes={spikes}", "optim.lr=3e-2")
    with Job(config, tmp_path / "run", 1, *words) as job:
        assert job.finish() == [3], job.said()
        why = job.events("gave_up")[0]["why"]
        assert why.startswith("3 times the same failure at step ")
        assert "the loss stays too high, also after going back to step " in why
        assert "holds no good checkpoint up to step " in why
        assert len(job.events("attempt")) == 3


def test_ranks_that_hang_do_not_keep_a_job_that_should_leave(config, tmp_path):
    with Job(config, tmp_path / "run", 1, "--leave-s=1") as job:
        job.wait_for_steps(1)
        os.kill(job.rank(0).pid, signal.SIGSTOP)
        job.drivers[0].send_signal(signal.SIGUSR1)
        assert job.finish() == [0], job.said()
        assert "the ranks did not stop within 1 s" in job.said()
