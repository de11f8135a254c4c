"""`megascale plan`: what it prints is what will happen, fast, without torch, with clear errors."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from processor_time import processor_s

from megascale.commands.plan import add_plan_arguments, run_plan
from megascale.config import Layout, RunConfig
from megascale.corpus.batches import Cursor, GlobalBatches
from megascale.corpus.run_length import run_length
from megascale.corpus.shards import Shard, writing
from megascale.corpus.sources import SourceInfo
from megascale.errors import UserError
from megascale.model.counts import batch_flops, count_parameters
from megascale.monitor.quantities import show_bytes
from megascale.optim.rank_memory import memory_per_rank
from megascale.optim.schedule import lr_at
from megascale.planner import StepPlan
from megascale.run.describe import describe_run
from megascale.run.resolve import load_run
from megascale.run.step_problem import cost_model, first_step
from megascale.run.warnings import warnings_of

EOD = 256


def write_shard(prefix: Path, lengths: list[int]) -> None:
    """A bare Megatron pair of random documents; each ends with the end-of-document token."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, EOD, sum(lengths)).astype(np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOD
    sizes = np.array(lengths, dtype=np.int32)
    starts = (np.cumsum(sizes, dtype=np.int64) - sizes) * 2
    header = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08"
    header += len(sizes).to_bytes(8, "little") + (len(sizes) + 1).to_bytes(8, "little")
    documents = np.arange(len(sizes) + 1, dtype=np.int64)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    Path(f"{prefix}.idx").write_bytes(
        header + b"".join(a.tobytes() for a in (sizes, starts, documents))
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A small run over two corpora of about 60,000 and 5,000 tokens."""
    lengths = np.random.default_rng(1).lognormal(5, 1.2, 200).astype(int) + 2
    write_shard(tmp_path / "web", lengths.tolist())
    write_shard(tmp_path / "code", [500] * 10)
    text = f"""
run_dir: {tmp_path}/run
model: {{num_layers: 2, hidden_size: 64, num_heads: 4}}
data:
  sources:
    web: {{path: {tmp_path}/web, vocab_size: 257, eod_id: 256}}
    code: {{path: {tmp_path}/code, vocab_size: 257, eod_id: 256}}
  stages:
    - {{tokens: 20000, blend: {{web: 3, code: 1}}}}
    - {{blend: {{web: 1}}}}
  context_tokens: 256
  global_batch_tokens: 4096
train: {{tokens: 50000, precision: fp32}}
eval: {{tokens: 0}}
"""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def plan(config: Path, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_plan_arguments(parser)
    return run_plan(parser.parse_args([str(config), *arguments]))


def printed(label: str, text: str) -> list[str]:
    """Numbers and words after a label at the start of a line."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{label} ")]
    return line.strip().removeprefix(label).split()


def batches_of(run: RunConfig, sources: Mapping[str, SourceInfo]) -> GlobalBatches:
    shards = {name: Shard.open(info.train) for name, info in sources.items()}
    return GlobalBatches(run.data, shards, run.seed)


def dealt(run: RunConfig, sources: Mapping[str, SourceInfo]) -> list[Cursor]:
    """The cursor after each step of a whole run."""
    cursors = [Cursor()]
    while cursors[-1].tokens_seen < run.train.tokens:
        cursors.append(batches_of(run, sources).next(cursors[-1])[1])
    return cursors[1:]


