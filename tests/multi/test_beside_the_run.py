"""Nothing beside the training can stop it: each helper of a run is broken, the run ends well."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from crash_drill import curve
from tiny_corpus import rows, tiny_config
from tracker_server import MlflowServer

from megascale.corpus.prepare import prepare
from megascale.corpus.recipe import parse_recipe

STEPS = 6
TINY = ("train.tokens=6000", "eval.every_steps=3", "checkpoint.save_every_steps=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a corpus that brings its tokenizer, as a sample needs it."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts").mkdir()
    for i in range(60):
        (folder / f"texts/{i}.txt").write_text(f"text number {i} is about {i * i}\n" * 40)
    recipe = f"{{name: t, inputs: [{{kind: files, paths: ['{folder}/texts/*']}}]}}"
    prepare(parse_recipe(recipe, ["heldout_fraction=0.1"]), folder / "prepared", processes=1)
    data = f"""
  sources: {{tiny: {{path: {folder / "prepared"}}}}}
  context_tokens: 128
  global_batch_tokens: 1024"""
    return tiny_config(folder, data=data)


def command(breakage, *words):
    """(exit status, what it said) of `megascale` on this rank, after `breakage` of this module."""
    from megascale.cli import main

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        globals()[breakage](patch)
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        status = main([str(word) for word in words])
    return status, said.getvalue()


def assert_whole(run_dir, steps=STEPS):
    """The run has all its steps, and its last checkpoint."""
    assert sorted(curve(run_dir)) == list(range(1, steps + 1))
    assert (run_dir / "checkpoints/latest").read_text().strip() == f"{steps:08d}"


def events(run_dir, kind):
    return [event for event in rows(run_dir / "events.jsonl") if event["event"] == kind]


def nothing(patch):
    """Nothing is broken from inside."""


def raises(*args, **kwargs):
    raise RuntimeError("broken\nby the test")


def broken_tokenizer(patch):
    """On rank 0, which the others must not wait for."""
    if os.environ["RANK"] == "0":
        patch.setattr("megascale.corpus.tokenizers.ByteTokenizer.__init__", raises)


def broken_sampling(patch):
    patch.setattr("megascale.training.sample._next_logits", raises)


def broken_console(patch):
    patch.setattr("megascale.monitor.console.Console.line", raises)


def broken_profiler(patch):
    patch.setattr("torch.profiler.profile.start", raises)


def broken_experts(patch):
    patch.setattr("megascale.monitor.experts.CollapseWatch.see", raises)
    patch.setattr("megascale.monitor.experts.ExpertLog.write", raises)


def broken_comparison(patch):
    patch.setattr("megascale.monitor.stragglers.StragglerWatch.see", raises)


@pytest.mark.parametrize(
    "breakage, what, words",
    [
        # whole documents are scored, so only the sample needs the tokenizer
        ("broken_tokenizer", "sample", ["eval.sample_prompt=text", "eval.tokens=1000000"]),
        ("broken_sampling", "sample", ["eval.sample_prompt=text"]),
        ("broken_console", "recorder (step)", ["monitor.log_every_steps=1"]),
        ("broken_profiler", "profile", ["monitor.profile_steps=[2,3]"]),
        ("broken_experts", "recorder (experts)", ["model.moe.num_experts=4"]),
        ("broken_comparison", "recorder (ranks)", ["monitor.compare_ranks_every_steps=2"]),
    ],
)
def test_a_helper_that_raises_is_one_warning(ranks, config, tmp_path, breakage, what, words):
    run_dir = tmp_path / "run"
    answers = ranks(2, command, breakage, "train", config, f"run_dir={run_dir}", *TINY, *words)
    assert [status for status, _ in answers] == [0, 0]
    assert answers[0][1].count(f"warning: {what} failed: RuntimeError: broken by the test") == 1
    assert "Traceback" not in answers[0][1] and "done: 6 steps" in answers[0][1]
    assert [event["what"] for event in events(run_dir, "failed")] == [what]
    assert "by the test" in (run_dir / "logs/rank0.log").read_text()
    assert_whole(run_dir)


@pytest.mark.parametrize(
    "name, warning, words",
    [
        ("profile", "warning: profile failed: FileExistsError", ["monitor.profile_steps=[2,3]"]),
        ("tensorboard", "warning: TensorBoard ", ["monitor.tensorboard=true"]),
    ],
)
def test_a_place_that_cannot_be_written_is_a_warning(ranks, config, tmp_path, name, warning, words):
    (tmp_path / name).write_text("in the way")
    answers = ranks(1, command, "nothing", "train", config, f"run_dir={tmp_path}", *TINY, *words)
    assert answers[0][0] == 0 and answers[0][1].count(warning) >= 1
    assert_whole(tmp_path)


def interrupted_sampling(patch):
    """Rank 0, which draws no tokens where there are two, is asked to stop at the third."""
    from megascale.training import sample

    next_logits, calls = sample._next_logits, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return next_logits(*args)

    patch.setattr(sample, "_next_logits", interrupting)


def test_a_stop_ends_a_sample(ranks, config, tmp_path):
    words = ["eval.sample_prompt=text", "eval.sample_tokens=100000", *TINY]
    answers = ranks(
        2, command, "interrupted_sampling", "train", config, f"run_dir={tmp_path}", *words
    )
    assert [status for status, _ in answers] == [0, 0]
    (sample,) = events(tmp_path, "sample")
    assert len(sample["text"]) <= 3
    assert_whole(tmp_path)


@pytest.fixture
def start(config):
    """Starts training as a process, which ends with the test."""
    started = []

    def start(run_dir, *words, environment=(), **options):
        words = ["-m", "megascale", "train", config, f"run_dir={run_dir}", *words]
        run = subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**os.environ, **dict(environment)},
            text=True,
            **options,
        )
        started.append(run)
        return run

    yield start
    for run in started:
        run.kill()


@pytest.mark.parametrize("console", ["reader is gone", "disk is full"])
def test_a_console_that_takes_nothing_is_no_end(start, tmp_path, console):
    if console == "disk is full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    run_dir = tmp_path / "run"
    reads, writes = os.pipe()
    os.close(reads)
    full = os.open("/dev/full", os.O_WRONLY) if console == "disk is full" else writes
    words = ("monitor.log_every_steps=1", "eval.sample_prompt=text", *TINY)
    run = start(run_dir, *words, stdout=full, stderr=subprocess.PIPE)
    _, stderr = run.communicate(timeout=250)
    assert (run.returncode, stderr) == (0, "")
    assert_whole(run_dir)
    assert "the console does not take lines" in (run_dir / "logs/rank0.log").read_text()


def test_a_heartbeat_that_cannot_be_had_is_a_warning(start, tmp_path):
    pages = {"MEGASCALE_PULSE": str(tmp_path / "nowhere"), "RANK": "0", "LOCAL_RANK": "0"}
    pages |= {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run = start(tmp_path / "run", *TINY, environment=pages, stdout=subprocess.PIPE)
    said, _ = run.communicate(timeout=250)
    assert run.returncode == 0 and said.count("warning: no heartbeat of this rank") == 1
    assert_whole(tmp_path / "run")


# ------------------------------------------------------------------ an mlflow server that is gone


@pytest.mark.skipif(find_spec("mlflow") is None, reason="NOT INSTALLED: mlflow or mlflow-skinny")
def test_a_run_whose_tracker_never_answers_stops_when_asked(start, tmp_path):
    """With the client's own time limits and number of tries."""
    run_dir = tmp_path / "run"
    words = ("train.tokens=1000000000", "eval.every_steps=0", "monitor.trackers=[mlflow]")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = {"environment": {"MLFLOW_TRACKING_URI": uri}}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        run = start(run_dir, *words, **options)
        wait_for_steps(run, run_dir, 20)
        asked_at, asked = len(rows(run_dir / "metrics.jsonl")), time.monotonic()
        run.send_signal(signal.SIGTERM)
        said, _ = run.communicate(timeout=120)
    assert run.returncode == 0 and "Traceback" not in said
    assert max(curve(run_dir)) <= asked_at + 3 and time.monotonic() - asked < 60
    assert_whole(run_dir, max(curve(run_dir)))
    assert "warning: mlflow did not finish in time" in said and "rows did not arrive" in said


