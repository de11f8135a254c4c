"""Files appear whole or not at all, and nothing that another user has planted is followed."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megascale.checkpoint import folder as folders
from megascale.cli import main
from megascale.corpus.prepare import prepare
from megascale.corpus.recipe import InputConfig, Recipe, TokenizerConfig
from megascale.errors import UserError
from megascale.launch import node_check
from megascale.launch.channel import read_token, write_token
from megascale.runtime import files, lock
from megascale.runtime.abandoned import remove_abandoned
from megascale.runtime.files import (
    broken_link,
    discard,
    make_fresh_folder,
    open_lock,
    private_folder,
    real_path,
    unfinished_file,
    unfinished_names,
    whole_file,
    write_file,
    write_output,
)


@pytest.fixture
def victim(tmp_path):
    """A folder with a file that nobody may touch."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "thesis").write_text("years of work")
    yield folder
    assert (folder / "thesis").read_text() == "years of work"
    assert [path.name for path in folder.iterdir()] == ["thesis"]


def another_user(monkeypatch):
    """From now on, what is there belongs to another user."""
    monkeypatch.setattr(files.os, "geteuid", lambda: os.getuid() + 1)


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "good").symlink_to(tmp_path)
    for name, said in [
        ("loop", "leads back to itself"),
        ("loop/x/y", f"{tmp_path / 'loop'} is a link"),
        ("lost/x", "a link to nowhere, which is not there"),
    ]:
        assert said in broken_link(tmp_path / name)
    assert [broken_link(tmp_path / name) for name in ("good", "good/x", "x", "good/good")] == [
        None
    ] * 4
    assert real_path(tmp_path / "loop").name == "loop"  # Path.resolve raises RuntimeError
    assert real_path(tmp_path / "good/x") == tmp_path.resolve() / "x"


@pytest.mark.parametrize(
    "words",
    [
        ("plot",), ("status",), ("report",), ("lineage",), ("checkpoint", "verify"),
        ("checkpoint", "list"), ("export", "loop", "out"), ("branch", "loop", "run.yaml"),
        ("plan", "run.yaml", "start.checkpoint=loop"),
    ],
)  # fmt: skip
def test_a_run_that_is_a_link_to_itself_is_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("run.yaml").write_text("data: {sources: {web: {path: x}}}\nmodel: {vocab_size: 8}\n")
    words = words if len(words) > 2 else (*words, "loop")
    assert main(list(words)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path, victim):
    for name in ("latest", ".tmp-latest"):  # the latter was the fixed name of earlier versions
        (tmp_path / name).symlink_to(victim / "thesis")
    write_file(tmp_path / "latest", "new", synced=True)
    assert (tmp_path / "latest").read_text() == "new" and not (tmp_path / "latest").is_symlink()
    folders.name_latest(tmp_path, 3)
    assert (tmp_path / "latest").read_text() == "00000003\n"


