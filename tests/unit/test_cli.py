"""The command line: help, exit statuses, one line for bad input, and nothing heavy at start."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from processor_time import processor_s

import megascale
from megascale import cli
from megascale.errors import RankError, UserError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "megatron", "datasets", "matplotlib", "transformers", "tokenizers", "mpi4py")


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "megascale", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=60,
    )


@pytest.fixture
def verb(monkeypatch):
    """`verb(action)`: 'plot' runs `action` in place of its own function."""

    def replace(action):
        provider = types.ModuleType("provider")
        provider.add_stand_in_arguments = lambda parser: parser.add_argument("--rows", type=int)
        provider.run_stand_in = action
        monkeypatch.setitem(sys.modules, "provider", provider)
        monkeypatch.setitem(cli.VERBS, "plot", ("provider:stand_in", "draw curves", "megascale"))

    return replace


def raising(error):
    def action(args):
        raise error

    return action


def test_the_overview_names_every_verb(capsys):
    for words in ([], ["-h"], ["--help"]):
        assert cli.main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {verb} " in shown for verb in cli.VERBS)


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megascale {megascale.__version__}\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert f"usage: megascale {verb}" in shown
    assert cli.VERBS[verb][2].split(" ", 1)[1] in shown


def test_the_examples_name_files_that_exist():
    for _, _, example in cli.VERBS.values():
        for word in example.split():
            if word.startswith(("configs/", "data/")):
                assert (ROOT / word).is_file(), word


def test_help_loads_nothing_heavy():
    script = f"""
import contextlib, sys
from megascale import cli, errors
for verb in cli.VERBS:
    with contextlib.suppress(SystemExit):
        cli.main([*verb.split(), "--help"])
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "[]"


def test_a_family_names_its_verbs(capsys):
    for words in (["infowindow", "-h"], ["infowindow", "--help"]):
        assert cli.main(words) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "usage: megascale infowindow VERB ..."
        assert [line.split()[1] for line in said[2:]] == [
            verb.split()[1] for verb in cli.VERBS if verb.startswith("infowindow ")
        ]


def test_the_overview_is_quick():
    assert run("--help").returncode == 0
    assert processor_s(lambda: run("--help"), repeats=5) < 0.3


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian"], "did you mean 'train'?"),
        (["prepair", "x"], "did you mean 'prepare'?"),
        (
            ["zzz"],
            "verbs: prepare, data check, infowindow train-m1, infowindow compile, infowindow "
            "encode, infowindow decode, infowindow inspect, plan, simulate, hparams steplaw, "
            "hparams growth, calibrate, train, demo, launch, submit, branch, grow, lineage, "
            "experts, import, export, eval, doctor, checkpoint list, checkpoint verify, "
            "checkpoint prune, status, report, plot",
        ),
        (["data"], "'megascale data check corpora/python_stdlib'"),
        (["data", "chekc"], "'megascale data check corpora/python_stdlib'"),
        (["hparams"], "--params 1B --tokens 100B' or 'megascale hparams growth "),
        (["hparam"], "did you mean 'hparams "),
    ],
)
def test_an_unknown_verb_is_answered_with_the_nearest(words, hint, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("megascale: ") and shown.err.count("\n") == 1
    assert hint in shown.err


def test_a_missing_file_is_one_line_and_status_2():
    done = run("plan", "configs/no_such.yaml")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("megascale: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [("plan", "--no-such-option"), ("hparams", "steplaw")])
def test_what_cannot_be_parsed_is_one_line(words):
    done = run(*words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"'megascale {words[0]}" in done.stderr and "--help' says what" in done.stderr


def test_the_status_of_a_verb_is_the_status_of_the_command(verb):
    verb(lambda args: args.rows)
    assert cli.main(["plot", "--rows", "7"]) == 7


def test_options_are_not_abbreviated(verb):
    verb(lambda args: 0)
    assert cli.main(["plot", "--row", "7"]) == 2


@pytest.mark.parametrize(
    ("error", "rank", "shown"),
    [
        (UserError("no such corpus"), None, "megascale: no such corpus\n"),
        (UserError("no such corpus"), "0", "megascale: no such corpus\n"),
        (UserError("no such corpus"), "1", ""),
        (UserError("two\nlines"), None, "megascale: two\\nlines\n"),
        (RankError("disk full"), None, "megascale: disk full\n"),
        (RankError("disk full"), "1", "megascale: rank 1: disk full\n"),
    ],
)
def test_bad_input_is_said_once(verb, monkeypatch, capsys, error, rank, shown):
    verb(raising(error))
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert cli.main(["plot"]) == 2
    assert capsys.readouterr().err == shown


def test_an_interrupt_is_status_130(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["plot"]) == 130
    assert capsys.readouterr().err == ""


def test_a_defect_keeps_its_traceback(verb):
    verb(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["plot"])


@pytest.mark.parametrize("characters", [10, 10**6], ids=["in the buffer", "at once"])
def test_a_reader_that_leaves_is_no_error(characters):
    script = f"""
import sys
from megascale import cli, errors
sys.stdin.read()
cli._overview = lambda: "x" * {characters}
sys.exit(cli.main([]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    process.stdout.close()
    process.stdin.close()  # it prints only now
    assert process.stderr.read() == b""
    assert process.wait(30) == 128 + signal.SIGPIPE


RECIPE, CONFIG = "data/python_stdlib.yaml", "configs/quickstart.yaml"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", CONFIG, "--tokens", "5M"], "train.tokens=5M or eval.tokens=5M"),
        (["train", "--tokens", "5M", CONFIG], "train.tokens=5M or eval.tokens=5M"),
        (["plan", CONFIG, "--tokens=5M"], "train.tokens=5M or eval.tokens=5M"),
        (["train", CONFIG, "--train.tokens", "5M"], "write it as train.tokens=5M\n"),
        (["branch", "run", CONFIG, "--lr=1e-3"], "write it as optim.lr=1e-3\n"),
        (["train", CONFIG, "--global-batch-tokens"], "as data.global_batch_tokens=...\n"),
        (["train", CONFIG, "--num-experts", "--resume", "auto"], "as model.moe.num_experts=...\n"),
        (["prepare", RECIPE, "--heldout-fraction", "0.1"], "as heldout_fraction=0.1\n"),
        (["train", CONFIG, "--frobnicate", "1"], "'megascale train --help' says what would work"),
        (["doctor", "--tokens", "5M"], "'megascale doctor --help' says what would work"),
    ],
)
def test_an_option_that_is_written_as_a_flag_is_suggested(words, said, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "unrecognized argument --" in error


@pytest.mark.parametrize("verb", ["plan", "train", "launch", "calibrate"])
def test_a_recipe_is_not_taken_for_a_config(verb, capsys):
    assert cli.main([verb, RECIPE]) == 2
    error = capsys.readouterr().err
    assert f"'megascale prepare {RECIPE}' makes the corpus" in error and error.count("\n") == 1


def test_a_config_is_not_taken_for_a_recipe(capsys):
    assert cli.main(["prepare", CONFIG]) == 2
    error = capsys.readouterr().err
    assert f"'megascale plan {CONFIG}' shows the run" in error and error.count("\n") == 1
    assert f"'megascale train {CONFIG}'" in error
