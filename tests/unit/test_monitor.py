"""Metrics survive a crash and a resume, the console tells the time left, MFU is never guessed."""

import errno
import gzip
import io
import json
import sys
import types
from contextlib import nullcontext
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from megascale.config.schema import MonitorConfig
from megascale.corpus.batches import GlobalBatch
from megascale.errors import UserError
from megascale.monitor.console import Console
from megascale.monitor.device import mfu, peak_flops
from megascale.monitor.events import EventLog
from megascale.monitor.metrics import MetricsWriter, flatten, read_rows
from megascale.monitor.profile import profiler
from megascale.monitor.quantities import show_count, show_duration, show_names
from megascale.monitor.trackers import TRACKERS
from megascale.runtime.logs import say, settle_console


def writer(folder: Path, resume_step: int | None = None, **options) -> MetricsWriter:
    given = {"tensorboard": False, "trackers": (), "config": {"seed": 1}, **options}
    return MetricsWriter(folder, resume_step=resume_step, **given)


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def write_steps(folder: Path, steps: range, resume_step: int | None = None) -> None:
    metrics = writer(folder, resume_step)
    for step in steps:
        metrics.write({"step": step, "loss": float(step)})
    metrics.close()


# ------------------------------------------------------------------------------- metrics.jsonl


def test_a_row_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    metrics = writer(tmp_path)
    metrics.write({"step": 3, "loss": 1.5, "mfu": None, "skipped": False})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    assert json.loads(text) == {"step": 3, "loss": 1.5, "mfu": None, "skipped": False}
    metrics.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_say_is_null(tmp_path: Path, value: float) -> None:
    metrics = writer(tmp_path)
    metrics.write({"step": 1, "loss": value, "eval": {"a": {"loss": value}}})
    metrics.close()
    expected = {"step": 1, "loss": None, "eval": {"a": {"loss": None}}}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == expected
    EventLog(tmp_path).write("skip", loss=value, slowdown=[value, 1.0])
    said = json.loads((tmp_path / "events.jsonl").read_text())
    assert said["loss"] is None and said["slowdown"] == [None, 1.0]


def test_a_first_score_that_was_not_finite_is_none(tmp_path: Path) -> None:
    from megascale.corpus.heldout import HeldoutPart
    from megascale.run.heldout_sets import evaluations_of, first_scores

    part = HeldoutPart(np.array([[0, 0, 50]]), None, 50, 1)
    assert first_scores(evaluations_of(tmp_path), {"a": part}) == {}
    metrics = writer(tmp_path)
    for step, loss in ((1, float("nan")), (2, 3.0)):
        scores = {"a": {"loss": loss, "tokens": 50}, "b": {"loss": 2.0, "part": part.mark}}
        metrics.write({"step": step, "eval": scores})
    metrics.close()
    assert first_scores(evaluations_of(tmp_path), {"a": part, "b": part}) == {"b": 2.0}


def test_scores_of_another_part_do_not_compare() -> None:
    from megascale.corpus.heldout import HeldoutPart
    from megascale.run.heldout_sets import changed, first_scores

    part = HeldoutPart(np.array([[0, 0, 50], [3, 7, 40]]), None, 200, 5)
    old = [{"a": {"loss": 5.0, "tokens": 30}}, {"b": {"loss": 1.0, "tokens": 30}}]
    assert "(30 tokens)" in (changed("a", part, old) or "")
    assert changed("c", part, old) is None and first_scores(old, {"a": part}) == {}
    same_size = [*old, {"a": {"loss": 4.0, "tokens": 90, "part": "another"}}]
    assert changed("a", part, same_size) is not None
    known = {"tokens": 90, "part": part.mark}
    again = [*same_size, {"a": {"loss": 3.0, **known}}, {"a": {"loss": 2.0, **known}}]
    assert changed("a", part, again) is None and first_scores(again, {"a": part}) == {"a": 3.0}
    written_before = [*old, {"a": {"loss": 2.5, "tokens": 90}}]
    assert changed("a", part, written_before) is None


def test_resume_drops_later_steps_and_the_half_written_line(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    write_steps(tmp_path, range(6, 10), resume_step=5)
    assert steps_of(tmp_path) == list(range(1, 10))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)  # no broken line is left behind
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_resume_keeps_the_evaluation_of_its_own_step(tmp_path: Path) -> None:
    metrics = writer(tmp_path)
    metrics.write({"step": 5, "loss": 1.0})
    metrics.write({"step": 5, "eval": {"a": {"loss": 1.0}}})
    metrics.write({"step": 6, "loss": 1.0})
    metrics.close()
    writer(tmp_path, resume_step=5).close()
    assert [("eval" in row) for row in read_rows(tmp_path / "metrics.jsonl")] == [False, True]


