"""`megascale plot`: the arrays behind the pictures are right, and the pictures come out."""

import argparse
import json
from pathlib import Path

import numpy as np
import pictures
import pytest
from PIL import Image

from megascale.commands.plot import add_plot_arguments, run_plot
from megascale.errors import UserError
from megascale.monitor.plot_style import EARLIER, colour
from megascale.monitor.plots import _round_log_ticks, plot_run
from megascale.monitor.run_curves import DrawnRun, go_on_from, load_curves, smooth
from megascale.run.ancestry import earlier_parts
from megascale.simulate.step_time_plot import plot_rows

PICTURES = ["loss", "bits_per_byte", "learning_rate", "speed", "grad_norm"]


def make_run(folder: Path, steps: int, bits: float | None = 3.0, tail: str = "") -> Path:
    """A run of 1000 tokens a step; step 2 is skipped, and every 5th step is scored."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        seen = {"step": step, "tokens_seen": 1000 * step}
        bad = step == 2
        rows.append(
            {**seen, "loss": None if bad else 5.0 / step, "lr": 1e-3, "skipped": bad,
             "grad_norm": None if bad else 1.0, "tokens_per_s": 500.0}
        )  # fmt: skip
        if step % 5 == 0:
            rows.append({**seen, "eval": {"web": {"loss": 4.0, "bits_per_byte": bits}}})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


def plot(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_plot_arguments(parser)
    return run_plot(parser.parse_args(words))


def test_curves_hold_what_the_run_recorded(tmp_path: Path) -> None:
    run = load_curves(make_run(tmp_path / "a", 10, tail='{"step": 11, "tok'), "a")
    np.testing.assert_array_equal(run.step, np.arange(1, 11))
    np.testing.assert_array_equal(run.tokens, 1000 * np.arange(1, 11))
    np.testing.assert_allclose(run.columns["loss"][[0, 1, 3]], [5.0, np.nan, 1.25])
    np.testing.assert_array_equal(np.flatnonzero(run.columns["skipped"]), [1])
    np.testing.assert_array_equal(run.heldout["web"]["tokens"], [5000, 10000])
    np.testing.assert_array_equal(run.heldout["web"]["bits_per_byte"], [3.0, 3.0])


def branch_of(parent: Path, run: Path, step: int) -> None:
    """Let `run` go on from a checkpoint of `parent`."""
    checkpoint = {"checkpoint": str(parent / "checkpoints" / f"{step:08d}"), "step": step}
    parents = [{**checkpoint, "tokens_seen": 1000 * step}]
    origin = {"made_by": "start.checkpoint", "parents": parents}
    (run / "lineage.json").write_text(json.dumps(origin))


def drawn_runs(*runs: Path) -> list[DrawnRun]:
    return [go_on_from(earlier_parts(run), load_curves(run, run.name)) for run in runs]


def test_a_branch_goes_on_from_its_parent(tmp_path: Path) -> None:
    base, branch = make_run(tmp_path / "base", 30), make_run(tmp_path / "branch", 12)
    branch_of(base, branch, 20)
    (run,) = drawn_runs(branch)
    np.testing.assert_array_equal(run.own.tokens, 20_000 + 1000 * np.arange(1, 13))
    np.testing.assert_array_equal(run.own.step, 20 + np.arange(1, 13))
    np.testing.assert_array_equal(run.own.heldout["web"]["tokens"], [25_000, 30_000])
    (parent,) = run.earlier.values()
    # of the parent's 20 steps no more than the branch's 12,000 tokens, and none after step 20
    np.testing.assert_array_equal(parent.tokens, 1000 * np.arange(8, 21))
    np.testing.assert_allclose(parent.columns["loss"], 5.0 / np.arange(8, 21))
    np.testing.assert_array_equal(parent.heldout["web"]["tokens"], [10_000, 15_000, 20_000])


def test_a_branch_of_a_branch_begins_with_both(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps) for name, steps in (("a", 6), ("b", 9), ("c", 30))]
    branch_of(runs[0], runs[1], 4)
    branch_of(runs[1], runs[2], 5)
    (run,) = drawn_runs(runs[2])
    first, second = run.earlier.values()
    assert [one.name for one in (first, second)] == ["a", "b"]
    np.testing.assert_array_equal(first.tokens, 1000 * np.arange(1, 5))
    np.testing.assert_array_equal(second.tokens, 4000 + 1000 * np.arange(1, 6))
    np.testing.assert_array_equal(run.own.tokens[[0, -1]], [10_000, 39_000])


@pytest.mark.parametrize("parents", [0, 2])
def test_what_is_no_branch_begins_at_zero(tmp_path: Path, parents: int) -> None:
    """Neither one without a parent, nor one that was merged, nor one whose parent is gone."""
    base, run = make_run(tmp_path / "base", 30), make_run(tmp_path / "run", 12)
    branch_of(base, run, 20)
    origin = json.loads((run / "lineage.json").read_text())
    origin["parents"] *= parents
    (run / "lineage.json").write_text(json.dumps(origin))
    assert drawn_runs(run)[0].own.tokens[0] == 1000 and not drawn_runs(run)[0].earlier
    branch_of(tmp_path / "gone", run, 20)
    assert drawn_runs(run)[0].own.tokens[0] == 1000
    branch_of(run, run, 3)  # no run comes from itself
    assert not earlier_parts(run)


def test_pictures_of_a_branch_show_and_name_its_parent(tmp_path: Path) -> None:
    base, branch = make_run(tmp_path / "base", 30), make_run(tmp_path / "branch", 12)
    branch_of(base, branch, 20)
    with pictures.drawn_figures() as drawn:
        assert plot(str(branch)) == 0
    loss = drawn[0]
    pictures.require_readable(loss)
    axes = loss.axes[0]
    grey = [line for line in axes.lines if line.get_color() == EARLIER]
    assert {"before: base", "branch"} <= {line.get_label() for line in grey}
    (parent,) = [line for line in grey if line.get_label() == "before: base"]
    np.testing.assert_array_equal(parent.get_xdata(), 1000 * np.arange(8, 21))
    (own,) = [line for line in axes.lines if line.get_label() == "branch: training"]
    assert own.get_xdata()[0] == 21_000 and own.get_color() == colour(0)
    (border,) = [line for line in axes.lines if line.get_label() == "branch"]
    assert list(border.get_xdata()) == [20_000, 20_000]
    assert axes.get_xlim()[0] == 8000
    assert axes.get_xlabel() == "tokens seen, those of earlier runs included"
    # steps along the top go on, too
    to_steps = axes.child_axes[0]._functions[0]
    np.testing.assert_allclose(to_steps(np.array([8000, 20_000, 32_000])), [8, 20, 32])


def test_a_parent_that_is_drawn_itself_is_not_drawn_twice(tmp_path: Path) -> None:
    base, branch = make_run(tmp_path / "base", 30), make_run(tmp_path / "branch", 12)
    branch_of(base, branch, 20)
    with pictures.drawn_figures() as drawn:
        assert plot(str(base), str(branch)) == 0
    labels = [line.get_label() for line in drawn[0].axes[0].lines]
    assert "base: training" in labels and "branch: training" in labels
    assert not any(label.startswith("before") for label in labels)
    assert drawn[0].axes[0].get_xlim()[0] == 0


def test_titles_say_what_a_run_reads(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 30)
    (run / "config.yaml").write_text(
        "model: {vocab_size: 257}\ntrain: {tokens: 1000}\n"
        "data: {sources: {web: {path: w}, code: {path: c}}}\n"
    )
    with pictures.drawn_figures() as drawn:
        assert plot(str(run)) == 0
    for figure in drawn:
        texts = [text for text, _ in pictures.texts_of(figure)]
        assert "trained on web, code" in texts, texts
        pictures.require_readable(figure)


def test_a_simulation_says_what_stands_at_its_bars(tmp_path: Path) -> None:
    rows = [
        {
            "planner": "static",
            "step_s": 4.0,
            "idle_share": 0.5,
            "passing_share": 0.25,
            "speedup": 1,
        },
        {"planner": "hybrid", "step_s": 2.0, "idle_share": 0, "passing_share": 0.5, "speedup": 2.0},
        {"planner": "broken", "problem": "no plan"},
    ]
    with pictures.drawn_figures() as drawn:
        plot_rows(rows, "7b on 64 x h100, github", tmp_path / "simulation.png")
    pictures.require_readable(drawn[0])
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == [" 1.00x", " 2.00x"]
    assert axes.get_xlabel().endswith("at the end of a bar: speed over static")
    assert [bar.get_width() for bar in axes.patches] == [1, 1, 1, 1, 2, 0]


def test_numbers_on_axes_are_round(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 30)
    with pictures.drawn_figures() as drawn:
        assert plot(str(run)) == 0
    labels = [label for figure in drawn for label in pictures.tick_labels_of(figure)]
    assert {"0", "5K", "10K", "1e-3"} <= set(labels)
    numbers = [label.rstrip("KMB%") for label in labels]
    assert all(len(number.strip("0").replace(".", "")) <= 4 for number in numbers), labels


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.6, 1.3, [0.6, 0.8, 1.0, 1.2]),
        (2.4, 2.9, [2.4, 2.5, 2.6, 2.7, 2.8, 2.9]),
        (0.3, 2.5, [0.5, 1.0, 2.0]),
        (0.1, 100, [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]),
    ],
)
def test_a_log_axis_has_three_round_ticks_or_more(low, high, ticks) -> None:
    values = _round_log_ticks(low, high).tick_values(low, high)
    shown = [tick for tick in values if low * 0.999 <= tick <= high * 1.001]
    assert shown == pytest.approx(ticks)


def test_pictures_lie_in_the_run_folder(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "a", 30)
    assert plot(str(run)) == 0
    paths = [run / "plots" / f"{name}.png" for name in PICTURES]
    assert capsys.readouterr().out.splitlines() == [f"wrote {path}" for path in paths]
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))
        assert image.shape[0] > 600 and image.shape[1] > 1000
        blue = np.all(np.abs(image.astype(int) - (0x21, 0x66, 0xAC)) < 12, axis=-1)
        if path.stem != "bits_per_byte":
            assert blue.sum() > 500  # the curve itself, not only its frame


def test_experts_get_a_picture_of_their_balance(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 30), make_run(tmp_path / "b", 30)]
    path = runs[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    experts = [row | {"balance_loss": 1.1, "max_violation": 0.5} for row in rows if "loss" in row]
    path.write_text("".join(json.dumps(row) + "\n" for row in experts))
    assert plot(*map(str, runs)) == 0
    compared = {path.stem for path in (runs[0] / "plots" / "compared").iterdir()}
    assert compared == {*PICTURES, "balance"}
    assert set(load_curves(runs[1], "b").columns["max_violation"]) == {0.5}
    assert np.isnan(load_curves(runs[0], "a").columns["max_violation"]).all()


def test_replay_gets_a_picture(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 30)
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"replayed": 0.25}) + "\n" for row in rows))
    assert plot(str(run)) == 0
    assert {path.stem for path in (run / "plots").iterdir()} == {*PICTURES, "replay"}


def test_several_runs_share_the_axes_and_leave_the_own_pictures_alone(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 30), make_run(tmp_path / "b", 20)]
    assert plot(*map(str, runs)) == 0
    drawn = sorted(path.stem for path in (runs[0] / "plots" / "compared").iterdir())
    assert drawn == sorted(PICTURES)
    assert [path.name for path in (runs[0] / "plots").iterdir()] == ["compared"]
    assert not (runs[1] / "plots").exists()


def test_out_takes_the_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 5)
    assert plot(str(run), "--out", str(tmp_path / "deep" / "out")) == 0
    assert len(list((tmp_path / "deep" / "out").iterdir())) == 5
    assert not (run / "plots").exists()


@pytest.mark.filterwarnings("error")
def test_what_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    unscored = make_run(tmp_path / "a", 4)
    bare = make_run(tmp_path / "b", 10, bits=None)
    for run in (unscored, bare):
        names = [path.stem for path in plot_run([run], tmp_path / "out")]
        assert names == [name for name in PICTURES if name != "bits_per_byte"]


@pytest.mark.filterwarnings("error")
def test_a_run_that_saw_no_finite_value_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "tokens_seen": step, "loss": None, "tokens_per_s": 9.0})
            + "\n"
            for step in range(1, 9)
        )
    )
    assert len(plot_run([tmp_path], tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "holds no readable metrics.jsonl"),
        ("", "0 step"),
        ('{"step": 1, "tokens_seen": 5, "loss": 1.0}\n{"step": 2, "tok', "1 step"),
    ],
)
def test_what_is_no_run_is_an_error_of_one_line(tmp_path: Path, content, says: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        plot(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_out_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 5)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        plot(str(run), "--out", str(tmp_path / "file"))


def test_smoothing_is_a_centred_mean_that_starts_at_the_first_value() -> None:
    line = np.arange(600.0)
    np.testing.assert_allclose(smooth(line)[:550], line[:550])  # no lag on a slope
    noise = np.random.default_rng(0).normal(size=6000)
    assert smooth(noise)[500:-500].std() < 0.1
    np.testing.assert_array_equal(smooth(line[:50]), line[:50])


def test_smoothing_passes_over_what_is_not_finite() -> None:
    values = np.full(300, 2.0)
    values[[0, 7, 8, 150, 299]] = np.nan
    smoothed = smooth(values)
    assert np.isnan(smoothed[0])
    np.testing.assert_allclose(smoothed[2:], 2.0)