def test_an_unfinished_file_has_a_new_name_every_time_and_is_made_exclusively(
    tmp_path, victim, monkeypatch
):
    path = tmp_path / ("\u00fc" * 127)
    assert len({unfinished_file(path) for _ in range(100)}) == 100
    write_file(path, "fits")
    planted = tmp_path / ".tmp-planted"
    planted.symlink_to(victim / "thesis")
    monkeypatch.setattr(files, "unfinished_file", lambda path: planted)
    with pytest.raises(FileExistsError) as failed:
        write_file(tmp_path / "out", "new")
    assert failed.value.filename == str(tmp_path / "out")


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_output_goes_through_the_users_own_link_and_to_devices(tmp_path):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_output(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "new"
    script = (
        "from pathlib import Path; from megascale.runtime.files import write_output; "
        "write_output(Path('/dev/stdout'), 'said')"
    )
    words = [sys.executable, "-c", script + "; print()"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout == "said\n", done.stderr
    with open(tmp_path / "redirected", "ab") as file:
        subprocess.run(words, stdout=file, check=True)
    assert (tmp_path / "redirected").read_text() == "said\n"


def test_a_lock_is_no_link(tmp_path, victim):
    (tmp_path / ".lock").symlink_to(victim / "thesis")
    with pytest.raises(OSError, match="symbolic links"):
        open_lock(tmp_path / ".lock")
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("process 1 on elsewhere, which has ended long ago")
    with open_lock(tmp_path / ".lock") as file:
        assert lock.hold(file, 0.0) is None
        with open_lock(tmp_path / ".lock") as another:
            assert lock.hold(another, 0.0).startswith(f"process {os.getpid()} on ")


def test_discard_removes_links_and_not_what_they_lead_to(tmp_path, victim):
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link").symlink_to(victim)
    for name in ("link", "folder", "nothing"):
        discard(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_a_fresh_folder_takes_the_place_of_an_own_folder_only(tmp_path, victim, monkeypatch):
    path = tmp_path / "fresh"
    path.symlink_to(victim)
    with pytest.raises(PermissionError, match="a symbolic link where a folder must be"):
        make_fresh_folder(path)
    path.unlink()
    path.write_text("a file")
    with pytest.raises(NotADirectoryError):
        make_fresh_folder(path)
    path.unlink()
    path.mkdir()
    (path / "leftover").touch()
    make_fresh_folder(path)
    assert list(path.iterdir()) == []
    another_user(monkeypatch)
    with pytest.raises(PermissionError, match="it belongs to another user"):
        make_fresh_folder(path)


def test_private_folders(tmp_path, victim, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    before = os.umask(0)
    try:
        path = private_folder(shared / "mine/deep", "a", "b")
    finally:
        os.umask(before)
    assert path == shared / "mine/deep/a/b"
    made = [path, *path.parents[:3]]
    assert {one.stat().st_mode & 0o777 for one in made} == {0o700}
    path.chmod(0o777)
    assert private_folder(shared / "mine/deep", "a", "b").stat().st_mode & 0o777 == 0o700
    (path / "planted").symlink_to(victim)
    with pytest.raises(PermissionError, match="a symbolic link"):
        private_folder(shared / "mine/deep", "a", "b", "planted")
    another_user(monkeypatch)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private_folder(shared / "mine/deep", "a")


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_what_another_user_has_put_into_a_shared_folder_is_refused(tmp_path, victim):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "folder").mkdir()
    os.chown(shared / "folder", 4321, 4321)
    (shared / "link").symlink_to(victim)
    os.chown(shared / "link", 4321, 4321, follow_symlinks=False)
    for planted in ("folder", "link"):
        for base in (shared / planted, shared / planted / "below"):
            with pytest.raises(PermissionError, match="belongs to another user") as failed:
                private_folder(base, "a")
            assert failed.value.filename == str(shared / planted)
    (shared / "link").unlink()
    (shared / "link").symlink_to(tmp_path / "elsewhere")  # of root: trusted
    (tmp_path / "elsewhere").mkdir()
    assert private_folder(shared / "link", "a").is_dir()


def test_leftovers_are_known_by_their_whole_name(tmp_path, victim):
    gone = [".tmp-00000008", ".old-00000004", ".tmp-latest", f".tmp-left-behind-{'0' * 16}"]
    stay = [".tmp-mine", ".old-thesis", ".tmp-", ".tmp-1", "00000008", ".tmp-latest-notes"]
    for name in (*gone[1:], *stay):
        (tmp_path / name).mkdir()
    (tmp_path / gone[0]).symlink_to(victim)
    folders.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"victim", *stay}


def test_pruning_a_linked_checkpoint_removes_the_link(tmp_path, victim):
    (tmp_path / "00000004").symlink_to(victim)
    folders.remove_steps(tmp_path, [4])
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_a_folder_to_be_is_no_link(tmp_path, victim):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists"), folders.whole_or_not_at_all(tmp_path / "out"):
        pytest.fail("it was begun")


@pytest.mark.parametrize("number, name", [(errno.ENOSPC, "out"), (errno.EBADF, None)])
def test_a_full_disk_is_said_of_the_file(tmp_path, number, name):
    path = tmp_path / "out"
    with pytest.raises(OSError) as caught, whole_file(path):
        raise OSError(number, os.strerror(number))  # as `write` does, which knows no name
    assert caught.value.filename == (name and str(path))


def test_no_folder_of_the_user_goes_when_another_is_written(tmp_path, victim):
    """Only what an earlier try left, by a name that nobody else gives."""
    left, linked = tmp_path / f".tmp-out-{'0' * 16}", tmp_path / f".tmp-out-{'1' * 16}"
    stay = [tmp_path / name for name in (".tmp-out", ".tmp-out-notes", f".tmp-other-{'0' * 16}")]
    for path in (left, *stay):
        path.mkdir()
        (path / "file").touch()
    linked.symlink_to(victim)
    with folders.whole_or_not_at_all(tmp_path / "out") as mine:
        assert not left.exists()
        with folders.whole_or_not_at_all(tmp_path / "out2"):
            assert mine.is_dir()
        remove_abandoned(tmp_path, unfinished_names(tmp_path / "out"))
        assert mine.is_dir()  # it is held
    assert all((path / "file").exists() for path in stay) and list(victim.iterdir())
    assert not list((tmp_path / "out").iterdir()) and not mine.exists()


def test_what_cannot_be_read_is_named_and_not_what_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"):
        with folders.whole_or_not_at_all(tmp_path / "out"):
            (tmp_path / "source").read_bytes()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^{tmp_path / 'file'}[^;]*; choose another folder"):
        with folders.whole_or_not_at_all(tmp_path / "file" / "out"):
            pytest.fail("it was begun")


def recipe(tmp_path):
    (tmp_path / "in.txt").write_text("some text to be prepared\n" * 20)
    texts = InputConfig(kind="files", paths=(str(tmp_path / "in.txt"),))
    return Recipe(name="x", inputs=(texts,), tokenizer=TokenizerConfig(kind="bytes"))


@pytest.mark.parametrize("name", ["out.partial", "out.lock"])
def test_prepare_follows_no_planted_link(tmp_path, victim, name):
    wanted = recipe(tmp_path)
    (tmp_path / name).symlink_to(victim / ("thesis" if name == "out.lock" else ""))
    with pytest.raises(UserError, match="symbolic link"):
        prepare(wanted, tmp_path / "out", processes=1)


def test_prepare_removes_no_folder_but_the_corpus(tmp_path):
    """`out.old` was deleted by earlier versions; it may be the user's own copy."""
    wanted = recipe(tmp_path)
    prepare(wanted, tmp_path / "out", processes=1)
    shutil.copytree(tmp_path / "out", tmp_path / "out.old")
    (tmp_path / "in.txt").write_text("another text to be prepared\n" * 20)
    prepare(wanted, tmp_path / "out", processes=1, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out", "out.old"]
    assert (tmp_path / "out.old/train.bin").read_bytes() != (
        tmp_path / "out/train.bin"
    ).read_bytes()


def test_the_check_of_a_node_overwrites_nothing(tmp_path, victim):
    (tmp_path / ".check-a").symlink_to(victim / "thesis")
    assert node_check.check_node(str(tmp_path), None, lambda: None, "a") is None
    assert {path.name for path in tmp_path.iterdir()} == {".check-a", "victim"}


def test_a_token_of_another_user_is_none(tmp_path, victim, monkeypatch):
    path = tmp_path / ".token-1"
    write_token(path, "secret")
    assert read_token(path) == "secret" and path.stat().st_mode & 0o777 == 0o600
    another_user(monkeypatch)
    with pytest.raises(PermissionError, match="it belongs to another user"):
        read_token(path)
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        read_token(tmp_path / "link")
