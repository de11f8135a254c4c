"""`megascale plan CONFIG --lengths`: a run is planned although none of its corpora is there."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_plan_command import write_shard

from megascale.cli import main
from megascale.commands.plan import add_plan_arguments, run_plan
from megascale.planner import StepPlan
from megascale.run.without_corpus import load_drawn_run
from megascale.simulate.lengths import DISTRIBUTIONS, sample_pieces


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run of two corpora that do not exist."""
    text = f"""
run_dir: {tmp_path}/run
model: {{num_layers: 2, hidden_size: 64, num_heads: 4, vocab_size: 1000}}
data:
  sources: {{web: {{path: {tmp_path}/none}}, code: {{path: {tmp_path}/nothing}}}}
  context_tokens: 256
  global_batch_tokens: 8192
train: {{tokens: 1M}}
"""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    parser = argparse.ArgumentParser()
    add_plan_arguments(parser)
    assert run_plan(parser.parse_args([str(word) for word in words])) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_batch_is_drawn_from_a_distribution(path: Path, name: str) -> None:
    run = load_drawn_run(path, ["data.context_tokens=4096"], name, {})
    assert run.batch.num_tokens == 8192
    assert run.batch.length.max() <= 4096
    assert run.length.num_steps == 123  # 1,000,000 / 8,192, up
    again = load_drawn_run(path, ["data.context_tokens=4096"], name, {})
    other = load_drawn_run(path, ["data.context_tokens=4096", "seed=5"], name, {})
    assert np.array_equal(run.batch.length, again.batch.length)
    assert not np.array_equal(run.batch.length, other.batch.length)


def test_long_documents_are_cut_into_pieces_as_in_training() -> None:
    """700 tokens at a context of 256 are 256, 256, 188: two of three pieces are full."""
    lengths = sample_pieces([700], 3_000_000, 256, 0)
    assert set(lengths[:-1]) == {256, 188}
    assert (lengths == 256).mean() == pytest.approx(2 / 3, abs=0.02)
    assert lengths.sum() == 3_000_000


def test_a_giant_document_takes_no_memory() -> None:
    assert sample_pieces([2**40], 1000, 10, 0).tolist() == [10] * 100


def test_lengths_of_files_and_corpora(path: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "own", [100] * 20)
    file = tmp_path / "lengths.txt"
    file.write_text("100\n" * 20)
    for spec in (f"corpus:{tmp_path}/own", f"file:{file}", str(file)):
        batch = load_drawn_run(path, [], spec, {}).batch
        assert set(batch.length[:-1]) == {100}


def test_the_whole_plan_is_printed(path: Path, capsys, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = ["--lengths", "github", "--ranks", 4, "--device", "a100-40", "--json", out]
    text = printed(capsys, path, *words)
    assert "123 steps of 8,192 tokens to reach 1,000,000" in text
    assert "drawn from github, seed 1234; no source is read" in text
    assert re.search(r"^time on a100-40 +estimate", text, re.MULTILINE)
    assert "stage 0                 from 0 tokens" not in text
    assert "web 50.00%, code 50.00%" in text
    assert "no held-out documents" not in text
    batch = load_drawn_run(path, [], "github", {}).batch
    StepPlan.from_json(json.loads(out.read_text())).check(batch.length)


def test_token_counts_take_the_place_of_shards(path: Path, capsys) -> None:
    words = ["--lengths", "web", "--source-tokens", "web=300K,code=100K"]
    text = printed(capsys, path, *words)
    assert "web 75.00%, code 25.00%" in text
    for name, count in (("web", 300_000), ("code", 100_000)):
        (epochs,) = re.findall(rf"{name} +{count:,} tokens \(given\), read ([\d.]+) times", text)
        assert float(epochs) == pytest.approx(2.5, abs=0.05)
    many = printed(capsys, path, "--lengths", "web", "--source-tokens", "web=30K,code=10K")
    assert "source 'web' is read 25" in many


def test_a_config_without_sources_is_enough(path: Path, capsys) -> None:
    text = printed(capsys, path, "data.sources={}", "--lengths", "code")
    assert "documents 100.00%" in text


def test_a_start_that_is_not_there_is_a_warning(path: Path, tmp_path: Path, capsys) -> None:
    words = [f"start.checkpoint={tmp_path}/model", "data.replay_fraction=0.05"]
    text = printed(capsys, path, *words, "--lengths", "web")
    assert re.search(r"^warning: start.checkpoint = .*/model is not there", text, re.MULTILINE)


def test_nothing_is_written_and_torch_is_not_needed(path: Path, tmp_path: Path) -> None:
    script = """
import sys
from megascale.cli import main
status = main(sys.argv[1:])
heavy = {"torch", "megatron", "matplotlib"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else status)
"""
    before = sorted(tmp_path.rglob("*"))
    words = ["plan", str(path), "--lengths", "github", "--device", "h100"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--lengths", "gihub"],
            "no such file (did you mean github?); give one, corpus:FOLDER, or",
        ),
        ([], "prepare data/python_stdlib.yaml; or plan without it, with --lengths web"),
        (["start.checkpoint=none"], "checkpoint; or plan without it, with --lengths web"),
        (["--lengths", "corpus:/nowhere"], "no corpus there"),
        (["--lengths", "file:/nowhere"], "--lengths file:/nowhere: No such file"),
        (["--lengths", "web", "model={}"], "set model.vocab_size="),
        (["--lengths", "web", "--source-tokens", "web=5"], "give code=TOKENS too"),
        (["--lengths", "web", "--source-tokens", "book=5"], "no source of the config"),
        (["--lengths", "web", "--source-tokens", "web"], "write each source once"),
        (["--lengths", "web", "--source-tokens", "web=1,web=2"], "write each source once"),
        (["--lengths", "web", "--source-tokens", "web=0,code=1"], "must be at least 1"),
        (["--source-tokens", "web=5,code=1"], "--source-tokens goes with CONFIG and --lengths"),
        (["--lengths", "web", "--pp", "2"], "--pp goes with --lengths FILE without CONFIG"),
        (["--lengths", "web", "data.context_tokens=4Gi"], "must be at most 2147483647"),
        (
            ["--lengths", "web", "--source-tokens", "web=1K,code=1K", "data.max_epochs=2"],
            "set data.max_epochs=",
        ),
        (["--lengths", "web", "--ranks", "0"], "--ranks must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(path: Path, words: list[str], said: str, capsys) -> None:
    assert main(["plan", str(path), *words]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert len(errors.splitlines()) == 1
