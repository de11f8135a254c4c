"""wandb, mlflow and trackio themselves: one run each, whatever happens to it."""

import contextlib
import importlib.util
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tracker_server import MlflowServer, trackio_rows, wandb_records

from megascale.monitor.trackers import TRACKERS


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"NOT INSTALLED: {', '.join(missing)}")


SCRIPT = """
import json, sys, time
from pathlib import Path
from megascale.monitor.metrics import MetricsWriter
name, folder, resume, count, finish_s, config = sys.argv[1:]
resume = int(resume)
Path(folder).mkdir(exist_ok=True)
metrics = MetricsWriter(Path(folder), False, (name,), resume, json.loads(config))
began = time.monotonic()
for step in range(resume + 1, resume + 1 + int(count)):
    metrics.write({"step": step, "loss": 1 / step, "mfu": None})
    metrics.write({"step": step, "eval": {"web+\\u00e4": {"loss": float("nan"), "bits": 2.0}}})
written_s = time.monotonic() - began
metrics.close(float(finish_s))
notices = metrics.notices()
print(json.dumps({"written_s": written_s, "notices": notices}))
"""
CONFIG = {"seed": 1, "optim": {"lr": 0.5, "schedule": [{"tokens": 3}], "betas": "x" * 9000}}
CONFIG["data"] = {"sources": {"web+\u00e4": {"path": None}}}


def write(
    name, folder, resume=0, count=3, finish_s=60.0, config=CONFIG, terminal=None, **environment
):
    """Write `count` steps after `resume`; what the writer says at the end, and the time it took."""
    words = [name, folder, resume, count, finish_s, json.dumps(config)]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=terminal or subprocess.PIPE,
        text=True,
        timeout=280,
        env={**os.environ, **environment},
        cwd=folder.parent,
    )
    assert done.returncode == 0, (done.stderr or "")[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return said | {"wall_s": time.monotonic() - began}


def changed_config():
    return {**CONFIG, "optim": {**CONFIG["optim"], "lr": 0.25}}


@needs("trackio")
def test_trackio_continues_its_run(tmp_path):
    store = {"TRACKIO_DIR": str(tmp_path / "store")}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        assert write("trackio", tmp_path / folder / "run", **store)["notices"] == []
    said = write("trackio", tmp_path / "a/run", 2, config=changed_config(), **store)
    assert said["notices"] == []
    (tmp_path / "a/run/trackers/trackio.json").rename(tmp_path / "id")
    ((_, notice),) = write("trackio", tmp_path / "a/run", 5, **store)["notices"]
    assert "a new one begins" in notice
    (tmp_path / "id").rename(tmp_path / "a/run/trackers/trackio.json")
    runs = trackio_rows(tmp_path / "store")
    assert len(runs) == 3 and all(name.startswith("run-") for name in runs)
    continued, *others = sorted(runs.values(), key=len, reverse=True)
    losses = [(step, values["loss"]) for step, values in continued if "loss" in values]
    assert losses == [(step, 1 / step) for step in (1, 2, 3, 3, 4, 5)]
    steps = [[step for step, values in other if "loss" in values] for other in others]
    assert sorted(steps) == [[1, 2, 3], [6, 7, 8]]


@needs("wandb")
def test_wandb_continues_its_run_offline(tmp_path):
    offline = {"WANDB_MODE": "offline"}
    assert write("wandb", tmp_path / "run", **offline)["notices"] == []
    (notice,) = write("wandb", tmp_path / "run", 2, config=changed_config(), **offline)["notices"]
    assert notice[0] == "wandb" and "is offline" in notice[1]
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    steps, ids, rates = [], set(), []
    for path in files:
        for record in wandb_records(path):
            if record.HasField("history"):
                row = {(item.key or item.nested_key[0]): item for item in record.history.item}
                steps += [int(row["step"].value_json)] if "loss" in row else []
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.display_name, record.run.project))
                updates = {item.key: item.value_json for item in record.run.config.update}
                rates += [json.loads(updates["optim"])["lr"]] if "optim" in updates else []
    assert steps == [1, 2, 3, 3, 4, 5]  # no step is left out because it is not above the last
    (run,) = ids
    assert run[1:] == ("run", "megascale") and run[0] in notice[1]
    assert {0.5, 0.25} <= set(rates)


@needs("wandb")
def test_wandb_without_a_login_is_one_warning_and_no_question(tmp_path):
    nobody = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    nobody["WANDB_BASE_URL"] = "http://127.0.0.1:9"
    ours, theirs = pty.openpty()  # a terminal, where wandb asks
    try:
        said = write("wandb", tmp_path / "run", finish_s=5.0, terminal=theirs, **nobody)
        os.set_blocking(ours, False)
        with contextlib.suppress(BlockingIOError):
            shown = os.read(ours, 100_000).decode()
            assert "your choice" not in shown
    finally:
        os.close(ours)
        os.close(theirs)
    assert said["written_s"] < 5 and said["wall_s"] < 120
    (_, warning), (_, missing) = said["notices"]
    assert "nobody is logged in" in warning and missing.startswith("6 of 6 rows did not arrive")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