def test_prints_the_numbers_of_the_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config, "optim.lr=1e-3", "--ranks", "4") == 0
    text = capsys.readouterr().out
    run, sources, _ = load_run(config, ["optim.lr=1e-3"])
    layout = Layout.of(run, 4)
    sizes, memory = count_parameters(run.model), memory_per_rank(run, layout)
    assert printed("parameters", text) == [f"{sizes.total:,}"]
    assert printed("without embeddings", text) == [f"{sizes.non_embedding:,}"]
    assert printed("weights", text) == [f"{memory.weights / 2**10:.1f}", "KiB"]
    assert printed("layout", text)[:2] == ["4", "ranks"]
    assert printed("mode", text) == ["free"]
    first = first_step(run, layout, sources)
    *_, end = dealt(run, sources)
    assert f"{end.step} steps of 4,096 tokens to reach 50,000" in text
    assert f"  takes {end.tokens_seen:,} tokens, {end.tokens_seen / end.step:,.0f} in a" in text
    flops = batch_flops(run.model, first.batch.length) / first.batch.num_tokens
    assert printed("FLOPs per token", text)[0] == f"{flops:,.0f}"
    over = first.plan.predicted_s / first.plan.lower_bound_s
    assert f"{over:.3f} x the lower bound" in text
    assert len(re.findall(r"^  rank +\d+ \[", text, re.MULTILINE)) == 4


def test_learning_rates_are_those_of_the_steps(config: Path) -> None:
    resolved = load_run(config, ["optim.warmup_tokens=8000"])
    run, sources, _ = resolved
    text = describe_run(resolved, Layout.of(run, 1))
    rows = re.findall(r"^ +([\d,]+) tokens (\S+) in step (\d+)$", text, re.MULTILINE)
    ends = [cursor.tokens_seen for cursor in dealt(run, sources)]
    assert [row[0] for row in rows] == [f"{ends[0]:,}", "8,000", "50,000"]
    for tokens, lr, step in rows:
        seen = int(tokens.replace(",", ""))
        assert float(lr) == pytest.approx(lr_at(seen, run.optim.schedule), rel=1e-3)
        assert [0, *ends][int(step)] < seen <= ends[int(step)]


def test_epochs_and_stages_are_those_of_the_batches(config: Path) -> None:
    resolved = load_run(config)
    run, sources, _ = resolved
    text = describe_run(resolved, Layout.of(run, 1))
    *_, cursor = dealt(run, sources)
    for name, info in sources.items():
        epochs = cursor.sources[name].tokens / info.train_tokens
        assert printed(name, text)[-2] == f"{epochs:.2f}"
    assert "from 0 tokens: web 75.00%, code 25.00%" in text
    assert "from 20,000 tokens: web 100.00%" in text


