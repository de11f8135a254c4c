"""What fuzzing found in readers of files: each file is read in part, or refused in one line."""

import json
import random
import time
from dataclasses import replace

import numpy as np
import pytest

from megascale.checkpoint import folder as folders
from megascale.cli import main
from megascale.commands.report import render
from megascale.commands.status import _ranks, as_json, shown
from megascale.convert.huggingface.config import model_of, read_config
from megascale.corpus.cache import read_numbers
from megascale.corpus.hugging_face import find_tokenizer
from megascale.errors import UserError
from megascale.launch.driver import _cause
from megascale.monitor.events import read_events
from megascale.monitor.experts import read_shares
from megascale.monitor.metrics import read_rows
from megascale.monitor.rank_states import read_heartbeats
from megascale.monitor.run_curves import load_curves
from megascale.monitor.sessions import Session
from megascale.monitor.story import Story, _overlap, read_story
from megascale.monitor.stragglers import read_slowdowns
from megascale.run.origin import origin_of
from megascale.simulate.lengths import read_lengths

TIME = "2026-11-30T07:15:00+00:00"
START = {"time": TIME, "event": "start", "began": 1796022900.0, "step": 0, "world": 1}
ROW = {"step": 1, "loss": 2.0, "tokens_seen": 10, "tokens_per_s": 5.0, "step_s": 0.1}
BAD_NUMBERS = ["x", None, [1], {"a": 1}, "1e9"]
HUGE = 10**400