def history(server, folder, metric):
    from mlflow import MlflowClient

    run_id = json.loads((folder / "trackers/mlflow.json").read_text())["id"]
    client = MlflowClient(server.uri)
    run = client.get_run(run_id)
    return run, [(each.step, each.value) for each in client.get_metric_history(run_id, metric)]


@needs("mlflow", "flask")
@pytest.mark.slow
def test_mlflow_continues_its_run(server, tmp_path):
    where = {"MLFLOW_TRACKING_URI": server.uri}
    folder = tmp_path / "run"
    assert write("mlflow", folder, **where)["notices"] == []
    first, _ = history(server, folder, "loss")
    assert write("mlflow", folder, 3, config=changed_config(), **where)["notices"] == []
    run, losses = history(server, folder, "loss")
    assert run.info.run_id == first.info.run_id and run.info.run_name == "run"
    assert losses == [(step, 1 / step) for step in range(1, 7)]
    assert run.info.status == "FINISHED"
    params = run.data.params
    assert (params["seed"], params["optim.lr"]) == ("1", "0.5")
    assert json.loads(params["optim.schedule"]) == [{"tokens": 3}]
    assert params["data.sources.web__.path"] == "null"
    assert run.data.tags["from step 3/optim.lr"] == "0.25"
    assert "eval/web__/bits" in run.data.metrics


@needs("mlflow", "flask")
@pytest.mark.slow
def test_an_mlflow_run_that_was_deleted_is_begun_anew(server, tmp_path):
    from mlflow import MlflowClient

    where, folder = {"MLFLOW_TRACKING_URI": server.uri}, tmp_path / "run"
    write("mlflow", folder, **where)
    first, _ = history(server, folder, "loss")
    for remove in (MlflowClient(server.uri).delete_run, lambda run_id: forget(folder)):
        remove(first.info.run_id)
        ((_, notice),) = write("mlflow", folder, 3, **where)["notices"]
        assert "any more; a new one begins" in notice
        run, losses = history(server, folder, "loss")
        assert run.info.run_id != first.info.run_id and [step for step, _ in losses] == [4, 5, 6]


def forget(folder):
    (folder / "trackers/mlflow.json").write_text('{"id": "0123456789abcdef0123456789abcdef"}')


@needs("mlflow", "flask")
@pytest.mark.slow
def test_an_mlflow_server_that_hangs_or_is_gone(server, tmp_path):
    """With the client's own number of tries and time limits."""
    where, folder = {"MLFLOW_TRACKING_URI": server.uri}, tmp_path / "run"
    write("mlflow", folder, **where)
    server.signal(signal.SIGSTOP)
    try:
        said = write("mlflow", folder, 3, finish_s=3.0, **where)
    finally:
        server.signal(signal.SIGCONT)
    assert said["written_s"] < 5 and said["wall_s"] < 100
    assert "did not finish in time" in said["notices"][0][1]
    assert said["notices"][-1][1].startswith("6 of 6 rows did not arrive")
    server.kill()
    try:
        said = write("mlflow", folder, 6, finish_s=3.0, **where)
    finally:
        server.start()
    assert said["written_s"] < 5 and said["wall_s"] < 100
    assert said["notices"][-1][1].startswith("6 of 6 rows did not arrive")
    assert write("mlflow", folder, 9, **where)["notices"] == []
    run, losses = history(server, folder, "loss")
    assert [step for step, _ in losses] == [1, 2, 3, 10, 11, 12]
    assert run.data.params["seed"] == "1"


@needs("mlflow")
def test_a_server_that_never_answers_holds_nothing_up(tmp_path):
    """Also with the client alone, such as mlflow-skinny."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said = write("mlflow", tmp_path / "run", finish_s=1.0, MLFLOW_TRACKING_URI=uri)
    assert said["written_s"] < 5 and said["wall_s"] < 100
    assert said["notices"][-1][1].startswith("6 of 6 rows did not arrive")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 6


@needs(*TRACKERS)
def test_all_at_once_and_tensorboard(tmp_path):
    """Three libraries in three threads of one process."""
    environment = {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "store"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    if importlib.util.find_spec("sqlalchemy") is None:
        environment["MLFLOW_TRACKING_URI"] = f"file://{tmp_path}/mlruns"
    script = SCRIPT.replace("False, (name,)", "True, tuple(name.split('+'))")
    words = ["+".join(TRACKERS), tmp_path / "run", 0, 3, 60.0, json.dumps(CONFIG)]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["notices"] == []
    folders = sorted(path.name for path in Path(tmp_path / "run").iterdir())
    assert folders == ["metrics.jsonl", "tensorboard", "trackers", "wandb"]
