"""Reductions and gathers beside computation, on gloo: the same training in every layout."""

from dataclasses import replace
from unittest.mock import patch

import pytest
from crash_drill import curve
from test_train import TINY, command
from tiny_corpus import tiny_config

RINGS = "planner.capacity_tokens=64"


def overlapping(*words):
    """Status, words and, by step, whether gradients may be reduced during the backward pass.

    Of a run with many small buckets whose communication overlaps, as it does on CUDA, in every
    second step, as if only these ended without rings (on gloo no order of them hangs)."""
    from megascale.model import build
    from megascale.training import loop

    plain, honest, flags = build._reduction, loop.train_step, []

    def in_buckets(*given):
        return replace(plain(*given), bucket_size=2000)

    def noted(learner, *given, **named):
        named["overlap"] = len(flags) % 2 == 0
        flags.append(named["overlap"] and learner.model.overlaps)
        return honest(learner, *given, **named)

    with (
        patch.object(build, "can_overlap", lambda device: True),
        patch.object(build, "_reduction", in_buckets),
        patch.object(loop, "train_step", noted),
    ):
        status, said = command(*words)
    return status, said, flags


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (3, [RINGS]),
        (2, ["optim.distributed_optimizer=false", RINGS]),
        (2, ["parallel.tensor=2"]),
        (4, ["parallel.pipeline=2", "train.precision=bf16"]),
    ],
    ids=str,
)
def test_overlap_changes_no_training(ranks, tmp_path, world, words):
    config = tiny_config(tmp_path / "corpus")
    found = {}
    for name, run in (("plain", command), ("overlap", overlapping)):
        run_dir = tmp_path / name
        answers = ranks(world, run, "train", config, f"run_dir={run_dir}", *TINY, *words)
        assert answers[0][0] == 0, answers[0][1]
        found[name] = curve(run_dir)
    assert {tuple(answer[2]) for answer in answers} == {(True, False) * 3}
    for step, row in found["plain"].items():
        other = found["overlap"][step]
        assert other["loss"] == pytest.approx(row["loss"], rel=2e-5)
        if "eval" in row:
            assert other["eval"]["tiny"]["loss"] == pytest.approx(row["eval"]["tiny"]["loss"], 2e-5)


def test_it_can_be_turned_off(ranks, tmp_path):
    config = tiny_config(tmp_path / "corpus")
    words = (config, f"run_dir={tmp_path / 'run'}", *TINY, "parallel.overlap=false")
    status, said, flags = ranks(2, overlapping, "train", *words)[0]
    assert status == 0 and not any(flags), said


def begun_gathers(folder):
    """Gathers on their way before and while a checkpoint is loaded after a step, on this rank."""
    from test_checkpoint import Run

    from megascale.checkpoint import read
    from megascale.model import build

    with patch.object(build, "can_overlap", lambda device: True):
        run = Run(["train.precision=bf16"])
    run.train(range(1))
    run.save(run.saver(folder), 1)
    run.train(range(1, 2))
    (chunk,) = run.model.chunks
    honest, counts = read.load_boxes, []

    def count():
        counts.append(sum(one.param_gather_handle is not None for one in chunk.bucket_groups))

    def loaded(*given):
        count()
        return honest(*given)

    count()
    with patch.object(read, "load_boxes", loaded):
        run.load(folder)
    return counts


def test_no_gather_writes_over_what_is_loaded(ranks, tmp_path):
    for before, while_loading in ranks(2, begun_gathers, str(tmp_path)):
        assert before > 0 and while_loading == 0