def test_resume_from_the_start_drops_everything_and_none_drops_nothing(tmp_path: Path) -> None:
    write_steps(tmp_path, range(0, 4))
    write_steps(tmp_path, range(4, 6), resume_step=None)
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4, 5]
    write_steps(tmp_path, range(1, 3), resume_step=0)
    assert steps_of(tmp_path) == [1, 2]


def test_a_crash_while_rewinding_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    write_steps(tmp_path, range(1, 5))

    def fail(self: Path, target: Path) -> None:
        raise OSError("crash")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="crash"):
        writer(tmp_path, resume_step=2)
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_names_of_nested_values() -> None:
    row = {"step": 2, "mfu": None, "eval": {"web": {"loss": 1.0, "bits_per_byte": None}}}
    assert dict(flatten(row)) == {"step": 2.0, "eval/web/loss": 1.0}


# ------------------------------------------------------------------------------------ trackers


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    for resume_step, steps in ((None, range(1, 6)), (3, range(4, 7))):
        metrics = writer(tmp_path, resume_step, tensorboard=True)
        for step in steps:
            metrics.write({"step": step, "loss": float(resume_step or 0), "skipped": False})
            metrics.write({"step": step, "eval": {"web": {"loss": 1.0}}})
        metrics.close()
    seen = scalars(tmp_path)
    assert seen["loss"] == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 3.0), (5, 3.0), (6, 3.0)]
    assert [step for step, _ in seen["eval/web/loss"]] == [1, 2, 3, 4, 5, 6]
    assert set(seen) == {"loss", "skipped", "eval/web/loss"}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_tracker_is_named_with_its_remedy(tmp_path: Path, monkeypatch, name) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        writer(tmp_path, trackers=(name,))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_broken_tracker_is_named_in_one_line(tmp_path: Path, monkeypatch, name) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / f"{name}.py").write_text("raise TypeError('Descriptors\\ncannot be made')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=f"{name}, which cannot be imported .TypeError: Desc"):
        writer(tmp_path, trackers=(name,))


def test_missing_tensorboard_is_named_with_its_remedy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        writer(tmp_path, tensorboard=True)


# -------------------------------------------------------------------------------------- console


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def row(step: int, **more) -> dict:
    usual = {"loss": 2.34561, "lr": 2.9e-4, "tokens_per_s": 41234.0, "plan_wait_s": 0.00031}
    return {"step": step, **usual, **more}


def test_a_line_reads_as_documented() -> None:
    clock = Clock()
    console = Console(200, 0, clock=clock)
    for step in range(1, 85):
        clock.now += 100.0 if step == 1 else 0.56  # the first step compiles
        console.tick(step)
    assert console.line(row(84, bits_per_byte=3.38, grad_norm=0.5312, mfu=None)) == (
        " 42.0 %  step  84/200  loss 2.3456  bits/byte 3.380  grad norm 0.53  lr 2.9e-04  "
        "41.2K tok/s  ETA 1m05s"
    )
    slow = row(84, mfu=0.412, plan_wait_s=0.0123)
    assert console.line(slow) == (
        " 42.0 %  step  84/200  loss 2.3456  lr 2.9e-04  41.2K tok/s  MFU 41.2 %  "
        "plan wait 12.3 ms  ETA 1m05s"
    )


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_what_is_not_known_has_no_place_on_the_line(nothing: float | None) -> None:
    console = Console(200, 0)
    names = "loss bits_per_byte grad_norm lr tokens_per_s mfu plan_wait_s speedup_over_static"
    assert console.line({"step": 1, **dict.fromkeys(names.split(), nothing)}) == (
        "  0.5 %  step   1/200"
    )


def test_bytes_are_those_of_the_sources_that_a_batch_reads() -> None:
    from megascale.monitor.step_record import bytes_of, bytes_per_token

    sizes = [(None, 100), (90_000_000, 20_000_000), (10_000_000, 4_000_000)]
    per_token = bytes_per_token(
        types.SimpleNamespace(train_bytes=size, train_tokens=tokens) for size, tokens in sizes
    )
    length = np.array([10, 30], np.int32)
    for source, num_bytes in (([2, 2], 100.0), ([1, 2], 120.0), ([1, 1], 180.0), ([0, 1], None)):
        number = np.zeros(2, np.int64)
        batch = GlobalBatch(0, np.array(source, np.int16), number, number, length)
        assert bytes_of(batch, per_token) == num_bytes


def test_time_left_counts_evaluations_but_not_the_first_step() -> None:
    clock = Clock()
    console = Console(total_steps=100, start_step=50, clock=clock)
    clock.now += 500.0
    console.tick(51)
    assert console.eta_s() is None
    line = console.line(row(51))
    assert line.endswith("41.2K tok/s")
    clock.now += 1.0
    console.tick(52)
    assert console.eta_s() == pytest.approx(48.0)
    clock.now += 9.0  # a step of 1 s and an evaluation of 8 s
    console.tick(53)
    assert console.eta_s() == pytest.approx(47 * (9 + 0.99) / 1.99)


def test_time_left_follows_a_lasting_change_and_ends_at_zero() -> None:
    clock = Clock()
    console = Console(total_steps=3000, start_step=0, clock=clock)
    for step in range(1, 3001):
        clock.now += 1.0 if step <= 1000 else 2.0
        console.tick(step)
        if step == 1000:
            assert console.eta_s() == pytest.approx(2000, rel=1e-6)
        if step == 2000:
            assert console.eta_s() == pytest.approx(2000, rel=0.01)
    assert console.eta_s() == 0.0


def test_steps_noted_in_one_go_weigh_as_many() -> None:
    clock = Clock()
    console = Console(total_steps=100, start_step=0, clock=clock)
    console.tick(10)
    clock.now += 30.0
    console.tick(20)
    assert console.eta_s() == pytest.approx(80 * 3.0)
    clock.now += 77.0
    console.line(row(20))  # the same step again
    assert console.eta_s() == pytest.approx(80 * 3.0)


def test_print_writes_the_line() -> None:
    stream = io.StringIO()
    console = Console(200, 0, stream=stream)
    console.print(row(100))
    assert stream.getvalue() == console.line(row(100)) + "\n"


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (987, "987"), (999.4, "999"), (999.6, "1.0K"), (41234, "41.2K"),
     (999_949, "999.9K"), (999_951, "1.0M"), (3.4e6, "3.4M"), (2e9, "2.0G"), (5e12, "5.0T")],
)  # fmt: skip
def test_counts_are_short(count: float, shown: str) -> None:
    assert show_count(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (65, "1m05s"), (3599.6, "1h00m"),
     (7620, "2h07m"), (86399, "23h59m"), (273600, "3d04h")],
)  # fmt: skip
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert show_duration(seconds) == shown


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], ""),
        (["web"], "web"),
        (["web", "code"], "web, code"),
        (list("abcdefg"), "a, b, c, d and 3 more"),
        (["x" * 28, "y" * 29], f"{'x' * 28}, {'y' * 25}..."),
    ],
)
def test_names_fit_into_a_title(names: list[str], shown: str) -> None:
    assert show_names(names) == shown


