"""From bytes to M1 to windows to a model: the whole way, through the loop that all runs take."""

import json
import math
import os
import shlex
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from crash_drill import curve
from test_train import command
from tiny_corpus import tiny_config
from toy_m1 import small_book

from megascale.cli import main
from megascale.config import load_config
from megascale.corpus.shards import Shard
from megascale.errors import UserError
from megascale.infowindow.m1 import M1
from megascale.training.byte_model import write_config

TINY = ("train.tokens=6000", "eval.tokens=1M", "checkpoint.save_every_steps=2")
SMALL = ("train.tokens=20K", "data.global_batch_tokens=4Ki", "train.threads=1")


def corpus(folder, name, *words):
    """A prepared corpus of some texts."""
    lines = [f"line {i % 97} of text {i % 13}, {'word ' * (i % 29)}\n" for i in range(4000)]
    texts = ["".join(lines[i : i + 40]) for i in range(0, len(lines), 40)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(rows)
    (folder / "recipe.yaml").write_text(
        "name: x\nheldout_fraction: 0.1\n"
        f"inputs: [{{kind: jsonl, paths: ['{folder}/texts.jsonl']}}]\n"
    )
    made = folder / name
    status = main(["prepare", str(folder / "recipe.yaml"), "--out", str(made), *words])
    assert status == 0
    return made


def test_m1_trains_freezes_and_answers_as_its_run(ranks, tmp_path):
    text, out = corpus(tmp_path, "bytes", "--processes", "1"), tmp_path / "m1"
    words = ("infowindow", "train-m1", text, "--out", out, "--shape", "small", *SMALL)
    ((status, said),) = ranks(1, command, *words)
    assert status == 0 and "246,336 parameters" in said, said
    model = M1.open(out / "m1.safetensors")
    assert model.shape.context_bytes == 255 and model.shape.vocab_size == 257
    (pieces,) = (out / "pieces-256").iterdir()
    shard = Shard.open(pieces / "heldout")
    assert shard.lengths.min() >= 2 and shard.lengths.max() <= 256
    whole = Shard.open(text / "heldout")
    assert shard.num_tokens - shard.num_documents == whole.num_tokens - whole.num_documents
    # the frozen model predicts the held-out pieces as well as the run says it does
    pieces = [shard.read(i) for i in range(shard.num_documents)]
    weights = model.weights_along([piece[:-1].astype(np.uint8).tobytes() for piece in pieces])
    loss = sum(
        -np.log(w[np.arange(len(p)), p] / w.sum(axis=1)).sum() for w, p in zip(weights, pieces)
    ) / sum(map(len, pieces))
    rows = map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())
    scores = [row["eval"] for row in rows if "eval" in row][-1]
    assert loss == pytest.approx(scores["0_bytes"]["loss"], rel=2e-3)
    # once more: nothing is left to train
    ((status, again),) = ranks(1, command, *words)
    assert status == 0 and again.splitlines()[-1] == said.splitlines()[-1]


def test_a_run_that_was_stopped_is_not_frozen(ranks, tmp_path):
    text, out = corpus(tmp_path, "bytes", "--processes", "1"), tmp_path / "m 1"
    words = ("infowindow", "train-m1", text, *SMALL, "--out", out, "--shape", "small")
    ((status, said),) = ranks(1, interrupted_command, out / "run", *words)
    assert status == 1 and not (out / "m1.safetensors").exists()
    again = shlex.join(["megascale", *map(str, words)])
    assert "stopped by a signal" in said and again in said.splitlines()[-1]
    ((status, said),) = ranks(1, command, *shlex.split(again)[1:])
    assert status == 0 and M1.open(out / "m1.safetensors").num_parameters == 246_336