def needs_server(test):
    missing = [name for name in ("mlflow", "flask") if find_spec(name) is None]
    reason = f"NOT INSTALLED: {', '.join(missing)}"
    return pytest.mark.slow(pytest.mark.skipif(bool(missing), reason=reason)(test))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


def stored_steps(server, run_dir):
    from mlflow import MlflowClient

    run_id = json.loads((run_dir / "trackers/mlflow.json").read_text())["id"]
    steps = MlflowClient(server.uri).get_metric_history(run_id, "loss")
    return run_id, [each.step for each in steps]


def wait_for_steps(run, run_dir, count):
    while not (run_dir / "metrics.jsonl").exists() or len(rows(run_dir / "metrics.jsonl")) < count:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)


@needs_server
@pytest.mark.timeout(900)
@pytest.mark.parametrize("blow", ["SIGKILL", "SIGSTOP"])
def test_an_mlflow_server_that_dies_or_hangs_mid_run(server, start, tmp_path, blow):
    """Asked to stop then, the run stops after the step; resumed, it continues the mlflow run."""
    run_dir, steps = tmp_path / "run", 400
    words = (f"train.tokens={1024 * steps}", "eval.every_steps=0", "monitor.trackers=[mlflow]")
    words += ("checkpoint.save_every_steps=0",)
    options = {"environment": {"MLFLOW_TRACKING_URI": server.uri}}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = start(run_dir, *words, **options)
    while not (run_dir / "trackers/mlflow.json").exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    wait_for_steps(run, run_dir, 10)
    server.signal(getattr(signal, blow))
    try:
        before = len(rows(run_dir / "metrics.jsonl"))
        wait_for_steps(run, run_dir, before + 20)  # it goes on
        asked_at, asked = len(rows(run_dir / "metrics.jsonl")), time.monotonic()
        run.send_signal(signal.SIGTERM)
        said, _ = run.communicate(timeout=120)
        seconds = time.monotonic() - asked
    finally:
        if blow == "SIGKILL":
            server.kill()
            server.start()
        else:
            server.signal(signal.SIGCONT)
    assert run.returncode == 0 and "Traceback" not in said
    assert f"stopped by a signal after step {max(curve(run_dir))}" in said
    assert max(curve(run_dir)) <= asked_at + 3 and seconds < 60
    assert said.count("warning: mlflow ") <= 3 and "rows did not arrive" in said
    told = events(run_dir, "tracker")
    assert told and all(event["tracker"] == "mlflow" for event in told)
    first, arrived = stored_steps(server, run_dir)
    last = max(curve(run_dir)) + 5
    again = start(run_dir, *words, f"train.stop_after_steps={last}", "--resume", "auto", **options)
    said, _ = again.communicate(timeout=250)
    assert again.returncode == 0, said
    assert "warning: mlflow" not in said
    second, arrived = stored_steps(server, run_dir)
    assert first == second and arrived[-5:] == list(range(last - 4, last + 1))
    assert sorted(curve(run_dir)) == list(range(1, last + 1))
