"""Emergency copies on the nodes' own disks: what is lost or damaged, and how a run goes on.

Every rank is a node of its own.
"""

import os
import shutil

import pytest
from crash_drill import compare, curve
from test_train import command
from tiny_corpus import rows, tiny_config

LAST, SAVED, COPIED = 16, 6, (8, 10)
"""Steps of a run, its checkpoint, and its copies when it is interrupted."""
WORDS = (
    "train.tokens=16384",
    "eval.every_steps=0",
    "checkpoint={save_every_steps: 6, async_save: no}",
    "checkpoint.emergency_dir=DISK",
    "checkpoint.emergency_every_steps=2",
)


def on_nodes(after, *words):
    """`command` with each rank as a node, all of which fail in this step; 0: none does."""
    from megascale.training import loop

    honest, calls = loop.train_step, []
    node = "abb"[int(os.environ["RANK"])]

    def step(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise MemoryError("the node is gone")
        return honest(*args, **kwargs)

    loop.train_step = step
    os.environ["SLURMD_NODENAME"] = node
    try:
        return command(*words)
    except MemoryError:
        return None
    finally:
        loop.train_step = honest
        del os.environ["SLURMD_NODENAME"]


class Interrupted:
    """A run of two nodes that failed after step 11; put back as it was for each test."""

    def __init__(self, ranks, folder):
        self.ranks, self.folder = ranks, folder
        self.run, self.disk = folder / "now/run", folder / "now/disk"
        words = [word.replace("DISK", str(self.disk)) for word in WORDS]
        self.words = ("train", tiny_config(folder / "corpus"), f"run_dir={self.run}", *words)
        assert self.start(2, 12) == [None, None]
        shutil.copytree(folder / "now", folder / "then", symlinks=True)
        calm = [f"run_dir={folder / 'calm'}", "checkpoint.emergency_dir=null"]
        assert ranks(2, on_nodes, 0, *self.words, *calm)[0][0] == 0
        self.calm = curve(folder / "calm")

    def start(self, world, after=0, *more):
        return self.ranks(world, on_nodes, after, *self.words, *more)

    def put_back(self):
        shutil.rmtree(self.folder / "now")
        shutil.copytree(self.folder / "then", self.folder / "now", symlinks=True)
        return self

    def copies(self, node):
        (folder,) = self.disk.glob(f"{node}/*/*/checkpoints")
        return folder

    def resume(self, world=2, *more):
        """(the step it went on from, what was said)."""
        status, said = self.start(world, 0, *more, "--resume", "auto")[0]
        assert status == 0, said
        starts = [one for one in rows(self.run / "events.jsonl") if one["event"] == "start"]
        return starts[-1]["step"], said

    def is_equal(self):
        return compare(self.calm, curve(self.run)).bit_equal


@pytest.fixture(scope="module")
def interrupted_once(rank_pools, tmp_path_factory):
    return Interrupted(rank_pools.run, tmp_path_factory.mktemp("run"))


@pytest.fixture
def interrupted(interrupted_once):
    return interrupted_once.put_back()


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_run_goes_on_from_its_newest_copy(interrupted):
    for node in "ab":
        steps = sorted(path.name for path in interrupted.copies(node).glob("0*"))
        assert steps == [f"{step:08d}" for step in COPIED]
        held = {path.name for path in (interrupted.copies(node) / steps[-1]).iterdir()}
        assert held >= {"__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"}
    step, said = interrupted.resume()
    assert step == COPIED[1] and "goes on from the emergency copy of step 10" in said
    assert interrupted.is_equal()
    saves = [one for one in rows(interrupted.run / "events.jsonl") if one["event"] == "save"]
    assert all(one["error"] is None for one in saves)
    assert {one["step"] for one in saves if one["emergency"]} >= {2, 4, 8, 10, 14}
    assert not list(interrupted.disk.glob("*/*/*/checkpoints/0*"))  # the run is done


def test_a_lost_node_is_not_lost(interrupted):
    shutil.rmtree(interrupted.disk / "b")
    assert interrupted.resume()[0] == COPIED[1] and interrupted.is_equal()


def test_what_a_node_lacks_or_has_damaged_comes_from_its_neighbour(interrupted):
    (interrupted.copies("a") / "00000010/__0_0.distcp").unlink()
    damage(interrupted.copies("b") / "00000010/__1_0.distcp")
    step, said = interrupted.resume()
    assert step == COPIED[1] and interrupted.is_equal()
    assert "emergency copy of step 10 on node b: __1_0.distcp: its checksum differs" in said


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_copy_that_is_good_nowhere_is_passed_over(interrupted, damaged):
    for step in COPIED[-damaged:]:
        for node in "ab":
            damage(interrupted.copies(node) / f"{step:08d}/__0_0.distcp")
    step, said = interrupted.resume()
    assert step == (COPIED[0] if damaged == 1 else SAVED) and interrupted.is_equal()
    assert "emergency copy of step 10: __0_0.distcp is good on no node" in said


def test_one_node_alone_has_all_of_it(interrupted):
    assert interrupted.resume(world=1)[0] == COPIED[1]
    assert compare(interrupted.calm, curve(interrupted.run)).worst_relative < 1e-4


def test_whoever_goes_back_means_it(interrupted):
    words = ("--resume", "6", "train.stop_after_steps=7")
    assert interrupted.start(2, 0, *words)[0][0] == 0
    assert not list(interrupted.disk.glob("*/*/*/checkpoints/0*"))


def test_a_node_that_was_away_does_not_bring_the_future_back(interrupted):
    away = interrupted.disk.with_name("away")
    (interrupted.disk / "b").rename(away)
    words = ("--resume", "6", "train.stop_after_steps=7")
    assert interrupted.start(1, 0, *words)[0][0] == 0
    away.rename(interrupted.disk / "b")
    assert interrupted.resume()[0] == 7


def test_a_disk_that_takes_nothing_is_said_at_once(ranks, interrupted):
    (status, said), _ = interrupted.start(
        2, 0, "checkpoint.emergency_dir=/dev/null/x", "--resume", "auto"
    )
    line = "checkpoint.emergency_dir: node a: Not a directory"
    assert status == 2 and line in said and said.count("\n") == 1


def test_nodes_of_unequal_size_are_refused(interrupted):
    (status, said), *_ = interrupted.start(3, 0, "--resume", "auto")
    assert status == 2 and "needs equally many ranks on every node" in said


def test_another_run_of_the_same_name_begins_anew(interrupted):
    shutil.rmtree(interrupted.run)
    assert interrupted.resume()[0] == 0
    assert len(list(interrupted.disk.glob("a/*/*"))) == 1


@pytest.mark.parametrize("level", ["node", "run", "id", "checkpoints"])
def test_a_link_that_another_user_planted_is_refused(interrupted, tmp_path, level):
    """Deleting copies of an earlier run must not delete what a link leads to."""
    victim = tmp_path / "victim"
    (victim / ("0" * 32)).mkdir(parents=True)
    (victim / ("0" * 32) / "thesis").write_text("years of work")
    checkpoints = interrupted.copies("a")
    levels = dict(zip(("checkpoints", "id", "run", "node"), (checkpoints, *checkpoints.parents)))
    planted = levels[level]
    shutil.rmtree(planted)
    planted.symlink_to(victim)
    (status, said), _ = interrupted.start(2, 0, "--resume", "auto")
    line = f"checkpoint.emergency_dir: node a: a symbolic link where a folder must be: {planted}; "
    assert status == 2 and line in said and said.count("\n") == 1
    assert (victim / ("0" * 32) / "thesis").read_text() == "years of work"


def test_folders_are_private_and_only_copies_are_deleted(interrupted):
    home = interrupted.copies("a").parents[1]
    (home / "notes").mkdir()
    (home / ("f" * 32)).mkdir()
    (home / ("e" * 32)).symlink_to(interrupted.run)
    home.chmod(0o755)  # as earlier versions made it
    assert interrupted.resume()[0] == COPIED[1]
    assert {path.name for path in home.iterdir()} >= {"notes"}
    assert not (home / ("f" * 32)).exists() and not (home / ("e" * 32)).is_symlink()
    assert (interrupted.run / "metrics.jsonl").exists()
    folders = [interrupted.copies("a"), *interrupted.copies("a").parents[:3]]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
