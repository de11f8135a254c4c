"""`megascale simulate CONFIG`: the steps, seconds and memory of `megascale plan --device`."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_plan_device import BIG, H100, load, path, printed, row  # noqa: F401

from megascale.cli import main
from megascale.config import Layout
from megascale.devices.memory import fullest, with_capacity
from megascale.planner import PLANNERS
from megascale.run.auto_capacity import with_capacity_of
from megascale.run.on_device import planned_figures
from megascale.run.on_paper import run_config
from megascale.run.resolve import load_run
from megascale.run.step_problem import first_step
from megascale.run.without_corpus import load_drawn_run

MOE = (
    "model={num_layers: 4, hidden_size: 64, num_heads: 4, vocab_size: 300, "
    "moe: {num_experts: 4, top_k: 2, dispatcher: allgather}}"
)
COST = {"a": 1e-9, "b": 1e-6, "fixed": 1e-3, "latency": 1e-4, "transfer_intra": 1e-7,
        "transfer_inter": 1e-6, "node_size": 2}  # fmt: skip


def simulated(tmp_path: Path, *words: object) -> list[dict]:
    """The rows of `--json`, by planner."""
    out = tmp_path / "simulated.json"
    assert main(["simulate", *map(str, words), "--json", str(out)]) == 0
    return {one["planner"]: one for one in json.loads(out.read_text())["planners"]}


@pytest.mark.parametrize(
    "overrides",
    [
        BIG,
        (*BIG, "data.context_tokens=64Ki", "planner.capacity_tokens=auto"),
        (*BIG, "planner.capacity_tokens=2Ki", "planner.host_copy_bytes_per_s=5e10"),
        (*BIG, "parallel.tensor=2", "parallel.pipeline=2", "train.recompute=full"),
        (MOE, "parallel.expert=2", "data.context_tokens=2Ki"),
        ("planner.cost=cost.json", "data.context_tokens=2Ki", "planner.capacity_tokens=512"),
        ("planner.name=static", "planner.capacity_tokens=64"),
    ],
    ids="dense auto offload cut experts measured static".split(),
)
@pytest.mark.parametrize("lengths", ["web", None])
def test_the_seconds_are_those_of_plan(path, tmp_path, monkeypatch, overrides, lengths):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cost.json").write_text(json.dumps(COST))
    if lengths is None:
        run = load_run(path, overrides)
        config, layout = run.config, Layout.of(run.config, 16)
        batch = first_step(with_capacity(config, 2**14), layout, run.sources).batch
        more = ()
    else:
        overrides = (*overrides, "model.vocab_size=300")
        config = load_drawn_run(path, overrides, lengths, {}).config
        batch = load_drawn_run(path, overrides, lengths, {}).batch
        layout, more = Layout.of(config, 16), ("--lengths", lengths)
    config = with_capacity_of(config, layout, "h100", H100)
    names = list(dict.fromkeys((config.planner.name, "static_best", "static")))
    words = (path, *overrides, "--ranks", 16, "--steps", 1, *more)
    found = simulated(tmp_path, *words, "--planners", ",".join(names))
    assert list(found) == ["static", *(name for name in names if name != "static")]
    for name in names:
        figures = planned_figures(config, layout, H100, batch.length, name)
        assert found[name]["step_s"] == pytest.approx(figures.time.total_s, rel=1e-12)
        assert found[name]["tokens_per_s"] == pytest.approx(figures.tokens_per_s, rel=1e-12)
    kept = config.planner.capacity_tokens
    most = fullest(config, layout, H100)
    assert all(one["peak_bytes"] <= most for one in found.values())
    assert most < fullest(with_capacity(config, 2 * kept), layout, H100)


def test_what_both_print_of_a_step(path, tmp_path, capsys) -> None:  # noqa: F811
    words = (*BIG, "data.context_tokens=64Ki", "planner.capacity_tokens=8Ki", "--ranks", 16)
    words = (path, *words, "--lengths", "github", "--device", "h200")
    step = row("step", printed(capsys, *words))
    found = simulated(tmp_path, *words, "--steps", 1, "--planners", "hybrid,static_best")
    shown = capsys.readouterr().out
    for name, (number, unit) in zip(("hybrid", "static_best"), (step[:2], step[2:]), strict=True):
        seconds = float(number) * (1e-3 if unit == "ms" else 1.0)
        assert found[name]["step_s"] == pytest.approx(seconds, rel=1e-3)
    assert f"{path} on 16 x h200: tensor 1, pipeline 1, expert 1, 16 HDP ranks" in shown
    assert "8,192 tokens, free mode, offload none" in shown
    assert "lengths github, cut at 65,536: 1 steps of 65,536 tokens" in shown
    assert "NVIDIA H200 data sheet" in shown


def test_steps_are_those_of_the_run_or_drawn_anew(path) -> None:  # noqa: F811
    from megascale.corpus.batches import Cursor
    from megascale.run.step_problem import batches_of

    run, cursor = load_run(path), Cursor()
    batches = batches_of(run.config, run.sources)
    for lengths in run_config(path, [], None, 5)[1]:
        batch, cursor = batches.next(cursor)
        assert np.array_equal(lengths, batch.length)
    drawn = [run_config(path, ["model.vocab_size=300"], "web", 4)[1] for _ in range(2)]
    assert all(map(np.array_equal, *drawn))
    assert len({tuple(one) for one in drawn[0]}) == 4
    assert {int(one.sum()) for one in drawn[0]} == {4096}


def test_the_planner_of_the_config_takes_part(path, tmp_path) -> None:  # noqa: F811
    words = (path, "--ranks", 4, "--steps", 1, "data.global_batch_tokens=1Ki")
    names = [name for name in PLANNERS if name not in ("longest_first", "static")]
    assert list(simulated(tmp_path, *words)) == ["static", *names]
    own = simulated(tmp_path, *words, "planner.name=longest_first", "--planners", "longest_first")
    assert list(own) == ["static", "longest_first"]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--model 7b", "--model goes without CONFIG"),
        ("--batch-tokens 1Ki", "--batch-tokens goes without CONFIG"),
        ("--seed 3", "--seed goes without CONFIG"),
        ("--ranks 3 parallel.tensor=2", "must divide the 3 ranks started"),
        ("--device h10", "did you mean h100"),
        ("--lengths gihub model.vocab_size=300", "--lengths gihub: no such file"),
        ("--planners best", "--planners best: unknown"),
        ("--steps 0", "--steps must be at least 1"),
        ("planner.capacity_tokens=auto data.context_tokens=1G", "planner.capacity_tokens = auto: "),
        ("optim.rate=1", "unknown key 'optim.rate'"),
        ("--json /nowhere/out.json", "cannot be made: no folder /nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(path, capsys, words, said) -> None:  # noqa: F811
    assert main(["simulate", str(path), *words.split()]) == 2
    errors = capsys.readouterr().err
    assert said in errors and len(errors.splitlines()) == 1
    assert main(["simulate", "/nowhere.yaml"]) == 2
    assert "config /nowhere.yaml: No such file" in capsys.readouterr().err