def test_default_ranks_are_the_fewest_that_fit(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(config, "parallel.tensor=2", "parallel.pipeline=2")
    text = capsys.readouterr().out
    assert "4 ranks = tensor 2 x pipeline 2 x HDP 1" in text
    assert printed("mode", text) == ["aligned"]
    run, sources, _ = load_run(config)
    fewest = len(first_step(run, Layout.of(run, 1), sources).plan.rings)
    assert printed("pipeline bubble", text)[0] == f"{1 / (fewest + 1):.1%}"


def test_experts_show_active_parameters(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(config, "model.moe={num_experts: 4, top_k: 1}", "parallel.expert=2")
    text = capsys.readouterr().out
    run = load_run(config, ["model.moe={num_experts: 4, top_k: 1}"]).config
    assert printed("active per token", text) == [f"{count_parameters(run.model).active:,}"]
    assert printed("mode", text) == ["lockstep"]


def test_memory_and_layout_are_those_of_the_config(config: Path) -> None:
    resolved = load_run(config, ["model.ffn_hidden_size=16"])  # less than the buffers of rings
    layout = Layout.of(resolved.config, 2)
    text = describe_run(resolved, layout)
    memory = memory_per_rank(resolved.config, layout)
    assert memory.rings > 0
    rings = f"{show_bytes(memory.rings)} (estimate)".split()
    assert printed("buffers of rings", text) == rings
    activations = f"{show_bytes(memory.activations)} (estimate)".split()
    assert printed("activations", text) == activations
    assert "experts over" not in text
    experts = load_run(config, ["model.moe={num_experts: 4, top_k: 1}", "parallel.expert=2"])
    text = describe_run(experts, Layout.of(experts.config, 2))
    assert printed("experts over", text) == ["2", "ranks"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.recompute=full"], "whole layers computed again"),
        (["train.recompute=selective"], "norms, swiglu computed again"),
        (
            ["train.recompute=selective", "train.recompute_parts=[swiglu]"],
            "(estimate), swiglu computed again",
        ),
    ],
)
def test_what_is_computed_again_is_printed(config: Path, overrides: list[str], words: str) -> None:
    resolved = load_run(config, overrides)
    text = describe_run(resolved, Layout.of(resolved.config, 1))
    assert " ".join(printed("activations", text)).endswith(words)


def test_fill_in_the_middle_is_printed(config: Path) -> None:
    fim = (
        "{rate: 0.25, spm: 0.1, block_tokens: 128, prefix_id: 257, suffix_id: 258, middle_id: 259}"
    )
    resolved = load_run(config, ["model.vocab_size=260", f"data.sources.code.fim={fim}"])
    text = describe_run(resolved, Layout.of(resolved.config, 1))
    words = "25.00% of blocks of 128 tokens, 10.00% of these suffix first"
    assert " ".join(printed("fill-in-the-middle:", text)) == words


def test_learning_rates_of_a_long_run_are_below_one_another(config: Path) -> None:
    text = describe_run(load_run(config, ["train.tokens=1T"]), Layout.of(load_run(config)[0], 2))
    rows = [line for line in text.splitlines() if re.search(r"tokens \S+ in step", line)]
    assert len(rows) == 3
    assert len({line.index(" tokens ") for line in rows}) == 1


def test_padding_of_the_allgather_dispatcher_is_charged(config: Path) -> None:
    """Its micro-batches cost their full capacity, whatever they hold."""
    options = "model.moe={num_experts: 4, top_k: 2, dispatcher: %s}"
    packed, padded = (
        cost_model(load_run(config, [options % name])[0]) for name in ("alltoall", "allgather")
    )
    assert padded.ring_s([1], [0]) == pytest.approx(padded.ring_s([], [0]), rel=1e-4)
    assert padded.ring_s([256], [0]) == pytest.approx(packed.ring_s([256], [0]))


def test_writes_the_plan_and_the_picture(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    plan(config, "--ranks", "3", "--json", str(out), "--gantt", str(picture))
    run, sources, _ = load_run(config)
    first = first_step(run, Layout.of(run, 3), sources)
    written = StepPlan.from_json(json.loads(out.read_text()))
    written.check(first.batch.length)
    assert written.digest() == first.plan.digest()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {out}\nwrote {picture}" in capsys.readouterr().out


def test_describing_does_not_touch_the_run_folder(config: Path, tmp_path: Path) -> None:
    plan(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["model.vocab_size=100"], "model.vocab_size = 100 is below .* set model.vocab_size=257"),
        (["data.max_epochs=1"], "'code' would be read .* set data.max_epochs=2"),
        (["--ranks", "0"], "--ranks must be at least 1, not 0"),
        (["parallel.tensor=2", "--ranks", "3"], "must divide the 3 ranks started; start 2"),
        (
            ["--json", "/nonexistent/plan.json"],
            "plan.json: cannot be made: no folder /nonexistent",
        ),
        (["--gantt", "plan.nonsense"], "--gantt plan.nonsense: must end in .png"),
        (["data.sources.web.path=/nonexistent/web"], "/nonexistent/web"),
    ],
)
def test_mistakes_are_one_clear_line(config: Path, arguments: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        plan(config, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["train.tokens=1M"], "source 'web' is read .* times; beyond 4 passes"),
        (["data.stages=[{blend: {web: 1}}]"], "source 'code' is in no blend"),
        (["train.tokens=10000"], r"data.stages\[1\] begins after the end of training"),
        (["data.stages=[{tokens: 9000, blend: {web: 1}}]"], "the last blend goes on"),
        (["model.sliding_window=256"], "model.sliding_window = 256 has no effect"),
        (
            ["planner.chunk_cache=host"],
            "planner.chunk_cache = host has no effect with planner.chunks = 1",
        ),
        (["data.global_batch_tokens=100"], r"= 100 is less than a sequence.* \d+ tokens on av"),
        (
            [
                "data.stages=[{tokens: 9, blend: {web: 1}}, {tokens: 9, blend: {code: 1}}, "
                "{blend: {web: 1}}]"
            ],
            r"data.stages\[1\] of 9 tokens begins and ends inside one step",
        ),
        (["data.global_batch_tokens=100"], "sequences for 64 HDP ranks, so some ranks idle"),
        (["device=cuda", "train.threads=2"], "train.threads has no effect on CUDA"),
        (["device=cpu", "monitor.memory_snapshot=true"], "memory_snapshot has no effect"),
        (["train.tokens=1000"], "train.tokens = 1000 is less than one step of 4096 tokens"),
        (["checkpoint.keep_every_steps=300"], "only steps divisible by both"),
        (["train.stop_after_steps=999"], "has no effect on a run of 13 steps"),
        (["monitor.profile_steps=[20, 30]"], "profile_steps begins after the last step, 13"),
        (["optim.schedule=[{shape: linear, tokens: 60000, lr: 1.0}]"], "at a rate of 0.833"),
        (
            ["optim.warmup_tokens=60000", "optim.lr=1.0"],
            "optim.warmup_tokens = 60000 does not end .* 0.833 of 1; optim.warmup_tokens=500 is",
        ),
        (["eval.tokens=100"], "source 'code' has no held-out documents"),
        (["optim.lr=steplaw"], "learning rate: the Step Law was fitted on 60M to 1.1B parameters"),
        (["data.global_batch_tokens=steplaw"], "global_batch_tokens: the Step Law was fitted on"),
        (["start.optimizer=keep"], "start.optimizer has no effect without start.checkpoint"),
        (["optim.soap_max_dim=64"], "optim.soap_max_dim has no effect with optim.name = adamw"),
    ],
)
def test_oddities_are_warnings(config: Path, overrides: list[str], warning: str) -> None:
    resolved = load_run(config, overrides)
    run, sources, _ = resolved
    text = describe_run(resolved, Layout.of(run, 64))
    assert re.search(f"^warning: .*{warning}", text, re.MULTILINE)
    usual = load_run(config)
    assert not re.search(warning, describe_run(usual, Layout.of(usual.config, 2)))


