"""What a drill does to a run, all of it from outside but for `drill_hooks`."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from drill_scene import NAN_EVERY, Scene
from drive import kill

from megascale.checkpoint.folder import checkpoints_dir

AWAY_S = 3.0
"""For how long a channel, a clock or a disk is wrong."""
AHEAD_S = 3600.0


@dataclass(frozen=True)
class Injected:
    """A fault that was done to a run."""

    noticed: Callable[[], bool]
    """Whether the system has noticed."""
    mend: Callable[[], None] = field(default=lambda: None)
    """End what would otherwise last for ever, once it was noticed."""


def kill_worker(scene: Scene) -> Injected:
    """SIGKILL of a rank."""
    noticed = scene.new_event("failure")
    kill(scene.job.rank(scene.any_node()))
    return Injected(noticed)


def kill_agent(scene: Scene) -> Injected:
    """SIGKILL of torchrun's agent of a node."""
    noticed = scene.new_event("failure")
    kill(scene.job.agent(scene.any_node()))
    return Injected(noticed)


def kill_driver(scene: Scene) -> Injected:
    """SIGKILL of the driver of a node that does not lead: the node is lost."""
    noticed = scene.new_event("failure")
    kill(psutil.Process(scene.job.drivers[1].pid))
    return Injected(noticed)


def kill_leader(scene: Scene) -> Injected:
    """SIGKILL of the driver of node 0: the job is lost, and requeued."""
    noticed = scene.new_job()
    kill(psutil.Process(scene.job.drivers[0].pid))
    return Injected(noticed)


def hang(scene: Scene) -> Injected:
    """SIGSTOP of a rank: it stands still without dying."""
    noticed = scene.new_event("hang")
    scene.job.rank(scene.any_node()).send_signal(signal.SIGSTOP)
    return Injected(noticed)


def slow_rank(scene: Scene) -> Injected:
    """A rank whose forward passes take ten times as long; nothing may be restarted."""
    rank = scene.any_node()
    noticed = scene.new_event("slow", rank=rank)
    scene.control(slow_rank=rank)
    return Injected(noticed, scene.control)


def nan_gradients(scene: Scene) -> Injected:
    """All gradients of a step are NaN (every so many steps, as in the undisturbed run)."""
    scene.wait_for(lambda: scene.step() % NAN_EVERY >= NAN_EVERY - 3, "a step of NaN gradients")
    return Injected(scene.new_event("skip"))


def _damage(scene: Scene, damage: Callable[[Path], None]) -> Injected:
    """Spoil a file of the latest checkpoint, and have the run need it."""
    ranks = [scene.job.rank(node) for node in range(2)]
    for rank in ranks:  # no newer one may be written before it is needed
        rank.send_signal(signal.SIGSTOP)
    folder = checkpoints_dir(scene.run_dir)
    latest = folder / (folder / "latest").read_text().strip()
    damage(scene.random.choice(sorted(latest.glob("*.distcp"))))
    noticed = scene.new_words(f"{latest.name} is damaged")
    for rank in ranks:
        kill(rank)
    return Injected(noticed)


def bit_flip(scene: Scene) -> Injected:
    """One bit of the latest checkpoint is another, and a rank dies."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        place = scene.random.randrange(len(content))
        content[place] ^= 1 << scene.random.randrange(8)
        path.write_bytes(content)

    return _damage(scene, flip)


def truncated(scene: Scene) -> Injected:
    """A file of the latest checkpoint lacks its end, and a rank dies."""

    def cut(path: Path) -> None:
        os.truncate(path, scene.random.randrange(path.stat().st_size))

    return _damage(scene, cut)


def full_disk(scene: Scene) -> Injected:
    """The file system of the run (a tmpfs of its own) has no room left; nothing is restarted."""
    noticed = scene.new_words("No space left on device")
    filler = scene.run_dir.parent / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
        while file.write(b"0"):
            pass

    def mend() -> None:
        time.sleep(AWAY_S)
        filler.unlink()

    return Injected(noticed, mend)


def lost_channel(scene: Scene) -> Injected:
    """No connection between the drivers for some seconds; nothing may be restarted."""
    noticed = scene.new_words("node 0 is out of reach")
    scene.proxy.cut()

    def mend() -> None:
        time.sleep(AWAY_S)
        scene.proxy.restore()

    return Injected(noticed, mend)


def clock_jump(scene: Scene) -> Injected:
    """The wall clock of all processes jumps by an hour, and back; there is nothing to notice."""
    scene.control(ahead_s=scene.random.choice([-AHEAD_S, AHEAD_S]))

    def mend() -> None:
        time.sleep(AWAY_S)
        scene.control()

    return Injected(lambda: True, mend)


def requeue(scene: Scene) -> Injected:
    """The job is asked to end by SIGTERM or SIGUSR1, as by Slurm, saves, and is requeued."""
    noticed, number = scene.new_job(), scene.random.choice([signal.SIGTERM, signal.SIGUSR1])
    for driver in scene.job.drivers:
        driver.send_signal(number)
    return Injected(noticed)


FAULTS: Mapping[str, Callable[[Scene], Injected]] = {
    "kill -9 of a worker": kill_worker,
    "kill -9 of an agent": kill_agent,
    "kill -9 of a driver": kill_driver,
    "kill -9 of the leading driver": kill_leader,
    "hang (SIGSTOP)": hang,
    "slow rank": slow_rank,
    "NaN gradients": nan_gradients,
    "bit flip in a checkpoint": bit_flip,
    "truncated checkpoint": truncated,
    "full disk": full_disk,
    "lost heartbeat channel": lost_channel,
    "clock jump": clock_jump,
    "requeue": requeue,
}
UNDISTURBED = ("slow rank", "NaN gradients", "full disk", "lost heartbeat channel", "clock jump")
"""Faults after which no rank may have been started again."""


def draw(counts: Mapping[str, int], seed: int) -> list[str]:
    """The names of faults in random order, each as often as it is counted."""
    names = [name for name, count in counts.items() for _ in range(count)]
    random.Random(seed).shuffle(names)
    return names
