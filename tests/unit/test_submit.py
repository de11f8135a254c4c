"""Batch scripts: all that is filled in is quoted, and they do what they say on a false Slurm."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_corpus import tiny_config

from megascale.cli import main
from megascale.errors import UserError
from megascale.launch import node_check
from megascale.launch.node_check import check_node
from megascale.launch.slurm import BatchJob, node_range, script_path, time_limit_s
from megascale.launch.sweep import sweep_words

EVIL = ["a b", "it's", '"c"', "$(touch pwned)", "`touch pwned`", "back\\slash\\", "#", "", "%j"]
SLURM = {
    "SLURM_JOB_ID": "10123",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NAME": "s w",
    "SLURM_NTASKS": "4",
}
NOTE = "python3 -c 'import json, sys; json.dump(sys.argv[2:], open(sys.argv[1], \"w\"))'"
FALSE_TOOLS = {
    "scontrol": """case "$2" in
hostnames) printf 'n1\\nn2\\n' ;;
node) echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
*) echo "$@" >>requeued ;;
esac""",
    "srun": f"""trap 'echo USR1 >>told; exit 0' USR1
{NOTE} srun "$@"
for ((i = 0; i < ${{SRUN_S:-0}} * 20; i++)); do sleep 0.05; done
exit "${{SRUN_STATUS:-0}}" """,
    "mpiexec": f"""{NOTE} mpiexec "$@" """,
    "site": "exit 1",  # not the file of that name in the folder of the job
}


@pytest.fixture
def batch(tmp_path):
    """`batch(script, *arguments, **environment)`: the script, started on a false Slurm."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in FALSE_TOOLS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)

    def start(script, *arguments, **environment):
        if "\n" in str(script):
            (tmp_path / "script").write_text(script)
            script = tmp_path / "script"
        path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            cwd=tmp_path,
            env={"PATH": path, **SLURM, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process):
    said, _ = process.communicate(timeout=200)
    return process.returncode, said


def called(tmp_path, tool="srun"):
    return json.loads((tmp_path / tool).read_text())


def test_the_script_starts_one_driver_a_node(batch, tmp_path):
    status, said = finish(batch(script_path("train"), "run.yaml", "a.b=c d"))
    assert status == 0, said
    words = called(tmp_path)
    begin = words.index("python3")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--no-kill"} <= set(words[:begin])
    launch = (
        "python3 -m megascale launch run.yaml 'a.b=c d' --nodes 2-2 --rendezvous 10.0.0.1:20123"
    )
    assert words[begin:] == [*shlex.split(launch), "--leave-s", "240"]
    assert not (tmp_path / "requeued").exists()


def test_settings_reach_the_driver(batch, tmp_path):
    (tmp_path / "site").write_text("export NCCL_SOCKET_IFNAME=$undefined; false; touch sourced\n")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text("touch activated\n")
    given = {"SITE": "site", "VENV": "venv", "MIN_NODES": "1", "CHECK": "true $(touch pwned); "}
    given |= {"RANKS_PER_NODE": "8", "LEAVE_S": "9", "PORT": "77", "SPARE_NODES": "1"}
    settings = {f"MEGASCALE_{name}": value for name, value in given.items()}
    assert finish(batch(script_path("train"), "run.yaml", **settings))[0] == 0
    words = called(tmp_path)
    expected = ["--nodes", "1-1", "--rendezvous", "10.0.0.1:77", "--leave-s", "9"]
    expected += ["--ranks-per-node", "8", "--check", "true $(touch pwned); "]
    assert words[words.index("run.yaml") + 1 :] == expected
    assert (tmp_path / "sourced").exists() and (tmp_path / "activated").exists()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("script", ["train", "prepare"])
@pytest.mark.parametrize("site", ["nowhere.sh", "."])
def test_a_site_that_cannot_be_read_ends_the_job(batch, tmp_path, script, site):
    status, said = finish(batch(script_path(script), "x.yaml", MEGASCALE_SITE=site))
    assert status == 2 and f"{site} is no file that can be read" in said
    assert not (tmp_path / "srun").exists() and not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("script", ["train", "prepare"])