def interrupted_command(run, *words):
    """Like `command`, with a Ctrl-C once there are steps."""
    metrics = run / "metrics.jsonl"

    def interrupt():
        while not metrics.exists() or not metrics.read_bytes().splitlines():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    return command(*words)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A prepared corpus of bytes."""
    return corpus(tmp_path_factory.mktemp("texts"), "bytes", "--processes", "1")


def sources_of(out):
    """The shards that a run of M1 reads."""
    sources = load_config(out / "m1.yaml").data.sources
    return {name: Shard.open(one.path) for name, one in sources.items()}


def test_corpora_of_one_name_are_all_read(texts, tmp_path):
    (tmp_path / "b").mkdir()
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "one.txt").write_text("another text altogether " * 50)
    recipe.write_text(
        f"name: x\nheldout_fraction: 0\ninputs: [{{kind: files, paths: ['{tmp_path}/one.txt']}}]\n"
    )
    other = tmp_path / "b" / "bytes"
    assert main(["prepare", str(recipe), "--out", str(other), "--processes", "1"]) == 0
    write_config([texts, other], tmp_path / "m1", "small")
    found = sources_of(tmp_path / "m1")
    assert list(found) == ["0_bytes", "1_bytes"]
    sizes = [shard.num_tokens - shard.num_documents for shard in found.values()]
    whole = [Shard.open(folder / "train") for folder in (texts, other)]
    assert sizes == [shard.num_tokens - shard.num_documents for shard in whole]
    # prepared again from another text: cut again
    (tmp_path / "one.txt").write_text("short")
    assert main(["prepare", str(recipe), "--out", str(other), "--processes", "1", "--force"]) == 0
    write_config([texts, other], tmp_path / "m1", "small")
    shard = sources_of(tmp_path / "m1")["1_bytes"]
    assert shard.num_tokens - shard.num_documents == len("short")


def test_pieces_are_cut_for_the_context_in_force(texts, tmp_path):
    longest = {}
    for context in (64, 256):
        write_config([texts], tmp_path, "small", [f"data.context_tokens={context}"])
        longest[context] = sources_of(tmp_path)["0_bytes"].lengths.max()
    assert longest[64] <= 64 and 200 < longest[256] <= 256


def test_the_written_config_is_that_of_the_run(texts, tmp_path):
    words = ["train.tokens=200M", "optim.lr=6e-3", "data.context_tokens=128"]
    write_config([texts], tmp_path, "small", [*words, "train.stop_after_steps=1"])
    config = load_config(tmp_path / "m1.yaml")
    assert (config.train.tokens, config.optim.lr) == (200_000_000, 6e-3)
    assert config.train.stop_after_steps is None and config.train.precision == "fp32"
    assert config.data.context_tokens == 128
    assert "pieces-128" in config.data.sources["0_bytes"].path


@pytest.mark.parametrize("name", ["x #y", "a: b", "q'uote", "tëxt"])
def test_any_name_of_a_folder_will_do(texts, tmp_path, name):
    copy = tmp_path / "c" / name
    shutil.copytree(texts, copy)
    write_config([copy], tmp_path / name, "small")
    assert load_config(tmp_path / name / "m1.yaml").run_dir == str(tmp_path / name / "run")
    assert list(sources_of(tmp_path / name)) == [f"0_{name}"]


@pytest.mark.parametrize(
    "word, said",
    [
        ("data.context_tokens=4Ki", "data.context_tokens = 4096 must be from 16 to 2048"),
        ("data.context_tokens=8", "data.context_tokens = 8 must be from 16 to 2048"),
        ("model.ffn_hidden_size=4096", "sizes up to 2048 and a vocabulary of 257 can be frozen"),
        ("model.qk_norm=true", "model.qk_norm is not among what can be frozen; leave it out"),
        ("model.rope_scaling={}", "model.rope_scaling is not among what can be frozen"),
        ("run_dir=elsewhere", "run_dir=elsewhere: the run lies below --out; leave run_dir out"),
    ],
)
def test_what_cannot_be_frozen_is_not_trained(texts, tmp_path, capsys, word, said):
    words = ["--out", str(tmp_path), "--shape", "small"]
    assert main(["infowindow", "train-m1", str(texts), word, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_places_that_will_not_do_are_named(texts, tmp_path):
    there, out = tmp_path / "file", tmp_path / "m1"
    there.write_text("x")
    with pytest.raises(UserError, match="m1.safetensors: cannot be made: .*/file is no folder"):
        write_config([texts], there, "small")
    out.mkdir()
    (out / "pieces-256").write_text("x")
    with pytest.raises(UserError, match="pieces-256.*; choose another --out"):
        write_config([texts], out, "small")
    with pytest.raises(UserError, match="none/corpus.json: no such file or directory"):
        write_config([tmp_path / "none"], out, "small")


def test_m1_learns_from_bytes_alone(ranks, tmp_path):
    text = corpus(tmp_path, "bpe", "tokenizer={kind: bpe, vocab_size: 300}")
    words = ("infowindow", "train-m1", text, "--out", tmp_path / "m1")
    ((status, said),) = ranks(1, command, *words)
    assert status == 2 and "M1 learns from bytes, and this is a corpus of bpe" in said


def test_m1_of_several_ranks_is_a_run_like_any_other(ranks, tmp_path):
    words = ("infowindow", "train-m1", tmp_path, "--out", tmp_path / "m1")
    for status, said in ranks(2, command, *words):
        assert status == 2 and (not said or "train-m1 is for one process; for more, call" in said)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """A config that trains on windows in tokens of 8 bits."""
    folder = tmp_path_factory.mktemp("windows")
    small_book().save(folder / "b16")
    made = corpus(folder, "text", f"--tokenizer=infowindow:{folder / 'b16'}", VOCABULARY)
    data = f"\n  sources: {{text: {{path: {made}}}}}\n  context_tokens: 128\n"
    return tiny_config(folder, data=f"{data}  global_batch_tokens: 1024"), made


VOCABULARY = "tokenizer.vocab_size=256"


def test_windows_train_resume_and_are_judged_by_bytes(ranks, windows, tmp_path):
    config, made = windows
    runs = {}
    for name, world, stops in (("one", 1, ()), ("two", 2, ("train.stop_after_steps=4",))):
        run = tmp_path / name
        words = ("train", config, f"run_dir={run}", *TINY)
        for more in ([stops] if stops else []) + [("--resume", "auto")]:
            answers = ranks(world, command, *words, *more)
            assert answers[0][0] == 0, answers[0][1]
        runs[name] = curve(run)
    assert runs["one"].keys() == runs["two"].keys() and len(runs["one"]) == 6
    for step, row in runs["one"].items():
        assert runs["two"][step]["loss"] == pytest.approx(row["loss"], rel=1e-4)
    score = [row["eval"]["text"] for row in runs["one"].values() if "eval" in row][-1]
    tokens, sizes = Shard.open(made / "heldout"), np.load(made / "heldout.bytes.npy")
    assert tokens.num_tokens == score["tokens"]
    bits = score["loss"] * score["tokens"] / math.log(2) / sizes.sum()
    assert score["bits_per_byte"] == pytest.approx(bits)


def test_a_branch_goes_on_with_windows(ranks, windows, tmp_path):
    config, _ = windows
    first, more = tmp_path / "first", ("train.tokens=3000", "eval.every_steps=0")
    ((status, said),) = ranks(1, command, "train", config, f"run_dir={first}", *more)
    assert status == 0, said
    words = ("branch", first, config, f"run_dir={tmp_path / 'second'}", *more)
    ((status, said),) = ranks(1, command, *words)
    assert status == 0 and "source 'text' goes on after" in said, said
