"""`megascale checkpoint list`, `verify` and `prune`."""

from pathlib import Path

import pytest
from test_manifest import checkpoint

from megascale.checkpoint import folder as folders
from megascale.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 25, 30):
        checkpoint(tmp_path, step)
    folders.name_latest(folders.checkpoints_dir(tmp_path), 30)
    return tmp_path


def damage(run: Path, step: int, content: bytes = b"tensorz") -> None:
    path = folders.checkpoints_dir(run) / folders.name_of(step) / "__0_0.distcp"
    path.write_bytes(content)


def test_list_shows_what_is_there(run, capsys):
    damage(run, 20, b"cut")
    (folders.checkpoints_dir(run) / folders.name_of(25) / "manifest.json").write_text("{")
    assert main(["checkpoint", "list", str(run)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["step", "tokens"]
    assert [line.split()[0] for line in lines] == ["10", "20", "25", "30"]
    assert "DAMAGED: 1 of 1 files" in lines[1] and "damaged: " in lines[2]
    assert lines[3].endswith("latest") and "latest" not in "".join(lines[:3])


def test_verify_reads_all_or_one(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": good") == 4
    damage(run, 20)
    assert main(["checkpoint", "verify", str(run)]) == 2
    said = capsys.readouterr().out
    assert said.count(": good") == 3 and "00000020: __0_0.distcp: its checksum differs" in said
    assert main(["checkpoint", "verify", str(run), "--step", "30"]) == 0
    folder = folders.checkpoints_dir(run) / folders.name_of(20)
    assert main(["checkpoint", "verify", str(folder)]) == 2
    assert main(["checkpoint", "verify", str(run), "--step", "31"]) == 2
    assert "holds no checkpoint of step 31; 10, 20, 25, 30 are" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(run / "none")]) == 2


def test_verify_names_the_checkpoint_that_it_was_given(run, capsys):
    folder = folders.checkpoints_dir(run) / folders.name_of(20)
    assert main(["checkpoint", "verify", str(folder), "--step", "10"]) == 2
    assert f"{folder} is one checkpoint, and --step is for a run" in capsys.readouterr().err
    (folder / "manifest.json").unlink()
    assert main(["checkpoint", "verify", str(folder)]) == 2
    assert f"{folder}: {folder}/manifest.json: No such file" in capsys.readouterr().out


def test_prune_keeps_what_it_is_told_to(run, capsys):
    words = ["checkpoint", "prune", str(run), "--keep-last", "1", "--keep-every", "20"]
    assert main([*words, "--dry-run"]) == 0
    assert "would delete steps 10, 25 (0.0 MB); steps 20, 30 stay" in capsys.readouterr().out
    steps = folders.steps_in(folders.checkpoints_dir(run))
    assert steps == [10, 20, 25, 30]
    assert main(words) == 0
    assert folders.steps_in(folders.checkpoints_dir(run)) == [20, 30]
    assert main(words) == 0
    assert "nothing to delete: steps 20, 30 stay" in capsys.readouterr().out
    assert main([*words[:4], "0"]) == 2


def test_prune_counts_from_what_latest_names(run, capsys):
    folders.name_latest(folders.checkpoints_dir(run), 20)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    assert "deleted step 10 " in capsys.readouterr().out
    assert folders.steps_in(folders.checkpoints_dir(run)) == [20, 25, 30]


def test_what_was_left_behind_is_shown_and_stays(run, capsys):
    folders.go_on_from(folders.checkpoints_dir(run), 20)
    checkpoint(run, 40)
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert ["left behind" in line for line in lines] == [False, False, True, True, False]
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 0
    assert folders.steps_in(folders.checkpoints_dir(run)) == [25, 30, 40]


def test_prune_leaves_all_where_the_newest_is_damaged(run, capsys):
    damage(run, 30)
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 2
    assert "of step 30, is damaged (__0_0.distcp: its checksum" in capsys.readouterr().err
    assert len(folders.steps_in(folders.checkpoints_dir(run))) == 4