def test_containers(batch, tmp_path, script):
    more = {"MEGASCALE_MOUNTS": "/d:/d"}
    image = {"MEGASCALE_CONTAINER": "my image.sif"}
    assert finish(batch(script_path(script), "x.yaml", **image, **more))[0] == 0
    words = called(tmp_path)
    begin = words.index("apptainer")
    assert words[words.index("--bind") + 1] == f"{tmp_path}:{tmp_path},/d:/d"
    assert words[begin:][words[begin:].index("my image.sif") + 1] == "python3"
    image = {"MEGASCALE_CONTAINER": "registry#me/image:1"}
    assert finish(batch(script_path(script), "x.yaml", **image))[0] == 0
    words = called(tmp_path)
    assert "--container-image=registry#me/image:1" in words[: words.index("python3")]
    assert f"--container-mounts={tmp_path}:{tmp_path}" in words


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (1, True), (2, False), (3, False), (137, True)]
)
def test_what_may_do_better_is_requeued(batch, tmp_path, status, requeued):
    assert finish(batch(script_path("train"), "x.yaml", SRUN_STATUS=str(status)))[0] == status
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 10123\n"


@pytest.mark.parametrize(
    ("number", "told", "requeued"), [(signal.SIGUSR1, True, True), (signal.SIGTERM, False, False)]
)
def test_signals(batch, tmp_path, number, told, requeued):
    """A time limit is passed on and requeues; what Slurm ends itself, it requeues itself."""
    process = batch(
        script_path("train"),
        "x.yaml",
        SRUN_S="100" if told else "3",
        SRUN_STATUS="1" if told else "143",
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "srun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    status, said = finish(process)
    assert (tmp_path / "told").exists() == told, said
    assert (tmp_path / "requeued").exists() == requeued
    assert status == (0 if told else 143)


def test_a_sweep_takes_its_line(batch, tmp_path):
    (tmp_path / "list").write_text("a=1\nb='x y' c=\"$(touch pwned)\"\n\n")
    words = (script_path("sweep"), "run.yaml", "list", "d=2")
    train = {"MEGASCALE_TRAIN_SCRIPT": str(script_path("train"))}
    status, said = finish(batch(*words, SLURM_ARRAY_TASK_ID="1", **train))
    assert status == 0, said
    found = called(tmp_path)
    begin = found.index("run.yaml")
    expected = ["run_dir=runs/s w/1", "d=2", "b=x y", "c=$(touch pwned)", "--nodes"]
    assert found[begin + 1 : begin + 6] == expected
    assert not (tmp_path / "pwned").exists()
    status, said = finish(batch(*words, SLURM_ARRAY_TASK_ID="2", **train))
    assert status == 2 and "no line 3" in said


SWEEP_LINES = [
    'run_dir="runs/a\\b" seed=1',  # in quotes a backslash is itself
    "run_dir='runs/a\\b'",
    'run_dir=runs/a\\ b\\"c',
    """run_dir='runs/"a"'"$HOME"'\t' seed=1 \t""",
    "run_dir=runs/a#b #seed=1",
]


@pytest.mark.parametrize("line", SWEEP_LINES)
def test_submit_reads_a_sweep_as_its_job_does(batch, tmp_path, line):
    (tmp_path / "list").write_text(f"{line}\n")
    train = {"MEGASCALE_TRAIN_SCRIPT": str(script_path("train"))}
    words = (script_path("sweep"), "run.yaml", "list")
    status, said = finish(batch(*words, SLURM_ARRAY_TASK_ID="0", **train))
    assert status == 0, said
    found = called(tmp_path)
    read = found[found.index("run_dir=runs/s w/0") + 1 : found.index("--nodes")]
    assert sweep_words(line, "list") == read


def test_ranks_of_mpi(batch, tmp_path):
    assert finish(batch(script_path("prepare"), "r.yaml", MEGASCALE_MPI="pmi2"))[0] == 0
    assert "--mpi=pmi2" in called(tmp_path)
    assert finish(batch(script_path("prepare"), "r.yaml", MEGASCALE_MPI="mpiexec"))[0] == 0
    prepare = ["-n", "4", "python3", "-m", "megascale", "prepare", "r.yaml"]
    assert called(tmp_path, "mpiexec") == prepare


def test_everything_filled_in_is_quoted(batch, tmp_path):
    settings = {f"MEGASCALE_X{i}": word for i, word in enumerate(EVIL)}
    job = BatchJob("train", {"job-name": EVIL[0], "exclusive": None}, settings, EVIL)
    script = job.render()
    assert script.count("--job-name") == 1 and script.count("#SBATCH --exclusive\n") == 1
    status, said = finish(batch(script))
    words = called(tmp_path)
    assert status == 0, said
    assert words[words.index("launch") + 1 :][: len(EVIL)] == EVIL
    assert not (tmp_path / "pwned").exists()
    exported = subprocess.run(
        ["bash", "-c", f"{script.split('set -euo')[0]}\nenv -0"], capture_output=True, cwd=tmp_path
    )
    found = dict(pair.split("=", 1) for pair in exported.stdout.decode().split("\0") if pair)
    assert {name: found[name] for name in settings} == settings
    with pytest.raises(UserError, match="no line breaks"):
        BatchJob("train", {"job-name": "a\n#SBATCH --b"}, {}, []).render()


@pytest.mark.parametrize("name", [word for word in EVIL if word])
def test_a_name_is_a_name(batch, tmp_path, config, capsys, name):
    """Of the run, of its folder and of the config."""
    named = str(Path(config).rename(f"{name}.yaml"))
    plain_name = name.replace("\\", "")  # Slurm opens no log in a folder with a backslash
    folder = f"run_dir={json.dumps(f'runs/{plain_name}')}"
    words = ("--name", name, "--nodes=1", f"--sbatch=--comment={name}")
    script = rendered(capsys, named, folder, *words)
    options = dict(re.findall(r'^#SBATCH --([a-z-]+)="(.*)"$', script, re.MULTILINE))
    plain = {key: re.sub(r"\\(.)", r"\1", value) for key, value in options.items()}  # as sbatch
    assert plain["job-name"] == plain["comment"] == name
    status, said = finish(batch(script))
    assert status == 0, said
    called_with = called(tmp_path)
    assert {named, folder} <= set(called_with)
    assert not list(tmp_path.rglob("pwned"))


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(tiny_config(tmp_path))


def rendered(capsys, *words):
    assert main(["submit", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def options(script):
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=\"?(.*?)\"?)?$", script, re.MULTILINE))


def test_submit_fills_in_what_was_asked_for(config, capsys):
    words = ["--nodes=6-8", "--gpus-per-node=4", "--spare-nodes=1", "--time=12:00:00"]
    words += ["--account=a", "--sbatch=--constraint=x&y", "--sbatch=--mem=0", "--save-s=100"]
    script = rendered(capsys, config, "run_dir=runs/50%", *words)
    found = options(script)
    wanted = {"nodes": "7-9", "gpus-per-node": "4", "time": "12:00:00", "signal": "B:USR1@100"}
    wanted |= {"account": "a", "constraint": "x&y", "mem": "0", "job-name": "50%"}
    wanted |= {"no-kill": ""} | {
        "output": "runs/50%%/logs/slurm-%j.log",
        "requeue": "",
        "open-mode": "append",
    }
    assert wanted.items() <= found.items()
    for setting in ("MIN_NODES=6", "SPARE_NODES=1", "RANKS_PER_NODE=4", "LEAVE_S=80"):
        assert f"\nexport MEGASCALE_{setting}\n" in script
    assert not Path("runs").exists()
    assert "no-kill" not in options(rendered(capsys, config, *words, "--container=x"))
    assert "no-kill" not in options(rendered(capsys, config, "--nodes=2"))


def test_submit_of_a_sweep_and_of_a_corpus(config, capsys, tmp_path):
    (tmp_path / "list").write_text("seed=1\nseed=2 'run_dir=a b'\n")
    script = rendered(capsys, config, "train.tokens=3000", "--sweep=list")
    assert options(script)["array"] == "0-1" and options(script)["job-name"] == "list"
    assert f"\nset -- {config} list train.tokens=3000\n" in script
    recipe = str(script_path("train").parents[1] / "data/python_stdlib.yaml")
    words = ["--job=prepare", "--nodes=2", "--ranks-per-node=9", "--mpi=pmix", "--name=p"]
    script = rendered(capsys, recipe, *words)
    assert options(script)["ntasks-per-node"] == "9" and options(script)["job-name"] == "p"
    assert "\nexport MEGASCALE_MPI=pmix\n" in script and "signal" not in options(script)
    other = recipe.replace("python_stdlib", "c_headers")
    script = rendered(capsys, recipe, other, "heldout_fraction=0.1", *words)
    assert f"\nset -- {recipe} {other} heldout_fraction=0.1\n" in script
    assert main(["submit", recipe, other, "tokenizer.kind=bpe", "--job=prepare"]) == 2
    assert "vocab_size must be 257 to 4194304" in capsys.readouterr().err


def test_a_run_in_this_folder_has_its_name(config, capsys, tmp_path):
    assert options(rendered(capsys, config, "run_dir=."))["job-name"] == tmp_path.name


@pytest.mark.parametrize(
    ("lines", "overrides", "message"),
    [
        ("seed=1\nseed=2\n", ["run_dir=r"], "lines 1 and 2 have one run_dir, r; give each"),
        ("run_dir=r\nseed=2\nrun_dir=./x/../r/\n", [], "lines 1 and 3 have one run_dir"),
        ("seed=1\nrun_dir=runs/list/0\n", [], "or none anywhere for runs/list/INDEX"),
        ("seed=1\nrun_dir=runs/s/0\n", ["--name=s"], "lines 1 and 2 have one run_dir"),
        ("seed=1\r\nseed=2\r\n", [], "list, line 1 holds a carriage return"),
        ('seed=1\nrun_dir="runs/a\\"b"\n', [], "list, line 2: no closing quotation; pair"),
        ("seed=1\n\nseed=2\n", [], "list, line 2 is empty; every line must hold"),
        ("", [], "list, line 1 is empty"),
    ],
)
def test_bad_sweeps_are_refused(config, capsys, tmp_path, lines, overrides, message):
    (tmp_path / "list").write_bytes(lines.encode())
    assert main(["submit", config, *overrides, "--sweep=list", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1


def test_a_venv_may_be_on_the_nodes_alone(config, capsys, tmp_path):
    (tmp_path / "venv/bin").mkdir(parents=True)
    assert main(["submit", config, "--venv=venv/bin", "--dry-run"]) == 2
    assert "it has no bin/activate" in capsys.readouterr().err
    assert main(["submit", config, "--venv=/node/venv", "--dry-run"]) == 0
    assert "--venv /node/venv is not on this machine" in capsys.readouterr().err
    (tmp_path / "venv/bin/activate").touch()
    assert main(["submit", config, "--venv=venv", "--dry-run"]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes=0"], "write 8, or 6-8"),
        (["--nodes=8-6"], "write 8, or 6-8"),
        (["--nodes=x"], "write 8, or 6-8"),
        (["parallel.tensor=2", "--nodes=1-2"], "must divide the 1 ranks"),
        (["modle.num_layers=3"], "did you mean 'model'"),
        (["--sbatch=constraint"], "--sbatch=--OPTION=VALUE"),
        (["--save-s=soon"], "--save-s must be a whole number"),
        (["--name=a\nb"], "--name 'a\\nb': write a name on one line"),
        (["--name="], "--name '': write a name on one line"),
        (["--account=a\nb"], "--account 'a\\nb': sbatch takes no line breaks"),
        (["run_dir=a\\b"], "run_dir 'a\\\\b': Slurm cannot write a log there"),
        (['run_dir="a\\nb"'], "run_dir = 'a\\nb' is empty or has control characters"),
        (["--gpus-per-node=h100:8"], "--gpus-per-node must be a whole number from 1 to 1024"),
        (["--ranks-per-node="], "--ranks-per-node must be a whole number from 1 to 1024"),
        (["--save-s="], "--save-s must be a whole number from 10 to 65535"),
        (["--spare-nodes", "-1"], "--spare-nodes must be a whole number from 0 to 100000"),
        (["--time=0:03:00"], "--time 0:03:00 leaves nothing beside the 300 s of --save-s"),
        (["--time=6"], "give more than 360 s, or a smaller --save-s"),
        (["--sbatch=--time=60", "--save-s=3540"], "--time 60 leaves nothing"),
        (["--time=soon"], "--time soon: write 90 (minutes)"),
        (["--site=/nope/site.sh"], "--site /nope/site.sh: no file that can be read"),
        (["--site=."], "--site .: no file that can be read"),
        (["--sweep=nowhere"], "No such file"),
        (["--mpi=pmix"], "--mpi goes with --job prepare"),
        (["--job=prepare", "--save-s=60"], "--save-s goes with --job train"),
        (["--job=prepare", "--check=true"], "--check goes with --job train"),
        (["--job=prepare", "--spare-nodes=1"], "--spare-nodes goes with --job train"),
        (["--job=prepare", "--gpus-per-node=1"], "--gpus-per-node goes with --job train"),
        (["--job=prepare", "--sweep=list"], "--sweep goes with --job train"),
        ([], "sbatch is not on this machine"),
    ],
)
def test_bad_input_is_one_line(config, capsys, monkeypatch, words, message):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", config, *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1


def test_what_sbatch_says(config, capsys, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin/sbatch"
    refuse = 'if [ -e refuse ]; then echo "sbatch: error: no" >&2; exit 1; fi'
    sbatch.write_text(f"#!/bin/sh\ncat >script\n{refuse}\necho '77;cluster'\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    assert main(["submit", config, "run_dir=r"]) == 0
    assert capsys.readouterr().out.startswith("job 77 (r), nodes 1:")
    assert (tmp_path / "script").read_text().startswith("#!/usr/bin/env bash\n")
    assert (tmp_path / "r/logs").is_dir()
    (tmp_path / "refuse").touch()
    assert main(["submit", config, "run_dir=r"]) == 2
    assert capsys.readouterr().err == "megascale: sbatch refused the job: no\n"


@pytest.mark.parametrize(("text", "nodes"), [("8", (8, 8)), ("6-8", (6, 8)), (" 1-1 ", (1, 1))])
def test_node_ranges(text, nodes):
    assert node_range(text) == nodes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("60", 3600),
        ("1:30", 90),
        ("1:02:03", 3723),
        ("2-1", 176_400),
        ("2-1:30", 178_200),
        ("2-1:30:05", 178_205),
        ("Unlimited", None),
        ("INFINITE", None),
        ("0", None),  # sbatch: no limit
    ],
)
def test_time_limits(text, seconds):
    assert time_limit_s(text) == seconds


def test_node_checks(tmp_path, monkeypatch):
    beats = []
    fit = check_node(str(tmp_path / "run"), "exit 0", lambda: beats.append(1), "n1")
    assert fit is None and not list((tmp_path / "run").iterdir())
    problem = check_node(str(tmp_path), "echo one; echo two >&2; exit 7", lambda: None, "n1")
    assert problem == "the check failed: two"
    check_node(str(tmp_path), "sleep 0.5", lambda: beats.append(1), "n1")
    assert len(beats) > 2
    monkeypatch.setattr(node_check, "CHECK_TIMEOUT_S", 0.3)
    slow = f"sleep 60 & echo $! >{tmp_path / 'pid'}; wait"
    assert "did not end in 0.3 s" in check_node(str(tmp_path), slow, lambda: None, "n1")
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "pid").read_text())).wait(10)
    (tmp_path / "file").touch()
    assert "Not a directory" in check_node(str(tmp_path / "file/run"), None, lambda: None, "n1")