def test_an_ordinary_run_has_no_warnings(config: Path) -> None:
    run, sources, _ = load_run(config)
    heldout = {"web": True, "code": True}
    length = run_length(batches_of(run, sources), run.train.tokens, Cursor())
    epochs = {"web": 1.0, "code": 4.0}
    assert warnings_of(run, Layout.of(run, 4), epochs, heldout, 50, length) == []
    evaluated = replace(run, eval=replace(run.eval, tokens=100))
    assert warnings_of(evaluated, Layout.of(run, 4), epochs, heldout, 50, length) == []


SCRIPT = """
import argparse, sys
from megascale.commands.plan import add_plan_arguments, run_plan
parser = argparse.ArgumentParser()
add_plan_arguments(parser)
status = run_plan(parser.parse_args())
heavy = {"torch", "megatron", "matplotlib", "datasets", "transformers"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else status)
"""


def test_answers_in_a_second_without_torch(config: Path) -> None:
    def answer() -> None:
        subprocess.run([sys.executable, "-c", SCRIPT, str(config)], check=True, timeout=250)

    assert processor_s(answer) < 2.0  # about 0.5 s


def test_documents_without_an_end_are_a_warning(config: Path, tmp_path: Path) -> None:
    with writing(tmp_path / "endless", np.uint16) as writer:
        for _ in range(100):
            writer.add(np.full(600, 3))
    resolved = load_run(config, [f"data.sources.code.path={tmp_path / 'endless'}"])
    run, sources, _ = resolved
    text = describe_run(resolved, Layout.of(run, 2))
    assert re.search(
        "^warning: source 'code': 100 of 100 documents of train .* do not end", text, re.MULTILINE
    )
