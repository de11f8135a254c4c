"""A whole Slurm of two nodes on the loopback interface, in a temporary folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from drive import free_port

ROOT = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout=6
KillWait=60
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of Slurm that are not here."""
    return [name for name in NEEDED if shutil.which(name, path=PATH) is None]


class SlurmCluster:
    """munged, slurmctld and two slurmd; `stop` ends them and every process they have started."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._conf = self.folder / "slurm.conf"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MEGASCALE"))},
            "SLURM_CONF": str(self._conf),
            "PATH": PATH,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start everything and wait until both nodes are idle."""
        ports = {name: free_port() for name in ("port", "port_1", "port_2")}
        host, user = socket.gethostname(), getpass.getuser()
        self._conf.write_text(CONFIG.format(folder=self.folder, host=host, user=user, **ports))
        for name in ("state", "spool.n1", "spool.n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        place = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        place |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        words = [f"--{option}={self.folder / name}" for option, name in place.items()]
        self._daemon("munged", "munged", "--foreground", "--force", "--num-threads=2", *words)
        self.wait_for(lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_until_idle()

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def start_dead_nodes(self) -> None:
        """Start the nodes that a test has killed and not started."""
        for node in ("n1", "n2"):
            if self._daemons[node].poll() is not None:
                self.start_node(node)

    def kill_node(self, node: str) -> None:
        """End the slurmd of a node and all that runs there, as a power cut would."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        self._kill_steps(f"slurmd.{node}.log")
        self._kill_tasks({"SLURM_CONF": str(self._conf), "SLURMD_NODENAME": node})

    def stop(self) -> None:
        """End all processes and remove the folder."""
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        self._kill_steps("slurmd.n*.log")
        self._kill_tasks({"SLURM_CONF": str(self._conf)})
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *words: str, cwd: Path | None = None, **environment: str) -> str:
        """What a program prints that ends well. Raises AssertionError for any other."""
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until_idle(self) -> None:
        """Until both nodes are up and no job runs or waits."""
        states = ("sinfo", "-h", "-o", "%D %T")
        self.wait_for(lambda: self.run(*states) == "2 idle" and not self.run("squeue", "-h"))

    def wait_for_state(self, number: str, *states: str) -> dict[str, str]:
        """The job once it is in one of these states."""
        self.wait_for(lambda: self.job(number)["JobState"] in states)
        return self.job(number)

    def wait_for(self, done: Callable[[], object], timeout_s: float = 600) -> None:
        """Until `done`; else raises AssertionError with what the daemons have logged."""
        deadline = time.monotonic() + timeout_s
        while not done():
            time.sleep(0.1)
            if time.monotonic() > deadline:
                logs = [f"{p.name}:\n{p.read_text()[-2000:]}" for p in self.folder.glob("*.log")]
                raise AssertionError("\n".join(["waited in vain", *logs]))

    def _daemon(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                words, env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def _kill_steps(self, log: str) -> None:
        """Kill the slurmstepd processes that write a log of this name."""
        logs = {str(path) for path in self.folder.glob(log)}
        for process in psutil.process_iter(["name"]):
            if process.info["name"] == "slurmstepd":
                with contextlib.suppress(psutil.Error):
                    if logs & {file.path for file in process.open_files()}:
                        process.kill()

    def _kill_tasks(self, variables: dict[str, str]) -> None:
        """Kill the processes that have these environment variables."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if variables.items() <= process.environ().items():
                    process.kill()