def write(path, *rows):
    """Rows as JSON lines; numbers of any size are written out."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00", "x", 5, None, "9" * 5000, "2026-99-01"])
def test_an_event_without_a_moment_is_left_out(tmp_path, moment):
    write(tmp_path / "events.jsonl", START, {**START, "time": moment})
    assert read_events(tmp_path)[0] == START
    read_story_of(tmp_path)


def read_story_of(run):
    """Everything that is shown of a run."""
    story = read_story(run)
    now = START["began"] + 60
    json.dumps(as_json(story, now))
    shown(run, story, now)
    "".join(render(run, story, {}, now))
    return story


@pytest.mark.parametrize("value", [*BAD_NUMBERS, HUGE, -1, 1e300, -HUGE])
@pytest.mark.parametrize("name", ["began", "step", "world"])
def test_a_start_with_a_wrong_number_is_left_out(tmp_path, name, value):
    write(tmp_path / "events.jsonl", START, {**START, name: value})
    assert len(read_story_of(tmp_path).sessions) == 1


@pytest.mark.parametrize("spent", [None, [], "x", {"training": "x"}, {"saving": None}, {"a": HUGE}])
def test_an_account_of_the_wrong_type_is_left_out(tmp_path, spent):
    progress = {"time": TIME, "event": "progress", "step": 3, "spent": spent}
    write(tmp_path / "events.jsonl", START, progress)
    assert read_story_of(tmp_path).sessions[0].last_step == 0


def test_a_rollback_over_more_steps_than_can_be_counted_one_by_one(tmp_path):
    many = 10**15
    rollback = {"time": TIME, "event": "rollback", "step": many, "to_step": 5}
    stop = {"time": TIME, "event": "stop", "step": many, "spent": {"training": 3.0}}
    write(tmp_path / "events.jsonl", START, rollback, stop)
    began = time.process_time()
    story = read_story_of(tmp_path)
    assert time.process_time() - began < 5
    assert story.parts["undone"] == pytest.approx(3.0)


def test_steps_in_any_of_several_ranges_are_counted_once():
    draw = random.Random(0)
    for _ in range(500):
        parts = [range(a := draw.randrange(20), a + draw.randrange(9)) for _ in range(4)]
        whole = range(a := draw.randrange(20), a + draw.randrange(20))
        assert _overlap(parts, whole) == len({s for part in parts for s in part if s in whole})


def test_skipped_and_undone_steps_are_in_one_part_each():
    one = Session(
        0.0, 0.0, 9.0, 1, 0, 9, 9, {"training": 9.0}, frozenset({2, 5}), (range(4, 7),), None
    )
    parts = Story(None, (one,), {}, ()).parts
    assert (parts["skipped"], parts["undone"]) == (1.0, 3.0)
    assert Story(None, (replace(one, undone=()),), {}, ()).parts["skipped"] == 2.0


@pytest.mark.parametrize("step", [*BAD_NUMBERS, True, 1.0, -1, HUGE, 2**60])
def test_a_row_without_a_step_is_left_out(tmp_path, step):
    assert read_rows(write(tmp_path / "metrics.jsonl", ROW, {**ROW, "step": step})) == [ROW]


@pytest.mark.parametrize("value", [*BAD_NUMBERS, HUGE])
@pytest.mark.parametrize("name", ["loss", "tokens_seen", "lr", "eval", "grad_norm", "skipped"])
def test_a_row_with_a_wrong_type_does_not_stop_the_plots(tmp_path, name, value):
    rows = [ROW, {**ROW, "step": 2, "tokens_seen": 20}, {**ROW, "step": 3, name: value}]
    write(tmp_path / "metrics.jsonl", *rows)
    write(tmp_path / "events.jsonl", START)
    curves = load_curves(tmp_path, "run")
    assert curves.columns["loss"][:2].tolist() == [2.0, 2.0]
    assert read_story_of(tmp_path).step in (2, 3)


EXPERTS = {"step": 1, "choices": [4], "share": {"a": [[0.5, 0.5]]}}


@pytest.mark.parametrize(
    "change",
    [{"share": 1}, {"choices": [1, 2]}, {"share": {"a": [[1], [1, 2]]}}, {"share": {"a": "x"}},
     {"share": {"a": []}}, {"choices": None}, {"share": {"a": [[None]]}}, {"choices": [0]}],
)  # fmt: skip
def test_a_row_of_experts_of_another_form_is_left_out(tmp_path, change):
    write(tmp_path / "experts.jsonl", EXPERTS, {**EXPERTS, "step": 2, **change})
    step, sources, shares = read_shares(tmp_path)
    assert (step, sources, shares.shape) == (1, ["a"], (1, 1, 2))


@pytest.mark.parametrize("value", [["x"], [[1]], [], {"a": 1}, None, "ab"])
def test_a_row_of_ranks_of_another_form_is_left_out(tmp_path, value):
    write(
        tmp_path / "ranks.jsonl", {"step": 1, "slowdown": [1, None]}, {"step": 2, "slowdown": value}
    )
    assert read_slowdowns(tmp_path)[0] == [1]


@pytest.mark.parametrize(
    "name", ["quiet_s", "rank", "node", "state", "step", "last", "waits", "calls"]
)
def test_a_rank_of_which_something_is_missing_is_not_shown(tmp_path, name):
    pulse = {"rank": 0, "node": "n", "state": "runs", "phase": "x", "last": "", "calls": 1}
    pulse |= {"waits": False, "quiet_s": 0.5, "step": 4, "memory_mib": 1, "device_mib": 0}
    less = {key: value for key, value in pulse.items() if key != name}
    ranks = [pulse, less, {**pulse, name: {}} if name != "waits" else less, 3]
    (tmp_path / "heartbeats.json").write_text(json.dumps({"time": 5.0, "ranks": ranks}))
    found = read_heartbeats(tmp_path, 6.0)
    assert found["ranks"] == [pulse] and len(list(_ranks(found))) == 2


@pytest.mark.parametrize("told", ["[", '{"ranks": []}', '{"time": "x", "ranks": []}', "[" * 9000,
                                  '{"time": 5.0, "ranks": 3}', '{"time": 5.0}'])  # fmt: skip
def test_heartbeats_that_cannot_be_read_are_none(tmp_path, told):
    (tmp_path / "heartbeats.json").write_text(told)
    assert read_heartbeats(tmp_path, 6.0) is None


@pytest.mark.parametrize(
    "change", [{"error": 7}, {"time": "x"}, {"rank": []}, {"node": {}}, {"x": 1}]
)
def test_a_cause_of_the_wrong_types_is_said_by_the_status_alone(tmp_path, change):
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps({"error": "e", "time": 1.0, "rank": 1, "node": "n", **change}))
    assert _cause(3, path).error == "torchrun ended with status 3"


@pytest.mark.parametrize(
    "line", ["9" * 5000, "0" * 5000, "\xb2", "\u0661", "1e3", "-1", "0", "9" * 14]
)
def test_a_length_that_is_none_is_named(tmp_path, line):
    (tmp_path / "lengths.txt").write_text(f"10\n{line}\n")
    with pytest.raises(UserError, match="line 2 is"):
        read_lengths(str(tmp_path / "lengths.txt"), "")


@pytest.mark.parametrize("name", ["\xb2", "\u0661", "9" * 30, "1e3", "-1"])
def test_a_folder_or_a_word_that_is_no_step_is_passed_over(tmp_path, name):
    for step in ("00000004", name):
        (tmp_path / step).mkdir()
    for file in (folders.LATEST, folders.LEFT):
        (tmp_path / file).write_bytes(name.encode())
    assert folders.own_steps(tmp_path) == [4]
    assert folders.read_latest(tmp_path) is None
    (tmp_path / folders.LEFT).write_text("9" * 5000)
    assert folders.left_behind(tmp_path) == set()


def test_numpy_files_with_a_damaged_header_hold_no_numbers(tmp_path):
    path = tmp_path / "sizes.npy"
    np.save(path, np.arange(9))
    whole = path.read_bytes()
    assert read_numbers(path, 9).tolist() == list(range(9))
    for damaged in (b"", whole[:40], whole.replace(b"}", b"("), whole.replace(b"(9,)", b"(" * 4),
                    whole.replace(b"(9,)", b"10**9"), whole.replace(b"<i8", b"|O8")):  # fmt: skip
        path.write_bytes(damaged)
        assert read_numbers(path) is None


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 257, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}  # fmt: skip
QWEN = LLAMA | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "x"}, {"vocab_size": 1e30}, {"num_hidden_layers": 10**18},
        {"rope_theta": []}, {"rms_norm_eps": "x"},
        {"rope_scaling": {"rope_type": "llama3", "factor": {}}},
        {"num_attention_heads": 0}, {"vocab_size": [3]}, {"model_type": ["llama"]},
        QWEN | {"num_hidden_layers": 10**18}, QWEN | {"decoder_sparse_step": "x"},
        QWEN | {"num_experts_per_tok": None}, QWEN | {"mlp_only_layers": 3},
    ],
)  # fmt: skip
def test_a_model_of_impossible_numbers_is_refused(tmp_path, change):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | change))
    began = time.process_time()
    with pytest.raises(UserError):
        model_of(read_config(tmp_path), path)
    assert time.process_time() - began < 40


@pytest.mark.parametrize("checkpoint", ["a" * 300, "a\0b", "\ud800", 3, "", "a/" * 4000])
def test_a_parent_that_cannot_be_is_no_origin(tmp_path, checkpoint):
    parent = {"checkpoint": checkpoint, "step": 1, "tokens_seen": 2}
    (tmp_path / "lineage.json").write_text(json.dumps({"made_by": "x", "parents": [parent]}))
    assert origin_of(tmp_path) is None


@pytest.mark.parametrize(
    "words", [["data", "check", "."], ["data", "check", ""], ["lineage", "a" * 5000],
              ["status", "a" * 300], ["plan", "a" * 300], ["checkpoint", "list", "a" * 5000]],
)  # fmt: skip
def test_odd_paths_are_refused_in_one_line(capsys, words):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("megascale: ") and len(error.splitlines()) == 1


SIMULATE = ["simulate", "--ranks", "64", "--lengths", "github", "--steps", "1"]


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--steps", "1000000000000000000"], "--steps must be at most 1000"),
        (["--ranks", "4611686018427387904"], "--ranks must be at most 131072"),
        (["--batch-tokens", "1000000000000000000"], "--batch-tokens must be at most"),
        (["--batch-tokens", "1000G", "--budget-s", "0"], "more than 4,194,304 sequences"),
        (["--batch-tokens", "2G"], "sequences in a step are more than 262,144"),
        (["--batch-tokens", "256M", "--steps", "1000"], "more than 2,097,152 sequences"),
    ],
)
def test_a_simulation_of_any_size_ends_in_seconds(capsys, words, problem):
    began = time.process_time()
    assert main([*SIMULATE, *words]) == 2
    assert problem in capsys.readouterr().err
    assert time.process_time() - began < 20


def test_a_batch_of_more_sequences_than_any_run_has_is_refused(tmp_path, capsys):
    from tiny_corpus import tiny_config

    config = tiny_config(tmp_path)
    assert main(["plan", str(config), "data.global_batch_tokens=1000G", "train.tokens=4000T"]) == 2
    assert "set data.global_batch_tokens to" in capsys.readouterr().err


def test_a_tokenizer_for_which_the_library_panics_is_refused(tmp_path):
    from tokenizer_files import byte_bpe

    tree = json.loads(byte_bpe().to_str())
    tree["model"]["continuing_subword_prefix"] = "a prefix longer than every piece"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="not a tokenizer: .*out of range"):
        find_tokenizer(str(tmp_path))


@pytest.mark.parametrize("number", ["1" + "0" * 30, "-" + "9" * 40, "9" * 5000, "1e9", "0x10"])
@pytest.mark.parametrize("option", ["--vocab-size", "--eod-id"])
def test_a_number_of_an_option_that_nobody_can_count_with(capsys, option, number):
    assert main(["data", "check", "missing", f"{option}={number}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megascale: argument {option}: ") and len(error.splitlines()) == 1


@pytest.mark.parametrize("number", ["1" + "0" * 30, "-" + "9" * 40, "9" * 5000, "0x10", "-5"])
def test_tokens_that_nobody_can_count_with(capsys, number):
    assert main(["data", "check", "missing", f"--context={number}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megascale: --context must be ") and len(error.splitlines()) == 1


@pytest.mark.parametrize("number", ["nan", "-nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    "words",
    ["plan --budget-s", "simulate --budget-s", "simulate --network-gbps", "calibrate x --minutes",
     "import x y --tolerance", "export x y --tolerance"],
)  # fmt: skip
def test_a_fraction_of_an_option_is_finite(capsys, words, number):
    assert main(f"{words}={number}".split()) == 2
    error = capsys.readouterr().err
    option = words.split()[-1]
    assert error.startswith(f"megascale: argument {option}: {number} is no finite number; ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("verb", ["plan", "prepare"])
def test_a_file_that_never_ends_is_no_config(verb, capsys):
    assert main([verb, "/dev/zero"]) == 2
    said = capsys.readouterr().err
    assert "/dev/zero: a device where a regular file must be" in said and said.count("\n") == 1