# --------------------------------------------------------------------------------------- device


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("A100-SXM4-40GB", 312e12, 19.5e12),
        ("NVIDIA A100-PCIE-40GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756.5e12, 51.2e12),
        ("NVIDIA H100 NVL", 835.5e12, 60e12),
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA H200 NVL", 835.5e12, 60e12),
        ("NVIDIA GH200 480GB", 989.4e12, 66.9e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA A10G", 70e12, 31.5e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("Tesla V100-PCIE-32GB", None, 14e12),
        ("Tesla T4", None, 8.1e12),
    ],
)
def test_peaks_of_known_devices(name: str, bf16: float | None, fp32: float) -> None:
    assert peak_flops(name, "bf16") == (None if bf16 is None else pytest.approx(bf16))
    assert peak_flops(name, "fp32") == pytest.approx(fp32)


@pytest.mark.parametrize(
    "name",
    ["cpu", "", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A100-SXM-64GB", "NVIDIA H100",
     "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H300", "AMD Instinct MI300X", "NVIDIA A1000"],
)  # fmt: skip
def test_no_peak_is_guessed(name: str) -> None:
    assert peak_flops(name, "bf16") is None
    assert peak_flops(name, "fp32") is None


def test_mfu() -> None:
    assert peak_flops("NVIDIA H200", "fp8") is None
    assert mfu(8e14, seconds=2.0, ranks=4, peak=2e14) == pytest.approx(0.5)
    assert mfu(8e14, seconds=2.0, ranks=4, peak=None) is None


# --------------------------------------------------------------------------- events and profiles


