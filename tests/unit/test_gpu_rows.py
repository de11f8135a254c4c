"""Rows of the acceptance on GPUs: targets, files, and the picture."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import bench_gpu
import gpu_missing
import gpu_rows
import pytest
from pictures import drawn_figures, require_readable, texts_of


@pytest.mark.parametrize(
    "found, least, most, passed",
    [
        (50.0, 50, None, True),
        (49.9, 50, None, False),
        (0, None, 0, True),
        (1, None, 0, False),
        (0.96, 0.9, 1.1, True),
        (1.2, 0.9, 1.1, False),
        (float("nan"), 1, None, False),
        (3.0, None, None, None),
        (None, 1, None, None),
        ("ValueError: no", None, None, False),
    ],
)
def test_a_row_passes_within_its_bounds(found, least, most, passed):
    assert gpu_rows.judge(found, least, most) is passed


def test_rows_are_written_one_by_one_and_replace_those_of_their_part(tmp_path, capsys):
    path = tmp_path / "rows.json"

    def written():
        return [(row["what"], row["passed"]) for row in json.loads(path.read_text())["rows"]]

    first = gpu_rows.Rows(path, "first")
    first.add("a", 1, "ms", 2)
    assert written() == [("a", False)]
    with first.measuring("b"):
        raise ValueError("of\ntwo lines")
    assert written() == [("a", False), ("b", False)]
    gpu_rows.Rows(path, "second", small=True).add("c", 1, "ms", 2, on_device=True)
    assert written()[2:] == [("c", None)]
    gpu_rows.Rows(path, "first", keep=True).ended(124)
    assert [name for name, _ in written()] == ["a", "b", "c", "part first runs to its end"]
    gpu_rows.Rows(path, "first").add("d", 3, "ms", 2)
    assert written() == [("c", None), ("d", True)]
    printed = capsys.readouterr().out
    assert "FAIL  a " in printed and "target >= 2 ms" in printed
    assert "found ValueError: of two lines" in printed and "found out of time" in printed


def test_only_wheels_of_missing_packages_are_installed(tmp_path):
    assert version("numpy")
    for name in ("numpy-1.0-py3-none-any.whl", "no_such_package_here-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    (wheel,) = gpu_missing.missing(tmp_path)
    assert wheel.name.startswith("no_such")


@pytest.mark.parametrize(
    "found, least, most, ratio",
    [(60, 50, None, 1.2), (0.5, None, 1.0, 2.0), (0, None, 0, None), (1, 0.9, 1.1, None)]
    + [("OSError: no", 1, None, None), (None, 1, None, None)],
)
def test_a_bar_says_how_many_times_its_target_a_row_is(found, least, most, ratio):
    row = gpu_rows.Row("part", "what", found, "", least, most)
    assert bench_gpu.of_target(row) == ratio


def test_the_picture_has_every_row(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    rows = gpu_rows.Rows(path, "mfu")
    rows.add("1B: MFU", 52.5, "%", 50)
    rows.add("tests", "OSError: no device")
    with drawn_figures() as figures:
        bench_gpu.bench_gpu([str(path)])
    require_readable(figures[0])
    drawn = [text for text, _ in texts_of(figures[0])]
    assert (tmp_path / "gpu.png").stat().st_size > 1000
    assert {"1B: MFU", "tests"} <= set(drawn)
    assert any(text.startswith("52.5 %  (target >= 50 %)") for text in drawn)


@pytest.mark.parametrize("script", ["gpu.sh", "gpus.sh"])
@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--help"], 0, "--part    this part alone"),
        (["-h"], 0, "Usage: bash tools/"),
        (["--bogus"], 2, "unknown option --bogus; --help lists the options"),
        (["--part"], 2, "--part needs a value; --help lists the options"),
    ],
)
def test_options_of_the_scripts(script, options, status, words):
    path = Path(__file__).parents[2] / "tools" / script
    ended = subprocess.run(["bash", path, *options], capture_output=True, text=True)
    assert ended.returncode == status
    assert words in (ended.stderr if status else ended.stdout)
    assert not status or ended.stderr.count("\n") == 1
