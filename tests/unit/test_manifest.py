"""Manifests: round trip, any bytes, damaged files; which checkpoints are tried and which may go."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.checkpoint import folder as folders
from megascale.checkpoint.load import find, find_before
from megascale.checkpoint.manifest import (
    MANIFEST,
    FileSum,
    Manifest,
    Position,
    current_versions,
    sum_file,
    verify,
)
from megascale.checkpoint.ranges import boxes_of_range
from megascale.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def manifest(step: int = 7, files: dict[str, FileSum] | None = None) -> Manifest:
    position = Position(step, 123, 1, "seed: 1\n", {"epoch": 2, "sources": {"a": [1, 2]}})
    return Manifest(position, 6, {"world": 2}, current_versions(), files or {})


def checkpoint(run: Path, step: int, content: bytes = b"tensors") -> Path:
    """A checkpoint of one data file, published as the real ones are."""
    checkpoints = folders.checkpoints_dir(run)
    unfinished = checkpoints / f"{folders.UNFINISHED}{folders.name_of(step)}"
    unfinished.mkdir(parents=True)
    (unfinished / "__0_0.distcp").write_bytes(content)
    manifest(step, {"__0_0.distcp": sum_file(unfinished / "__0_0.distcp")}).write(unfinished)
    folders.publish(checkpoints, step)
    return checkpoints / folders.name_of(step)


def test_round_trip(tmp_path: Path) -> None:
    written = manifest(files={"a.distcp": FileSum(3, "00ff")})
    written.write(tmp_path)
    assert Manifest.read(tmp_path) == written


@given(st.binary(max_size=200))
def test_any_bytes_give_a_manifest_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    _read_any(tmp_path_factory.getbasetemp(), content)


@given(JSON, st.sampled_from(["", "format", "position", "layout", "versions", "files", "step"]))
def test_any_json_in_any_place_gives_a_manifest_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, value: object, place: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    manifest(files={"a.distcp": FileSum(3, "00ff")}).write(folder)
    document = json.loads((folder / MANIFEST).read_bytes())
    if place == "":
        document = value
    elif place == "step":
        document["position"]["step"] = value
    else:
        document[place] = value
    _read_any(folder, json.dumps(document).encode())


def _read_any(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    try:
        assert isinstance(Manifest.read(folder), Manifest)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable()


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "No such file"),
        (b"", "not JSON"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b"[]", "no JSON object"),
        (b'{"format": 2}', "format '2'"),
        (b'{"format": true}', "format 'True'"),
        (b'{"format": 1}', "'position' must be a mapping"),
    ],
)
def test_bad_manifest_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=says):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "", "manifest.json", "a\nb"])
def test_file_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    manifest(files={"a": FileSum(1, "0")}).write(tmp_path)
    document = json.loads((tmp_path / MANIFEST).read_bytes())
    document["files"] = {name: {"bytes": 1, "xxh3": "0"}}
    (tmp_path / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(UserError, match="plain file names"):
        Manifest.read(tmp_path)


def test_verify_names_each_fault(tmp_path: Path) -> None:
    names = ["changed", "cut", "good", "missing"]
    for name in names:
        (tmp_path / name).write_bytes(b"0123456789")
    whole = manifest(files={name: sum_file(tmp_path / name) for name in names})
    assert verify(tmp_path, whole) == []
    (tmp_path / "changed").write_bytes(b"0123456780")
    (tmp_path / "cut").write_bytes(b"012")
    (tmp_path / "missing").unlink()
    faults = [str(fault) for fault in verify(tmp_path, whole)]
    assert faults == [
        "changed: its checksum differs from the manifest",
        "cut: 3 bytes where the manifest says 10",
        "missing: missing",
    ]
    assert verify(tmp_path, whole, ["good"]) == []


def test_find_takes_the_one_before_a_damaged_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    newest = folders.checkpoints_dir(tmp_path) / folders.name_of(3)
    found = find(tmp_path, "latest")
    assert found is not None and found.folder == newest and found.warnings == ()
    (newest / "__0_0.distcp").write_bytes(b"tensorz")
    found = find(tmp_path, "auto")
    assert found is not None and found.manifest.position.step == 2
    (warning,) = found.warnings
    assert "00000003" in warning and "__0_0.distcp: its checksum differs" in warning
    with pytest.raises(UserError, match="00000003 is damaged.*other checkpoints: 1, 2"):
        find(tmp_path, 3)


def test_half_written_folders_are_passed_over(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 1)
    (good.parent / f"{folders.UNFINISHED}00000002").mkdir()
    torn = good.parent / "00000003"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    (good.parent / folders.LATEST).write_text("00000003\n")
    found = find(tmp_path, "auto")
    assert found is not None and found.folder == good
    assert len(found.warnings) == 1 and "not complete" in found.warnings[0]
    folders.remove_leftovers(good.parent)
    assert sorted(entry.name for entry in good.parent.iterdir()) == [
        "00000001",
        "00000003",
        "latest",
    ]


def test_nothing_good_is_an_error_and_nothing_at_all_is_none(tmp_path: Path) -> None:
    assert find(tmp_path, "auto") is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        find(tmp_path, "latest")
    with pytest.raises(UserError, match="no checkpoint of step 9; there are: none"):
        find(tmp_path, 9)
    for step in (1, 2):
        (checkpoint(tmp_path, step) / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match="no checkpoint in .* is good.*missing"):
        find(tmp_path, "auto")


@pytest.mark.parametrize("content", ["", "\n", "nonsense", "00000009", "9" * 40, "-1", "\u0662"])
def test_latest_that_names_nothing_good(tmp_path: Path, content: str) -> None:
    good = checkpoint(tmp_path, 4)
    (good.parent / folders.LATEST).write_text(content, encoding="utf-8")
    found = find(tmp_path, "latest")
    assert found is not None and found.folder == good


class Crash(BaseException):
    """The machine stops here."""


@pytest.mark.parametrize("moment", range(12))
@pytest.mark.parametrize("again", [False, True])
def test_a_crash_while_publishing_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, again: bool
) -> None:
    """Stopped before any one step of `publish`; `again` saves a step that exists already."""
    checkpoint(tmp_path, 1)
    if again:
        checkpoint(tmp_path, 2, b"earlier")
    left = [moment]

    def counted(function):  # type: ignore[no-untyped-def]
        def run(*args, **kwargs):  # type: ignore[no-untyped-def]
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return function(*args, **kwargs)

        return run

    with monkeypatch.context() as patched:
        for name in ("rename", "replace"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        for name in ("sync_folder", "write_file"):
            patched.setattr(folders, name, counted(getattr(folders, name)))
        try:
            checkpoint(tmp_path, 2)
        except Crash:
            pass
    found = find(tmp_path, "auto")
    assert found is not None and found.manifest.position.step in (1, 2)
    folders.remove_leftovers(folders.checkpoints_dir(tmp_path))
    checkpoint(tmp_path, 2)
    found = find(tmp_path, "latest")
    assert found is not None and found.manifest.position.step == 2 and found.warnings == ()


def test_order_of_preference() -> None:
    assert folders.by_preference([1, 2, 3, 4], 3) == [3, 2, 1, 4]
    assert folders.by_preference([1, 2], None) == [2, 1]
    assert folders.by_preference([1, 2], 9) == [2, 1]
    assert folders.by_preference([1, 2, 3, 4], 4, {2, 3}) == [4, 1, 3, 2]


def test_a_future_that_was_left_stays_behind(tmp_path: Path) -> None:
    checkpoints = folders.checkpoints_dir(tmp_path)
    for step in (100, 200, 237):
        checkpoint(tmp_path, step)
    folders.go_on_from(checkpoints, 200)
    checkpoint(tmp_path, 300)
    assert find_before(tmp_path, 289).manifest.position.step == 200
    assert folders.own_steps(checkpoints) == [100, 200, 300]
    damage = checkpoints / folders.name_of(300) / "__0_0.distcp"
    damage.write_bytes(b"")
    found = find(tmp_path, "auto")
    assert found is not None and found.manifest.position.step == 200
    found = find(tmp_path, 237)
    assert found is not None
    folders.go_on_from(checkpoints, 237)  # back to it after all
    assert folders.own_steps(checkpoints) == [100, 200, 237]
    checkpoint(tmp_path, 300)
    assert folders.own_steps(checkpoints) == [100, 200, 237, 300]


def test_what_may_go() -> None:
    steps = [10, 20, 30, 40, 50]
    assert folders.prunable(steps, 50, keep_last=2, keep_every_steps=0) == [10, 20, 30]
    assert folders.prunable(steps, 50, keep_last=1, keep_every_steps=20) == [10, 30]
    assert folders.prunable(steps, 30, keep_last=1, keep_every_steps=0) == [10, 20]
    assert folders.prunable(steps, 50, keep_last=9, keep_every_steps=0) == []


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_of_a_range_are_the_range(shape: list[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = np.arange(size).reshape(shape)
    boxes = boxes_of_range(tuple(shape), start, stop)
    pieces = [
        whole[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))].ravel()
        for offset, extent in boxes
    ]
    assert np.concatenate([np.empty(0, int), *pieces]).tolist() == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
