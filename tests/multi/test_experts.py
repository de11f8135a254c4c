"""A run with experts: what it records, how it resumes, and what `megascale experts` shows."""

import json

import numpy as np
import pytest
from test_train import command
from tiny_corpus import EOD, VOCAB, rows, tiny_config, write_tiny_corpus

MOE = ("model.moe.num_experts=4", "monitor.log_every_steps=5")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two sources, one of them of no more than a tenth."""
    folder = tmp_path_factory.mktemp("corpus")
    prefix = write_tiny_corpus(folder / "other", files=10)
    source = (
        f"{{path: {prefix}, heldout: {folder}/other/heldout, vocab_size: {VOCAB}, eod_id: {EOD}}}"
    )
    path = tiny_config(folder)
    text = path.read_text().replace("  sources:\n", f"  sources:\n    other: {source}\n")
    path.write_text(text)
    return path


@pytest.mark.parametrize("estimate", ["trend", "previous", "exact"])
def test_a_run_records_its_experts_and_resumes_bit_equal(ranks, config, tmp_path, estimate):
    words = (
        "train",
        config,
        *MOE,
        "model.moe.balance_weight=0.1",
        f"model.moe.estimate={estimate}",
        "train.tokens=16000",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ranks(2, command, *words, f"run_dir={whole}")[0][0] == 0
    assert ranks(2, command, *words, f"run_dir={parts}", "train.stop_after_steps=6")[0][0] == 0
    status, said = ranks(2, command, *words, f"run_dir={parts}", "--resume", "latest")[0]
    assert status == 0, said
    curves = [
        [
            (row["step"], row["loss"], row["balance_loss"])
            for row in rows(run / "metrics.jsonl")
            if "loss" in row
        ]
        for run in (whole, parts)
    ]
    assert curves[0] == curves[1] and len(curves[0]) > 10
    assert all(0.9 < balance < 4 for _, _, balance in curves[0])
    recorded, joined = rows(whole / "experts.jsonl"), rows(parts / "experts.jsonl")
    assert recorded == [row for row in joined if row["step"] != 6]  # the end of the first part
    shares = np.array(recorded[-1]["share"]["tiny"])
    assert shares.shape == (2, 4) and shares.sum(axis=1) == pytest.approx(1.0, abs=1e-4)
    steps = {row["step"]: row for row in rows(whole / "metrics.jsonl") if "loss" in row}
    for row in recorded:
        assert sum(row["choices"]) == 2 * steps[row["step"]]["num_tokens"]


@pytest.mark.parametrize("kind", ["balance=global", "balance=loss_free"])
def test_a_run_goes_on_on_any_number_of_ranks(ranks, config, tmp_path, kind):
    """The loads of the batches before, and the biases, go with it."""
    words = ("train", config, *MOE, f"model.moe.{kind}", "train.tokens=10000")
    assert ranks(1, command, *words, f"run_dir={tmp_path / 'whole'}")[0][0] == 0
    parts = (*words, f"run_dir={tmp_path / 'parts'}", "--resume", "auto")
    for world, more in (
        (2, ("parallel.expert=2", "train.stop_after_steps=3")),
        (3, ("train.stop_after_steps=6",)),
        (4, ("parallel.expert=2", "parallel.pipeline=2")),
    ):
        status, said = ranks(world, command, *parts, *more)[0]
        assert status == 0, said
    whole, joined = (
        [(row["loss"], row["balance_loss"]) for row in rows(path) if "loss" in row]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "parts/metrics.jsonl")
    )
    np.testing.assert_allclose(joined, whole, rtol=1e-4)


def test_experts_of_a_checkpoint_are_shown(ranks, config, tmp_path):
    run = tmp_path / "run"
    words = ("train", config, *MOE, "train.tokens=8000", f"run_dir={run}")
    assert ranks(1, command, *words)[0][0] == 0
    pictures = {}
    for world in (1, 2):
        out = tmp_path / str(world)
        status, said = ranks(world, command, "experts", run, "--out", out)[0]
        assert status == 0, said
        assert "held-out text of other, tiny" in said and "layer  busiest" in said
        assert (out / "experts_heldout.png").stat().st_size > 5000
        pictures[world] = json.loads((out / "experts_heldout.json").read_text())
    assert pictures[1] == pictures[2]
    checkpoint = max(run.glob("checkpoints/*/manifest.json")).parent
    status, said = ranks(1, command, "experts", checkpoint, "--out", tmp_path / "one")[0]
    assert status == 0, said
    assert json.loads((tmp_path / "one" / "experts_heldout.json").read_text()) == pictures[1]
    status, said = ranks(1, command, "experts", checkpoint, "--step", "3")[0]
    assert status == 2 and "--step 3: " in said and "is one checkpoint, leave it out" in said
    assert set(pictures[1]["share"]) == {"other", "tiny"}
    for bad, problem in (
        (("--step", "x"), "--step x: give the number of a step"),
        (("--step", "99"), "holds no checkpoint of step 99; there are: "),
        (("eval.tokens=0",), "no source has held-out text"),
    ):
        status, said = ranks(1, command, "experts", run, *bad)[0]
        assert status == 2 and problem in said, said


def test_a_model_without_experts_is_refused(ranks, config, tmp_path):
    run = tmp_path / "run"
    words = ("train", config, "train.tokens=2000", f"run_dir={run}")
    assert ranks(1, command, *words)[0][0] == 0
    status, said = ranks(1, command, "experts", run)[0]
    assert status == 2 and "its model has no experts" in said


FEW = ("data.global_batch_tokens=8", "data.context_tokens=8", "train.tokens=120")


def test_more_experts_than_tokens_and_sources_without_any(ranks, config, tmp_path):
    """Batches of 8 tokens of which some have none of a source, on ranks that run padding."""
    words = ("train", config, *MOE, "model.moe.num_experts=16", "eval.every_steps=0", *FEW)
    curves = []
    for world, more in ((1, ()), (2, ()), (2, ("parallel.expert=2",))):
        run = tmp_path / str(len(curves))
        status, said = ranks(world, command, *words, *more, f"run_dir={run}")[0]
        assert status == 0 and "warning" not in said, said
        steps = [row for row in rows(run / "metrics.jsonl") if "loss" in row]
        curves.append([(row["loss"], row["balance_loss"]) for row in steps])
        assert all(0 < row["dead_experts"] < 2 * 16 for row in steps)
        assert 0 in {choices for row in rows(run / "experts.jsonl") for choices in row["choices"]}
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-4)


def test_routing_that_collapses_is_named_and_goes_on(ranks, config, tmp_path):
    """Biases that leap by more than any probability send all tokens to the same two experts,
    which one of the ranks holds."""
    free = ("model.moe.balance=loss_free", "model.moe.bias_rate=10", "parallel.expert=2")
    run = tmp_path / "run"
    words = ("train", config, *MOE, *free, "train.tokens=14000", f"run_dir={run}")
    status, said = ranks(2, command, *words)[0]
    assert status == 0, said
    warning = "routing has collapsed in layer 1, 2: for 10 steps"
    assert said.count("warning: ") == 1 and f"warning: step 11: {warning}" in said
    [event] = [row for row in rows(run / "events.jsonl") if row["event"] == "routing"]
    assert event["step"] == 11 and event["problem"].startswith(warning)
    steps = [row for row in rows(run / "metrics.jsonl") if "loss" in row]
    assert len(steps) > 12
    for row in steps[1:]:  # the first begins even
        assert row["max_violation"] > 0.6 and row["loss"] < 10


def command_with_broken_routers(broken, *words):
    """Like `command`, with logits that are not numbers in some steps of rank 1; also the states
    of the routers after each step, and whether the loads of the batch before are among them."""
    import torch

    from megascale.model.balance import BalancedRouter
    from megascale.training import loop

    honest_gating, honest_step = BalancedRouter.gating, loop.train_step
    calls, states = [], []

    def gating(router, x):
        logits = honest_gating(router, x)
        bad = len(calls) in broken and torch.distributed.get_rank() == 1
        return logits * float("nan") if bad else logits

    def step(learner, *args, **kwargs):
        calls.append(1)
        result = honest_step(learner, *args, **kwargs)
        buffers = dict(learner.model.chunks[0].named_buffers())
        kept = ("load_E", "earlier_E", "bias_E")
        states.append({k: v.tolist() for k, v in buffers.items() if k.endswith(kept)})
        return result

    BalancedRouter.gating, loop.train_step = gating, step
    try:
        return *command(*words), states
    finally:
        BalancedRouter.gating, loop.train_step = honest_gating, honest_step


@pytest.mark.parametrize("broken, status", [((3, 4), 0), ((3, 4, 5), 2)])
@pytest.mark.parametrize(
    "kind", ["estimate=trend", "estimate=exact", "balance=loss_free", "balance=micro"]
)
def test_logits_that_are_not_numbers_cost_a_step(ranks, config, tmp_path, kind, broken, status):
    """What the routers know of the batches before stays as it was, on all ranks."""
    words = ("train", config, *MOE, f"model.moe.{kind}", f"run_dir={tmp_path}")
    words += ("train.tokens=8000", "optim.max_skipped_steps=3", "eval.every_steps=0")
    answers = ranks(2, command_with_broken_routers, broken, *words)
    assert [answer[0] for answer in answers] == [status] * 2, answers[0][1]
    said, states = answers[0][1:]
    steps = [row for row in rows(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps if row["skipped"]] == list(broken)
    assert all(row["balance_loss"] is not None for row in steps if not row["skipped"])
    assert states == answers[1][2] and np.isfinite([list(s.values()) for s in states]).all()
    assert states[1] != states[0]
    if kind != "estimate=exact":
        assert all(states[step - 1] == states[1] for step in broken)
    if status == 2:
        assert said.count("3 steps in a row up to step 5") == 1 and "Traceback" not in said
    else:
        assert len(steps) > 6 and states[4] != states[3]