def test_events_are_added_with_their_time(tmp_path: Path) -> None:
    EventLog(tmp_path).write("start", step=0, folder=tmp_path)
    EventLog(tmp_path).write("stop", step=9)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert (first["event"], first["step"], first["folder"]) == ("start", 0, str(tmp_path))
    assert (second["event"], second["step"]) == ("stop", 9)
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)


def unexpected(what: str, error: Exception) -> None:
    raise AssertionError(f"{what} failed") from error


RANKS = types.SimpleNamespace(rank=0, device=torch.device("cpu"))


def profile_run(folder: Path, config: MonitorConfig, steps: int) -> Path:
    with profiler(config, folder, RANKS, unexpected) as done_step:
        for step in range(1, steps + 1):
            with torch.profiler.record_function(f"step number {step}"):
                torch.ones(2).sum()
            done_step()
    return folder / "profile" / "rank0.trace.json.gz"


@pytest.mark.parametrize(
    ("asked", "steps", "recorded"), [((1, 1), 3, {1}), ((2, 3), 5, {2, 3}), ((2, 9), 4, {2, 3, 4})]
)
def test_a_trace_holds_the_steps_asked_for(tmp_path: Path, asked, steps, recorded) -> None:
    path = profile_run(tmp_path, MonitorConfig(profile_steps=asked), steps)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events}
    prefix = "step number "
    assert {int(name[len(prefix) :]) for name in names if name.startswith(prefix)} == recorded


def test_nothing_is_written_that_was_not_asked_for(tmp_path: Path, capsys) -> None:
    profile_run(tmp_path, MonitorConfig(), 3)
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_a_memory_snapshot_without_cuda_is_one_warning(tmp_path: Path, capsys) -> None:
    profile_run(tmp_path, MonitorConfig(memory_snapshot=True), 2)
    assert list(tmp_path.iterdir()) == []
    warning = capsys.readouterr().out
    assert "memory_snapshot is ignored" in warning
    assert warning.count("\n") == 1


def test_a_memory_snapshot_is_written_also_when_the_run_fails(tmp_path: Path, monkeypatch) -> None:
    recording: list[object] = []
    monkeypatch.setattr(
        torch.cuda.memory,
        "_record_memory_history",
        lambda enabled="all", max_entries=0: recording.append(enabled),
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda filename: Path(filename).write_bytes(b"pickle")
    )
    ranks = types.SimpleNamespace(rank=3, device=torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="out of memory"):
        with profiler(MonitorConfig(memory_snapshot=True), tmp_path, ranks, unexpected):
            raise RuntimeError("out of memory")
    assert (tmp_path / "profile" / "rank3.memory.pickle").read_bytes() == b"pickle"
    assert recording == ["all", None]


@pytest.mark.parametrize("broken", ["_record_memory_history", "_dump_snapshot"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_memory_snapshot_that_fails_is_reported(
    tmp_path: Path, monkeypatch, broken: str, fails: bool
) -> None:
    """And it does not stand for the error that ended the run."""

    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError(f"no {broken}")

    for name in ("_record_memory_history", "_dump_snapshot"):
        monkeypatch.setattr(
            torch.cuda.memory, name, refuse if name == broken else lambda *a, **o: 0
        )
    ranks = types.SimpleNamespace(rank=0, device=torch.device("cuda", 0))
    failed: list[tuple[str, str]] = []
    expected = pytest.raises(ValueError, match="of the run") if fails else nullcontext()
    with expected:
        with profiler(
            MonitorConfig(memory_snapshot=True),
            tmp_path,
            ranks,
            lambda what, error: failed.append((what, str(error))),
        ):
            if fails:
                raise ValueError("of the run")
    assert failed == [("memory snapshot", f"no {broken}")]


# -------------------------------------------------------------------------------------- console


class Terminal(io.TextIOWrapper):
    """A console of few characters."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


def test_a_console_of_few_characters_takes_what_it_can(monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    say("caf\u00e9 \u2713")
    say("plain")
    assert terminal.buffer.getvalue() == b"caf\\xe9 \\u2713\nplain\n"


def test_a_console_on_a_full_disk_is_tried_again(monkeypatch, caplog) -> None:
    said: list[str] = []

    class Full(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            said.append(text)
            return len(text)

    stream = Full()
    monkeypatch.setattr(sys, "stdout", stream)
    say("lost")
    stream.full = False
    say("there")
    settle_console()
    assert "".join(said) == "there\n" and "No space left" in caplog.text
