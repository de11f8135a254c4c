"""The family of a run: found from any member, upwards and downwards."""

import json
import shutil

import pytest

from megascale.checkpoint.folder import copies_name
from megascale.checkpoint.manifest import Manifest, Position
from megascale.cli import main

MARK = "  <-- this one"


def parents_of(*checkpoints):
    return [{"checkpoint": str(one), "step": 4, "tokens_seen": 4096} for one in checkpoints]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes members of a family below the folder in which the command runs."""
    monkeypatch.chdir(tmp_path)

    def member(name, *parents, made_by=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        origin = {"made_by": made_by or "start.checkpoint", "parents": parents_of(*parents)}
        if made_by:  # a checkpoint that no run wrote
            document = {"position": {"cursor": {"origin": origin} if parents else {}}}
            (folder / "manifest.json").write_text(json.dumps(document))
            return folder
        (folder / "config.yaml").write_text("seed: 1")
        if parents:
            (folder / "lineage.json").write_text(json.dumps(origin))
        return folder

    return member


@pytest.fixture
def lineage(capsys):
    def lines(member, *words):
        assert main(["lineage", str(member), *words]) == 0
        said = capsys.readouterr()
        assert not said.err
        return said.out.splitlines()

    return lines


def plain(lines):
    """(depth, path) of each line."""
    depths = [(len(line) - len(line.lstrip())) // 2 for line in lines]
    paths = [line.strip().split(MARK)[0].split(",")[0].split(";")[0] for line in lines]
    return list(zip(depths, paths, strict=True))


def latest(run):
    return run / "checkpoints/00000004"


def test_all_see_the_same_family(make, lineage):
    """An import, grown, branched; other branches of both; each in a folder of its own kind."""
    base = make("imports/qwen3", made_by="megascale import")
    grown = make("grown/qwen3-4x", base, made_by="megascale grow")
    run = make("runs/more", grown)
    other = make("runs/other", base)
    child, sibling = make("runs/more-a", latest(run)), make("runs/more-b", latest(run))
    make("runs/stranger")
    members = [(0, base), (1, grown), (2, run), (3, child), (3, sibling), (1, other)]
    expected = [(depth, str(path)) for depth, path in members]
    for _, member in members:
        lines = lineage(member)
        assert plain(lines) == expected
        assert [line.endswith(MARK) for line in lines] == [one == member for _, one in members]


def test_a_checkpoint_of_a_run_stands_for_the_run(make, lineage):
    base = make("runs/base")
    run = make("runs/run", latest(base))
    latest(run).mkdir(parents=True)
    (latest(run) / "manifest.json").write_text(json.dumps({"position": {"cursor": {}}}))
    lines = lineage(latest(run))
    assert lines == lineage(run) and lines[1].endswith(MARK)
    assert lines[1] == f"  {run}, from step 4 (4,096 tokens), by start.checkpoint{MARK}"


def test_all_parents_are_shown(make, lineage):
    base = make("runs/base")
    a, b, c = (make(f"runs/{name}", latest(base)) for name in "abc")
    words = "megascale grow --operator upcycle"
    mixed = make("grown/mixed", latest(a), latest(b), latest(c), made_by=words)
    run = make("runs/mixed", mixed)
    expected = [(0, base), (1, a), (2, mixed), (3, run), (1, b), (2, mixed), (1, c), (2, mixed)]
    for member in (base, a, b, c, mixed, run):
        lines = lineage(member)
        assert plain(lines) == [(depth, str(path)) for depth, path in expected]
        assert f", with {b}, {c}, by {words}" in lines[2] and f", with {a}, {b}" in lines[-1]
        assert lines[-1].removesuffix(MARK).endswith("; what comes from it is shown above")


def test_two_checkpoints_of_one_run_are_one_parent(make, lineage):
    base = make("runs/base")
    mixed = make("mixed", latest(base), base / "checkpoints/00000008", made_by="megascale grow")
    assert lineage(mixed)[1].startswith(
        f"  {mixed}, from step 4 (4,096 tokens) and step 4 (4,096 tokens), by megascale grow"
    )


def test_what_is_gone_or_damaged_takes_a_line(make, lineage, tmp_path):
    base = make("runs/base")
    run, other = make("runs/run", latest(base)), make("runs/other", latest(base))
    shutil.rmtree(base)
    (other / "lineage.json").write_text("{")
    lines = lineage(run)
    assert lines[0] == f"{base}; no longer there" and len(lines) == 2
    assert lineage(other) == [f"{other}; its lineage.json cannot be read{MARK}"]
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    run.rename(moved)
    assert plain(lineage(moved)) == [(0, str(base)), (1, str(moved))]


def test_a_circle_ends(make, lineage, tmp_path):
    """A run that was made anew, from its own child, in its old folder."""
    first = make("runs/first", latest(tmp_path / "runs/second"))
    second = make("runs/second", latest(first))
    for member, other in ((first, second), (second, first)):
        found = plain(lineage(member))
        assert found == [(0, str(member)), (1, str(other)), (2, str(member))]
    alone = make("runs/alone", latest(tmp_path / "runs/alone"))
    assert plain(lineage(alone)) == [(0, str(alone)), (1, str(alone))]


@pytest.mark.parametrize("is_there", [True, False])
def test_an_emergency_copy_is_its_run(make, lineage, tmp_path, is_there):
    """Of which a run was made; it is forgotten when its run ends."""
    grandparent = make("imports/first", made_by="megascale import")
    base = make("runs/base", grandparent)
    copy = tmp_path / "disk/node" / copies_name(base) / ("0a" * 16) / "checkpoints/00000004"
    run = make("runs/run", copy)
    if is_there:
        copy.mkdir(parents=True)
        config = "run_dir: runs/base\nmodel: {vocab_size: 257}\n"
        position = Position(4, 4096, 1, config, {"cwd": str(tmp_path)})
        Manifest(position, 4, {}, {}, {}).write(copy)
        assert plain(lineage(copy)) == plain(lineage(run))
    expected = [(0, str(grandparent)), (1, str(base)), (2, str(run))]
    for member in (grandparent, base, run):
        assert plain(lineage(member)) == expected


def test_relatives_elsewhere_are_found_where_they_are_looked_for(make, lineage, tmp_path):
    base = make("a/b/base")
    run = make("c/d/run", latest(base))
    assert plain(lineage(base)) == [(0, str(base))]
    lines = lineage(base, "--among", str(run.parent))
    assert plain(lines) == [(0, str(base)), (1, str(run))] == plain(lineage(run))
