"""`megascale plan --device`: memory by stage, the parts of a step's time, and changes that fit."""

import argparse
import json
import re
from dataclasses import fields, replace
from math import log2
from pathlib import Path

import numpy as np
import pytest
from test_plan_command import write_shard

from megascale.cli import main
from megascale.commands.plan import add_plan_arguments, run_plan
from megascale.config import Layout, RunConfig
from megascale.devices.memory import (
    FRAGMENTATION,
    fullest,
    most_tokens,
    stage_memories,
    with_capacity,
)
from megascale.devices.rates import KNOWN_ERRORS
from megascale.devices.step_time import StepTime, step_cost
from megascale.devices.table import DEVICES, GIB
from megascale.model.counts import batch_flops, count_rank_parameters, flops_per_token
from megascale.optim.rank_memory import memory_per_rank, stage_memory
from megascale.planner import StepPlan, find_planner, plan_static_best, step_s
from megascale.run.growing import small_and_grown
from megascale.run.on_device import (
    Figures,
    changes_that_fit,
    figures,
    planned_figures,
    static_figures,
)
from megascale.run.resolve import load_run
from megascale.run.step_problem import step_problem

H100 = DEVICES["h100"]
LENGTHS = np.array([16384, 9000, 8192, 4000, 3000, 2500, 900, 700, 300, 120, 50, 20] * 4)
BIG = (
    "model={num_layers: 32, hidden_size: 4096, num_heads: 32, num_kv_heads: 8, "
    "ffn_hidden_size: 14336, vocab_size: 128256, tied_embeddings: false}",
    "data.context_tokens=16Ki",
    "data.global_batch_tokens=64Ki",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small run over a corpus of about 100,000 tokens."""
    lengths = np.random.default_rng(1).lognormal(5, 1.2, 300).astype(int) + 2
    write_shard(tmp_path / "web", lengths.tolist())
    text = f"""
run_dir: {tmp_path}/run
model: {{num_layers: 4, hidden_size: 64, num_heads: 4}}
data:
  sources: {{web: {{path: {tmp_path}/web, vocab_size: 257, eod_id: 256}}}}
  context_tokens: 256
  global_batch_tokens: 4096
train: {{tokens: 1M}}
eval: {{tokens: 0}}
"""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def load(path: Path):
    """The config of the run, with overrides, and its layout on some ranks."""

    def loaded(*overrides: str, ranks: int = 8) -> tuple[RunConfig, Layout]:
        config = load_run(path, overrides).config
        return config, Layout.of(config, ranks)

    return loaded


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    parser = argparse.ArgumentParser()
    add_plan_arguments(parser)
    assert run_plan(parser.parse_args([str(word) for word in words])) == 0
    return capsys.readouterr().out


def row(label: str, text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"  {label} ")]
    return line.removeprefix(f"  {label} ").split()


# --- time ---


def parts_by_hand(config: RunConfig, layout: Layout, plan: StepPlan) -> dict[str, float]:
    """Every second of every rank, ring by ring, from shape and data sheet."""
    model, tensor, pipeline = config.model, layout.tensor, layout.pipeline
    flops_per_s = 989.4e12 * 0.55 * tensor * pipeline
    passes = 4 if config.train.recompute == "full" else 3
    layers, found = model.num_layers / pipeline, dict.fromkeys(PART_NAMES, 0.0)
    node, weights = 8 // tensor, flops_per_token(model, tensor)
    head = 2 * model.vocab_size * model.hidden_size
    for ring in plan.rings:
        lengths = [int(LENGTHS[index]) for index in ring.sequences]
        size, tokens = len(ring.ranks), sum(lengths)
        scores = sum(length * length for length in lengths) / 2
        per_pair = 4 * model.num_layers * model.num_heads * model.head_dim
        attention_s = passes * per_pair * scores / flops_per_s / size
        link = 450e9 if len({rank // node for rank in ring.ranks}) == 1 else 50e9
        passed = passes * 2 * model.num_kv_heads * model.head_dim * 2 * layers / tensor
        passing_s = passed * tokens * (size - 1) / size / (link * 0.8) if size > 1 else 0.0
        residual = model.hidden_size * 2 * (tensor - 1) / tensor
        exchanged = 4 * (passes - 1) * layers * residual
        of_ring = {
            "attention_s": attention_s,
            "linear_s": (passes * (weights - head) + 3 * head) * tokens / size / flops_per_s,
            "exchange_s": exchanged * tokens / size / (450e9 * 0.8),
            "launch_s": 0.3e-3 * layers * passes / 3,
            "ring_s": 0.1e-3 * layers * passes / 3 * log2(size) + max(0.0, passing_s - attention_s),
        }
        for name, seconds in of_ring.items():
            found[name] += seconds * size / plan.num_ranks
    return found


PART_NAMES = ("attention_s", "linear_s", "exchange_s", "launch_s", "ring_s")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.recompute=full",),
        ("parallel.tensor=2",),
        ("parallel.tensor=2", "parallel.pipeline=2"),
        ("parallel.pipeline=4", "planner.capacity_tokens=4Ki"),
    ],
)
def test_the_parts_of_a_step_are_those_of_its_plan_and_add_up_to_it(load, overrides) -> None:
    config, layout = load(*BIG, "planner.capacity_tokens=8Ki", *overrides, ranks=32)
    problem = step_problem(config, layout, LENGTHS, step_cost(config, layout, H100).cost)
    plan = find_planner("hybrid")(problem)
    time = figures(config, layout, H100, plan, problem).time
    by_hand = parts_by_hand(config, layout, plan)
    assert {name: getattr(time, name) for name in by_hand} == pytest.approx(by_hand)
    held = [count_rank_parameters(config.model, layout, one) for one in range(layout.pipeline)]
    parameters = max(one.dense for one in held)
    cards = 8 // layout.tensor if layout.hdp * layout.tensor > 8 else None
    rate = 450e9 * 0.8 if cards is None else cards * 50e9 * 0.8
    spread = (layout.hdp - 1) / layout.hdp if cards is None else 1
    assert time.reduction_s == pytest.approx(parameters * 6 * spread / rate)
    whole_s = step_s(plan, LENGTHS, problem.cost, layout.pipeline) + time.reduction_s
    assert sum(getattr(time, one.name) for one in fields(StepTime)) == pytest.approx(whole_s)
    assert time.total_s == pytest.approx(whole_s) == plan.predicted_s + time.reduction_s
    assert time.imbalance_s >= -1e-9
    assert (time.fill_s > 0) == (layout.pipeline > 1)


def test_imbalance_is_the_wait_for_the_busiest_rank(load) -> None:
    """One sequence that is planned whole: of 8 ranks 7 start an empty micro-batch, and wait."""
    config, layout = load(*BIG, "planner.name=longest_first")
    one = planned_figures(config, layout, H100, [8192], "longest_first").time
    whole_s = one.total_s - one.reduction_s - one.launch_s
    assert one.imbalance_s == pytest.approx(whole_s * 7 / 8)


def test_attention_with_a_window_is_attention(load) -> None:
    config, layout = load(*BIG, "model.sliding_window=1024")
    time = planned_figures(config, layout, H100, LENGTHS, "hybrid").time
    pairs = 4 * 32 * 32 * 128 * 1024
    expected_s = 3 * pairs * LENGTHS.sum() / (989.4e12 * 0.55) / 8
    assert time.attention_s == pytest.approx(expected_s)


def test_padding_of_the_allgather_dispatcher_is_linear_work_of_full_packs(load) -> None:
    moe = "model.moe={num_experts: 4, top_k: 2, dispatcher: %s}"
    packed, padded = (
        planned_figures(*load(moe % name, "parallel.expert=2"), H100, [256] * 8, "hybrid").time
        for name in ("alltoall", "allgather")
    )
    # one full sequence on every rank
    assert padded.linear_s == pytest.approx(packed.linear_s)
    assert padded.exchange_s == pytest.approx(packed.exchange_s)
    assert padded.exchange_s > 0


def test_rates_of_a_whole_run() -> None:
    time = StepTime(1.0, 2.0, 0.0, 0.5, 0.25, 0.25, 0.0, 0.0)
    found = Figures(time, num_tokens=8000, flops=16 * 10**12, world=4, peak_flops_per_s=2e12)
    assert found.tokens_per_s == 2000
    assert found.mfu == pytest.approx(0.5)
    assert found.days(2000 * 86400 * 3) == pytest.approx(3.0)
    assert found.device_hours(2000 * 86400 * 3) == pytest.approx(3 * 24 * 4)


def test_a_measured_cost_takes_the_place_of_the_estimate(load, path, tmp_path, capsys) -> None:
    cost = {"a": 1e-9, "b": 1e-5, "fixed": 0.01, "latency": 0.001, "node_size": 8}
    cost |= {"transfer_intra": 1e-6, "transfer_inter": 2e-6}
    file = tmp_path / "COST.json"
    file.write_text(json.dumps(cost))
    config, layout = load(f"planner.cost={file}")
    given = step_cost(config, layout, H100)
    assert (given.cost.a, given.cost.b, given.per_token.exchange) == (1e-9, 1e-5, 0.0)
    text = printed(capsys, path, f"planner.cost={file}", "--device", "h100", "--ranks", 8)
    assert f"micro-batches as measured ({file})" in text
    assert "calibrated cost)" in text and "not calibrated" not in text


def test_what_is_printed_are_the_figures(load, path, capsys) -> None:
    text = printed(capsys, path, "--device", "h100", "--ranks", 4)
    config, layout = load(ranks=4)
    tokens, sequences = re.search(r"step 0 +([\d,]+) tokens in ([\d,]+)", text).groups()
    assert "estimate, not calibrated: 55% of peak FLOP/s and 80% of the links" in text
    ours, static = row("tokens/s", text)
    step, unit, static_step, _ = row("step", text)
    assert unit == "ms"
    rate = int(tokens.replace(",", "")) / (float(step) / 1e3)
    assert int(ours.replace(",", "")) == pytest.approx(rate, rel=1e-3)
    assert float(row("days to 1,000,000", text)[0]) == pytest.approx(1e6 / rate / 86400, abs=0.006)
    gain = float(row("gain on these lengths", text)[0])
    assert gain == pytest.approx(float(static_step) / float(step), abs=0.006)
    table = text[text.index("where the time of a step goes") :].splitlines()[1:9]
    for column in (-2, -1):
        shares = [float(line.split()[column].rstrip("%")) for line in table]
        assert sum(shares) == pytest.approx(100, abs=0.5)


def test_static_best_is_planned_for_the_same_device_and_lengths(load) -> None:
    config, layout = load(*BIG, "planner.capacity_tokens=4Ki")
    found = static_figures(config, layout, H100, LENGTHS)
    problem = step_problem(config, layout, LENGTHS, step_cost(config, layout, H100).cost)
    expected_s = plan_static_best(problem).predicted_s
    assert found.time.total_s - found.time.reduction_s == pytest.approx(expected_s)
    assert found.flops == batch_flops(config.model, LENGTHS)


def test_a_run_that_grows_has_both_models(load, path, capsys) -> None:
    growth = "growth={at_tokens: 100K, factor: 2}"
    text = printed(capsys, path, growth, "--device", "h100")
    assert re.findall(r"^(before|after) growth$", text, re.MULTILINE) == ["before", "after"]
    assert [one for one in re.findall(r"days to ([\d,]+)", text)] == ["100,000", "1,000,000"]
    _, grown, _ = small_and_grown(load(growth, ranks=1)[0])
    assert grown.model.num_layers == 8
    needed = fullest(grown, Layout.of(grown, 1), H100)
    assert f"fits: {needed / GIB:.1f} GiB of 80.0 GiB" in text[text.index("after growth") :]


# --- memory ---


def test_each_stage_needs_what_is_counted_and_a_named_allowance(load) -> None:
    config, layout = load(*BIG, "parallel.pipeline=4", ranks=16)
    stages = stage_memories(config, layout, H100)
    assert len(stages) == 4
    for stage, needed in enumerate(stages):
        counted = stage_memory(config, layout, stage)
        lost = round(FRAGMENTATION * (counted.activations + counted.rings))
        assert needed.counted == counted
        assert needed.total == counted.total + GIB + 2 * GIB + lost
    assert max(one.counted.total for one in stages) == memory_per_rank(config, layout).total
    alone = stage_memories(*load(ranks=1), H100)
    assert alone[0].messages == 0


@pytest.mark.parametrize("overrides", [(), ("parallel.pipeline=4",), ("train.recompute=full",)])
def test_the_largest_capacity_fits_and_the_next_does_not(load, overrides) -> None:
    config, layout = load(*BIG, "planner.capacity_tokens=1Mi", *overrides, ranks=16)
    tokens = most_tokens(config, layout, H100)
    assert tokens % 128 == 0
    assert fullest(with_capacity(config, tokens), layout, H100) <= H100.memory_bytes
    assert fullest(with_capacity(config, tokens + 128), layout, H100) > H100.memory_bytes


def test_no_capacity_fits_where_weights_do_not(load) -> None:
    config, layout = load(*BIG, ranks=1)
    assert most_tokens(config, layout, DEVICES["a100-40"]) == 0


def test_changes_fit_and_cost_what_a_plan_of_them_says(load) -> None:
    config, layout = load(*BIG, "planner.capacity_tokens=16Ki", ranks=16)
    assert fullest(config, layout, H100) > H100.memory_bytes
    changes = changes_that_fit(config, layout, H100, LENGTHS)
    kinds = {"recompute", "tensor", "capacity_tokens"}
    assert all(any(kind in change.words for change in changes) for kind in kinds)
    for change in changes:
        words = change.words.split()
        ranks = int(words[-1]) if "--ranks" in words else 16
        overrides = [word for word in words if "=" in word]
        changed = load(*BIG, "planner.capacity_tokens=16Ki", *overrides, ranks=ranks)
        assert fullest(*changed, H100) == change.needed <= H100.memory_bytes
        again = planned_figures(*changed, H100, LENGTHS, "hybrid")
        assert again.time.total_s == pytest.approx(change.figures.time.total_s)
    seconds = [change.figures.time.total_s for change in changes]
    assert seconds == sorted(seconds)


def test_offload_is_listed_only_where_it_saves_time(load) -> None:
    """It makes rings of long sequences smaller. Short sequences need no ring."""
    big = (*BIG, "data.context_tokens=64Ki", "planner.capacity_tokens=16Ki")
    config, layout = load(*big, ranks=64)
    slow = replace(H100, inter_bytes_per_s=5e9)
    for lengths, saves in (([65536] * 20 + [3000] * 500, True), ([500] * 64, False)):
        changes = changes_that_fit(config, layout, slow, lengths)
        seconds = {"host_copy" in one.words: one.figures.time.total_s for one in changes
                   if "capacity_tokens" in one.words}  # fmt: skip
        assert (True in seconds) == saves
        assert False in seconds
        assert not saves or seconds[True] < seconds[False]


def test_where_one_change_is_not_enough_two_are_tried(load) -> None:
    """On one device 8B has 144 GB of weights, gradients and optimizer alone."""
    config, layout = load(*BIG, ranks=1)
    changes = changes_that_fit(config, layout, H100, LENGTHS)
    assert changes
    assert all("--ranks" in change.words for change in changes)


def test_no_change_is_listed_that_does_not_fit(load) -> None:
    tiny = replace(H100, memory_bytes=GIB)
    assert changes_that_fit(*load(*BIG), tiny, LENGTHS) == []


def test_what_is_printed_of_memory(load, path, capsys) -> None:
    text = printed(capsys, path, *BIG, "parallel.pipeline=2", "--ranks", 16, "--device", "h100")
    config, layout = load(*BIG, "parallel.pipeline=2", ranks=16)
    stages = stage_memories(config, layout, H100)
    for stage, needed in enumerate(stages):
        (line,) = re.findall(rf"^  stage {stage} +(\S+ GiB, .*)$", text, re.MULTILINE)
        assert line.startswith(f"{needed.total / GIB:.1f} GiB, ")
        assert ("does" in line) == (needed.total > H100.memory_bytes)
    assert "does not fit" in text and "changes that fit" in text
    small = printed(capsys, path, "--device", "cpu", "--ranks", 2)
    assert "memory on cpu           fits:" in small
    assert "changes that fit" not in small
    most = most_tokens(*load(ranks=2), DEVICES["cpu"])
    assert f"largest capacity      {most:,} tokens would fit" in small


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "h10"], "--device h10: not in the table"),
        (["--device", "/nowhere/d.yaml"], "--device /nowhere/d.yaml: No such file"),
    ],
)
def test_bad_input_is_one_clear_line(path, words, said, capsys) -> None:
    assert main(["plan", str(path), *words]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert len(errors.splitlines()) == 1


def test_a_device_needs_a_config(tmp_path, capsys) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("5\n")
    words = ["--lengths", str(lengths), "--ranks", "2", "--capacity", "8", "--device", "h100"]
    assert main(["plan", *words]) == 2
    assert "--device goes with CONFIG" in capsys.readouterr().err


def test_the_known_error_is_that_of_the_published_steps(load, monkeypatch, capsys) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "tools"))
    bench = __import__("bench_devices")
    bench.bench_devices([])
    text = capsys.readouterr().out
    errors = [float(found) for found in re.findall(r"([+-][\d.]+)%", text)]
    for has_experts, found in ((False, errors[:6]), (True, errors[6:])):
        known = KNOWN_ERRORS["h100", has_experts]
        assert [min(found), max(found)] == pytest.approx(
            [known.least * 100, known.most * 100], abs=0.5
        )
    kept = json.loads((root / "configs/results/devices.json").read_text())
    assert [row["error"] * 100 for row in kept] == pytest.approx(errors, abs=0.1)


def test_an_error_is_printed_only_where_it_is_known(path, capsys) -> None:
    said = "against published steps"
    assert said in printed(capsys, path, "--device", "h100")
    assert said not in printed(capsys, path, "--device", "h200")
    assert said not in printed(capsys, path, "train.precision=fp32", "--device", "h100")
    experts = printed(capsys, path, "model.moe={num_experts: 2}", "--device", "h100")
    assert "-53% against published steps of GPT-OSS 120B" in experts
