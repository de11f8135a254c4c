"""What commands write where the user said: never over their input, or over what others made."""

import json
import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megascale.cli import main
from megascale.commands import calibrate as calibrate_command
from megascale.commands import eval as eval_command
from megascale.commands import experts as experts_command
from megascale.commands.report import PAGE
from megascale.errors import UserError
from megascale.infowindow.checked_files import files_of, write_arrays
from megascale.planner.cost import CostModel
from megascale.planner.fit import write_cost
from megascale.runtime.outputs import Output, begins_with, json_of, picture, require_outputs
from megascale.training import byte_model

START = {"time": "2026-11-30T07:15:00+00:00", "event": "start", "began": 1796022900.0}
LENGTHS = ["--ranks", "2", "--capacity", "4096"]


def run(capsys, *words):
    """(exit status, the one line on stderr) of a command."""
    status = main([str(word) for word in words])
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == (1 if status else 0), errors
    return status, errors


def drawn(path):
    Figure().savefig(path)
    return path


@pytest.fixture
def run_dir(tmp_path):
    """A run of three steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        {"step": i, "loss": 2.0, "tokens_seen": 10 * i, "tokens_per_s": 5.0, "lr": 0.1}
        | {"grad_norm": 1.0, "step_s": 0.1}
        for i in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "events.jsonl").write_text(json.dumps({**START, "step": 0, "world": 1}) + "\n")
    (folder / "config.yaml").write_text("seed: 1\n")
    return folder


@pytest.fixture
def lengths(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("1000\n2000\n500\n")
    return path


# ------------------------------------------------------------------------------------- mechanism


def kinds():
    return {
        "cost": json_of("a cost model", "a", "b"),
        "page": begins_with("a page", b"<!doctype html>", [b"<h2>Goodput "]),
        "picture": picture(),
        "codebook": files_of("megascale.infowindow.codebook"),
    }


def own(kind, path):
    """A file of a kind, as its command writes it."""
    if kind == "cost":
        write_cost(CostModel(a=1.0, b=1.0), path)
    elif kind == "page":
        path.write_text("<!doctype html>\n<html>" + "x" * 9999 + "<h2>Goodput 50%</h2>")
    elif kind == "picture":
        drawn(path)
    else:
        write_arrays(path, "megascale.infowindow.codebook", {}, {"bits": 16})
    return path


@pytest.mark.parametrize("kind", kinds())
def test_only_a_file_of_the_same_kind_is_replaced(tmp_path, kind):
    path = own(kind, tmp_path / "own.png")
    require_outputs([Output("--out", path, kinds()[kind])])
    others = [own(other, tmp_path / f"{other}.png") for other in kinds() if other != kind]
    for name, content in [
        ("text", "some text"),
        ("json", '{"a": 1}'),
        ("list", "[1]"),
        ("png", "\x89PNG\r\n\x1a\nof a camera"),
        ("html", "<!doctype html><title>mine</title>"),
        ("deep", "[" * 10_000),
        ("page", "mine <h2>Goodput "),
    ]:
        others.append(tmp_path / f"{name}_.png")
        others[-1].write_text(content)
    for other in others:
        before = other.read_bytes()
        with pytest.raises(UserError, match="there, and not .*; choose another file"):
            require_outputs([Output("--out", other, kinds()[kind])])
        assert other.read_bytes() == before


def test_an_empty_file_and_a_new_name_are_taken(tmp_path):
    """As mktemp makes them."""
    (tmp_path / "empty").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "new", "dangling"):
        require_outputs([Output("--out", tmp_path / name, json_of("x", "a"))])
    require_outputs([Output("--out", Path("/dev/stdout"), json_of("x", "a"))])
    require_outputs([Output("--out", Path("/dev/null"), json_of("x", "a"))])
    require_outputs([Output("--out", tmp_path / "a/b/c", json_of("x", "a"), makes_folders=True)])


@pytest.mark.parametrize("how", [os.link, os.symlink, None])
def test_an_input_is_not_replaced_by_any_name(tmp_path, how):
    path, name = own("cost", tmp_path / "cost.json"), tmp_path / "other.json"
    if how is None:
        name = tmp_path / "x/../cost.json"
        (tmp_path / "x").mkdir()
    else:
        how(path, name)
    with pytest.raises(UserError, match=f"{name}: would take the place of {path}, which is read"):
        require_outputs([Output("--out", name, kinds()["cost"])], [None, "nowhere", path])


def test_places_where_nothing_can_be(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "file").touch()
    for path, makes_folders, said in [
        (tmp_path, False, "there, and not a file"),
        (loop, False, "Too many levels of symbolic links"),
        (tmp_path / "no/file", False, f"no folder {tmp_path / 'no'}"),
        (tmp_path / "file/x", False, f"{tmp_path / 'file'} is no folder"),
        (tmp_path / "file/x/y", True, f"{tmp_path / 'file'} is no folder"),
        (loop / "x", True, f"{loop} is no folder"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            require_outputs([Output("--out", path, kinds()["cost"], makes_folders)])
        assert str(caught.value).startswith(f"--out {path}: ")
    with pytest.raises(UserError, match="--gantt .*: is the file of --json too"):
        outputs = [("--json", json_of("x", "a")), ("--gantt", picture(".png"))]
        require_outputs([Output(option, tmp_path / "x.png", kind) for option, kind in outputs])


# ---------------------------------------------------------------------------------------- verbs


def test_a_report_takes_the_place_of_a_report_alone(tmp_path, run_dir, capsys):
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    script = tmp_path / "script.py"
    script.write_text("print(1)\n")
    for out in [*run_dir.iterdir(), script]:
        status, line = run(capsys, "report", run_dir, "--out", out)
        assert status == 2 and f"{out}: there, and not a page of megascale report" in line
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    assert script.read_text() == "print(1)\n"
    for _ in range(2):
        assert run(capsys, "report", run_dir)[0] == 0
    assert PAGE.fits(run_dir / "report.html")


def test_curves_take_the_place_of_pictures_of_ours_alone(tmp_path, run_dir, capsys):
    for _ in range(2):
        assert run(capsys, "plot", run_dir, "--out", tmp_path / "plots")[0] == 0
    written = sorted(path.name for path in (tmp_path / "plots").iterdir())
    (tmp_path / "plots" / written[-1]).write_bytes(b"\x89PNG\r\n\x1a\nphoto")
    (tmp_path / "plots" / written[0]).unlink()
    status, line = run(capsys, "plot", run_dir, "--out", tmp_path / "plots")
    assert status == 2 and f"{written[-1]}: there, and not a picture" in line
    assert not (tmp_path / "plots" / written[0]).exists()


def test_a_plan_takes_the_place_of_a_plan_alone(tmp_path, lengths, capsys, monkeypatch):
    words = ["plan", "--lengths", lengths, *LENGTHS]
    outputs = ["--json", tmp_path / "plan.json", "--gantt", tmp_path / "plan.png"]
    for _ in range(2):
        assert run(capsys, *words, *outputs)[0] == 0
    cost = own("cost", tmp_path / "cost.json")
    from megascale.commands import plan as plan_command

    monkeypatch.setattr(plan_command, "PLANNERS", {})  # nothing is planned
    for given, said in [
        (["--json", lengths], "would take the place of"),
        (["--cost", cost, "--json", cost], "would take the place of"),
        (["--json", cost], "there, and not a plan"),
        (["--gantt", _json(tmp_path / "lengths.png", 1)], "there, and not a picture"),
        (["--gantt", tmp_path / "no/x.png"], "no folder"),
    ]:
        status, line = run(capsys, *words, *given)
        assert status == 2 and said in line, line


def test_a_plan_is_not_written_over_the_config(tmp_path, capsys):
    from tiny_corpus import tiny_config

    config = tiny_config(tmp_path)
    before = Path(config).read_bytes()
    status, line = run(capsys, "plan", config, "--json", config)
    assert status == 2 and f"{config}: would take the place of {config}" in line
    assert Path(config).read_bytes() == before


def test_a_simulation_is_not_written_over_its_lengths(tmp_path, lengths, capsys, monkeypatch):
    words = "simulate --ranks 8 --tensor 8 --context 4Ki --batch-tokens 16Ki --steps 1".split()
    words += ["--planners", "hybrid", "--lengths", f"file:{lengths}"]
    outputs = ["--json", tmp_path / "s.json", "--plot", tmp_path / "s.svg"]
    for _ in range(2):
        assert run(capsys, *words, *outputs)[0] == 0
    from megascale.commands import simulate as simulate_command

    monkeypatch.setattr(simulate_command, "replay", None)  # nothing is replayed
    for given, said in [
        (["--json", lengths], "would take the place of"),
        (["--json", tmp_path / "s.svg"], "there, and not a file of megascale simulate"),
        (["--plot", tmp_path / "s.json"], "must end in .png, .svg or .pdf"),
    ]:
        status, line = run(capsys, *words, *given)
        assert status == 2 and said in line, line


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_calibration_is_not_written_over_its_config(tmp_path, capsys, monkeypatch, ranks):
    """Nor over anything else but another calibration; found before any rank measures."""
    monkeypatch.setattr(calibrate_command, "run_ranks", lambda job, asked: 7)
    monkeypatch.setattr("megascale.training.calibrate.calibrate", None)
    config, script = tmp_path / "run.yaml", tmp_path / "script.py"
    config.write_text("model: {vocab_size: 64}\ndata: {sources: {web: {path: x}}}\n")
    script.write_text("print(1)\n")
    report = tmp_path / "c.report.json"
    report.write_text('{"mine": 1}')
    own("cost", tmp_path / "cost.json")
    for given, said in [
        (["--out", config], f"{config}: would take the place of {config}, which is read"),
        (["--out", script], f"{script}: there, and not a cost model of megascale calibrate"),
        (["--out", tmp_path / "c.json"], f"{report}: there, and not a report"),
        (["--plot", script.with_suffix(".txt")], "must end in .png, .svg or .pdf"),
    ]:
        status, line = run(capsys, "calibrate", config, "--ranks", ranks, *given)
        assert status == 2 and said in line, line
    assert script.read_text() == "print(1)\n" and report.read_text() == '{"mine": 1}'
    if ranks == 2:  # its own file of before
        words = ["calibrate", config, "--ranks", 2, "--out", tmp_path / "cost.json"]
        assert main([str(word) for word in words]) == 7


def test_results_are_not_written_over_other_files(tmp_path, run_dir, capsys):
    """Before a model is loaded."""
    mine = tmp_path / "mine.json"
    mine.write_text('{"results": 1}')
    status, line = run(capsys, "eval", run_dir, "--tasks", "x", "--out", mine)
    assert status == 2 and f"{mine}: there, and not a file of megascale eval" in line
    assert eval_command.RESULTS.fits(_json(tmp_path / "e", {"checkpoint": "c", "results": {}}))
    (run_dir / "plots").mkdir()
    (run_dir / "plots/experts_heldout.json").write_text("{}")
    status, line = run(capsys, "experts", run_dir)
    assert status == 2 and "experts_heldout.json: there, and not a file of megascale exp" in line
    old = _json(tmp_path / "x", {"step": 1, "divergence_bits": [], "share": {}})
    assert experts_command.RESULT[1].fits(old)


def _json(path, value):
    path.write_text(json.dumps(value))
    return path


def test_train_m1_keeps_configs_of_others(tmp_path):
    (tmp_path / "m1.yaml").write_text("run_dir: runs/mine\n")
    assert not byte_model.OWN_CONFIG.fits(tmp_path / "m1.yaml")
    (tmp_path / "m1.yaml").write_text(f"run_dir: {tmp_path}/run\n")
    assert byte_model.OWN_CONFIG.fits(tmp_path / "m1.yaml")
