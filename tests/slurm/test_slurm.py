"""The batch scripts on a real Slurm of two nodes: every way in which a job may end."""

import json
import signal
import warnings
from pathlib import Path

import psutil
import pytest
from crash_drill import compare, curve
from slurm_cluster import ROOT, SlurmCluster, missing
from tiny_corpus import tiny_config

from megascale.monitor.events import read_events

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]
EVIL = """a 'b' "c" $(touch pwned) `touch pwned` %j;#"""
SUBMIT = ("python3", "-m", "megascale", "submit")


@pytest.fixture(scope="module")
def slurm():
    if missing():
        said = f"NO SLURM HERE ({', '.join(missing())}): apt-get install slurm-wlm munge"
        warnings.warn(said, stacklevel=1)
        pytest.skip(said)
    cluster = SlurmCluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def a_quiet_cluster(request):
    """Nothing runs, and both nodes are up, when a test begins."""
    slurm = request.getfixturevalue("slurm")
    slurm.wait_until_idle()
    yield
    slurm.start_dead_nodes()
    slurm.run("scancel", "--partition", "main")


class SlurmRun:
    """A run that was submitted as the job of a number."""

    def __init__(self, slurm, run_dir, number):
        self.slurm, self.run_dir, self.number = slurm, run_dir, number

    def events(self, kind):
        return [event for event in read_events(self.run_dir) if event["event"] == kind]

    def rows(self):
        path = self.run_dir / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def wait_for_steps(self, starts, steps=4):
        self.slurm.wait_for(lambda: len(self.events("start")) >= starts)
        rows = self.rows()
        self.slurm.wait_for(lambda: self.rows() >= rows + steps)

    def ends(self, *states):
        """Wait until the job is in one of these states, and return what it said."""
        self.slurm.wait_for_state(self.number, *states)
        return self.said()

    def said(self):
        logs = self.run_dir / "logs"
        return "".join(path.read_text() for path in sorted(logs.glob("slurm-*.log")))

    def ranks(self):
        """The ranks that run now."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "train" in words and f"run_dir={self.run_dir}" in words and "-u" in words:
                found.append(process)
        return found


def submit(slurm, config, run_dir, *words):
    """The run of `megascale submit`."""
    slurm.wait_until_idle()
    words = (*SUBMIT, str(config), f"run_dir={run_dir}", *words)
    return SlurmRun(slurm, run_dir, slurm.run(*words, cwd=run_dir.parent).split()[1])


@pytest.fixture(scope="module")
def calm(slurm, config, tmp_path_factory):
    """A run of two nodes that nothing befell, with a name that asks for trouble."""
    folder = tmp_path_factory.mktemp("calm")
    run = submit(slurm, config, folder / EVIL, "--nodes=2")
    said = run.ends("COMPLETED", "FAILED")
    assert "done: 30 steps" in said and slurm.job(run.number)["JobState"] == "COMPLETED"
    assert run.events("attempt")[0]["nodes"] == ["n1", "n2"]
    assert len(list((folder / EVIL / "logs").glob("slurm-[0-9]*.log"))) == 1
    assert not list(folder.glob("**/pwned"))
    return curve(run.run_dir)


def test_a_job_that_nothing_befalls_completes(calm):
    assert len(calm) == 30


def test_time_limit_requeue_and_fewer_nodes(slurm, config, calm, tmp_path):
    run = submit(slurm, config, tmp_path / "run", "--nodes=1-2", "--time=60", "--save-s=170")
    run.wait_for_steps(1)
    for rank in run.ranks():
        rank.send_signal(signal.SIGSTOP)  # the run must last until Slurm sends its signal
    minutes = int(slurm.run("squeue", "-h", "-j", run.number, "-O", "TimeUsed").split(":")[-2])
    slurm.run("scontrol", "update", f"JobId={run.number}", f"TimeLimit={minutes + 3}")
    slurm.wait_for(lambda: "SIGUSR1: the ranks are to save and stop" in run.said())
    for rank in run.ranks():
        rank.send_signal(signal.SIGCONT)
    slurm.wait_for(lambda: slurm.job(run.number)["Restarts"] == "1")
    slurm.run("scontrol", "update", f"JobId={run.number}", "TimeLimit=60")
    assert run.events("stop")[0]["asked"] and not run.events("failure")
    assert run.events("stop")[0]["step"] == int((run.run_dir / "checkpoints/latest").read_text())

    run.wait_for_steps(2)
    assert run.events("start")[1]["step"] == run.events("stop")[0]["step"]
    slurm.run("scontrol", "update", "NodeName=n2", "State=drain", "Reason=test")
    slurm.run("scontrol", "requeue", run.number)
    said = run.ends("COMPLETED", "FAILED")
    slurm.run("scontrol", "update", "NodeName=n2", "State=resume")

    assert "done: 30 steps" in said and slurm.job(run.number)["Restarts"] == "2"
    assert not run.events("failure")
    assert [event["world"] for event in run.events("attempt")] == [2, 2, 1]
    assert compare(calm, curve(run.run_dir)).worst_relative < 1e-4


def test_scancel_saves_and_the_job_stays_cancelled(slurm, config, tmp_path):
    """Submitted by hand, with the plain script."""
    run_dir = tmp_path / "run"
    words = ("--nodes=2", f"--chdir={tmp_path}", "--output=out.txt", ROOT / "slurm/train.sbatch")
    sbatch = ("sbatch", "--parsable", *map(str, words), str(config), f"run_dir={run_dir}")
    run = SlurmRun(slurm, run_dir, slurm.run(*sbatch))
    run.wait_for_steps(1)
    slurm.run("scancel", run.number)
    run.ends("CANCELLED")
    slurm.wait_until_idle()
    assert slurm.job(run.number)["Restarts"] == "0"
    stop = run.events("stop")[0]
    assert stop["asked"] and stop["step"] == int((run_dir / "checkpoints/latest").read_text())


def test_lost_nodes(slurm, config, calm, tmp_path):
    """Without the second node the job goes on; without the first it is requeued to the second."""
    run = submit(slurm, config, tmp_path / "run", "--nodes=1-2")
    run.wait_for_steps(1)
    slurm.kill_node("n2")
    run.wait_for_steps(2)
    assert slurm.job(run.number)["Restarts"] == "0"
    assert run.events("attempt")[1]["nodes"] == ["n1"]
    for rank in run.ranks():
        rank.send_signal(signal.SIGSTOP)  # the run must last until Slurm has missed the node:
    # one that is back before that would keep the job, without its batch script
    slurm.wait_for(lambda: slurm.job(run.number)["NodeList"] == "n1")
    slurm.kill_node("n1")
    slurm.start_node("n2")
    said = run.ends("COMPLETED", "FAILED")
    slurm.start_node("n1")
    assert "done: 30 steps" in said and slurm.job(run.number)["Restarts"] == "1"
    assert run.events("attempt")[2]["nodes"] == ["n2"]
    assert compare(calm, curve(run.run_dir)).worst_relative < 1e-4


def test_nothing_is_requeued_for_ever(slurm, config, tmp_path):
    run = submit(slurm, config, tmp_path / "run", "--check=echo no disk; exit 1")
    said = run.ends("COMPLETED", "FAILED")
    why = "3 times the same failure at step 0: 0 of 1 nodes are fit, at least 1 are needed"
    assert f"the run is given up: {why}; n1: the check failed: no disk" in said
    job = slurm.job(run.number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "2")


def test_a_sweep_and_a_corpus(slurm, config, tmp_path):
    (tmp_path / "list").write_text("seed=1 optim.lr=1e-2\nseed=2 'run_dir=second run'\n")
    words = (
        str(config),
        "train.tokens=3000",
        "--sweep=list",
        "--name=s w",
        "--sbatch=--oversubscribe",
    )
    slurm.run(*SUBMIT, *words, cwd=tmp_path)
    (tmp_path / "in").write_text("".join(f"text {number}\n" for number in range(50)))
    (tmp_path / "r.yaml").write_text("name: x\ninputs: [{kind: files, paths: [in]}]\n")
    words = ("--job=prepare", "--nodes=2", "--mpi=mpiexec")
    number = slurm.run(*SUBMIT, "r.yaml", *words, cwd=tmp_path).split()[1]
    slurm.wait_for_state(number, "COMPLETED", "FAILED", "CANCELLED")
    slurm.wait_until_idle()
    for run_dir in ("runs/s w/0", "second run"):
        assert len(curve(tmp_path / run_dir)) == 3
    log = (tmp_path / f"r-{number}.log").read_text()
    assert slurm.job(number)["JobState"] == "COMPLETED", log
    assert Path(tmp_path / "corpora/x").is_dir()


def test_the_doctor_examines_the_nodes_of_a_step(slurm, tmp_path):
    doctor = ("python3", "-m", "megascale", "doctor", "--nodes", "--json", "--least=0.01")
    step = ("srun", "--nodes=2", "--ntasks-per-node=1", "--cpu-bind=none")
    said = json.loads(slurm.run(*step, *doctor, "--seconds=0.1", cwd=tmp_path))
    assert said["ranks"] == 2 and not said["outliers"]
    assert [one["host"] for one in said["reports"]] == ["n1", "n2"]
    assert "between-nodes" in said["expected"] and "in-node" not in said["expected"]
