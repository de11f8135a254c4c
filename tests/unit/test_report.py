"""`megascale report`: what stands on top, events for people, and the page in a real browser."""

import json

import pytest
from browser import find_browser, look

from megascale.cli import main
from megascale.monitor.event_texts import event_text
from megascale.monitor.run_figures import Speedup, read_figures
from megascale.monitor.story import read_story
from megascale.run.facts import heldout_row, how_far_it_is, what_it_is

CONFIG = """
model:
  {vocab_size: 1000, num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, head_dim: 16,
   ffn_hidden_size: 128, vocab_multiple: 8}
data: {sources: {web: {path: w}, code: {path: c}}, context_tokens: 512, global_batch_tokens: 4096}
train: {tokens: 81920}
"""
EMBEDDING = 1000 * 64
LAYER = 2 * 64 + 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128
PARAMETERS = EMBEDDING + 2 * LAYER + 64
"""Tied embeddings, the last norm; of a layer norms, queries, keys, values, output, feed-forward."""
START = {
    "time": "2026-11-30T10:00:00.000+00:00", "event": "start", "began": 1796032790.1, "step": 0,
    "total_steps": 20, "world": 8, "command": "megascale train c.yaml --ranks 8",
    "layout": {"world": 8, "tensor": 2, "pipeline": 1, "expert": 1, "hdp": 4},
    "precision": "bf16", "device": "NVIDIA H100 80GB HBM3", "nodes": 2,
    "versions": {"megascale": "0.2.0 at commit abc", "torch": "2.11.0"},
}  # fmt: skip
SAVE = {
    "time": "2026-11-30T10:01:00.000+00:00", "event": "save", "step": 1000, "bytes": 5_815_591,
    "seconds": 0.3460340179990453, "error": None, "last_good": 1000, "emergency": False,
}  # fmt: skip
SAMPLE = {
    "time": "2026-11-30T10:02:00.000+00:00", "event": "sample", "prompt": "def f",
    "text": "(x):\n    return <b>x</b>",
}  # fmt: skip
STOP = {
    "time": "2026-11-30T10:02:01.000+00:00", "event": "stop", "step": 20, "tokens_seen": 81920,
    "spent": {"training": 40.0}, "asked": False,
}  # fmt: skip


def score(loss, bits, part="x"):
    return {"loss": loss, "bits_per_byte": bits, "tokens": 2000, "set_tokens": 9000, "part": part}


def rows():
    """20 steps, of which the even ones have a speed-up; evaluations after 5, 10 and 20."""
    for step in range(1, 21):
        yield {
            "step": step, "tokens_seen": 4096 * step, "loss": 5 / step, "step_s": 2.0, "lr": 1e-3,
            "tokens_per_s": 2048.0, "grad_norm": 1.0, "skipped": False,
            "speedup_over_static": None if step % 2 else 1 + step / 100,
        }  # fmt: skip
        if step == 5:
            yield {"step": 5, "tokens_seen": 20480, "eval": {"web": score(9.0, 3.0, "other")}}
        if step in (10, 20):
            scores = {"web": score(4.0 / step, 1.0 / step), "code": score(1.25, None)}
            yield {"step": step, "tokens_seen": 4096 * step, "eval": scores}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / ("a-run-of-a-long-name-" * 10)
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    for name, lines in (("metrics", rows()), ("events", [START, SAVE, SAMPLE, STOP])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    parent = {"checkpoint": "/elsewhere/base/checkpoints/00000300", "step": 3000}
    origin = {"made_by": "start.checkpoint", "parents": [{**parent, "tokens_seen": 12_300_000}]}
    (folder / "lineage.json").write_text(json.dumps(origin))
    return folder


# ------------------------------------------------------------------------------------ the figures


def test_figures_are_of_the_same_part_of_a_set(run):
    web, code = read_figures(run).heldout
    assert (web.source, web.first["loss"], web.last["loss"], web.step) == ("web", 0.4, 0.2, 20)
    assert heldout_row(web) == ("web", "0.2000", "0.4000", "0.0500", "0.1000",
                                "2,000 of 9,000", "20")  # fmt: skip
    assert heldout_row(code) == ("code", "1.2500", "1.2500", "", "", "2,000 of 9,000", "20")


def test_the_speed_up_is_that_of_the_steps_that_have_one(run, tmp_path):
    assert read_figures(run).speedup == Speedup(pytest.approx(1.11), 1.02, 1.2, 10)
    (tmp_path / "none").mkdir()
    assert read_figures(tmp_path / "none").speedup is None
    (tmp_path / "none" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "eval": 5}\n')
    assert read_figures(tmp_path / "none") == read_figures(tmp_path / "nowhere")


def test_what_stands_on_top(run):
    story = read_story(run)
    facts = dict(what_it_is(run, story))
    assert facts == {
        "model": f"{PARAMETERS / 1000:.1f}K parameters ({(PARAMETERS - EMBEDDING) / 1000:.1f}K "
        "without embeddings): 2 layers of 64",
        "data": "web, code; context 512, 4,096 tokens a step",
        "layout": "8 ranks = tensor 2 x pipeline 1 x HDP 4, bf16",
        "device": "8 x NVIDIA H100 80GB HBM3 on 2 nodes",
        "code": "megascale 0.2.0 at commit abc, torch 2.11.0",
        "lineage": "from step 3,000 of base (12.3M tokens), by start.checkpoint",
    }
    assert dict(how_far_it_is(story, read_figures(run).speedup)) == {
        "tokens": "81,920 tokens",
        "loss": "0.2500 nats per token",
        "speed": "2.0K tokens/s",
        "plan speed-up": "1.11x over static context parallelism, predicted: the median of 10 "
        "steps, from 1.02x to 1.20x",
    }


def test_what_an_earlier_version_did_not_write_is_left_out(run):
    events = [{name: START[name] for name in ("time", "event", "began", "step", "world")}]
    (run / "events.jsonl").write_text(json.dumps(events[0]) + "\n")
    (run / "lineage.json").unlink()
    (run / "config.yaml").write_text(CONFIG.replace("vocab_size: 1000, ", ""))
    assert [title for title, _ in what_it_is(run, read_story(run))] == ["data"]
    assert "plan speed-up" not in dict(how_far_it_is(read_story(run), None))


# ------------------------------------------------------------------------------------- the events


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (START, "on 8 x NVIDIA H100 80GB HBM3: megascale train c.yaml --ranks 8"),
        ({"event": "start", "world": 2}, "ranks 2"),
        (SAVE, "checkpoint of 5.5 MiB, written in 0.35 s"),
        ({**SAVE, "emergency": True}, "emergency copy of 5.5 MiB, written in 0.35 s"),
        ({"event": "save", "bytes": 12, "seconds": 61}, "checkpoint of 12.0 B, written in 1m01s"),
        ({**SAVE, "error": "disk full"}, "disk full"),
        (STOP, "reached its end"),
        ({**STOP, "asked": True}, "stopped by a signal"),
        ({"event": "skip", "loss": None, "grad_norm": 3.0}, "update left out: loss not finite"),
        ({"event": "skip", "loss": 9.123456, "grad_norm": 1 / 3},
         "update left out: loss 9.123, gradient norm 0.3333"),
        ({"event": "rollback", "to_step": 1200, "in_a_row": 10},
         "back to step 1,200 after 10 spikes in a row"),
        ({"event": "failure", "error": "no GPU", "rank": 3, "node": "n1"}, "rank 3 on n1: no GPU"),
        ({"event": "failure", "error": "no GPU", "rank": None}, "no GPU"),
        ({"event": "straggler", "rank": 2, "node": "n0", "slowdown": 1.2345678},
         "rank 2 on n0 takes 1.235 times as long for the same work"),
        ({"event": "launch", "step": 4, "job": None, "nodes": 2, "wait_s": 3720.5, "hosts": ["a"]},
         "nodes 2, wait 1h02m, hosts a"),
        ({"event": "new", "by_rank": {"1": 0.1234567}, "ok": True, "x": float("nan")},
         "by rank 1 0.1235, ok yes, x not finite"),
        ({"event": "progress"}, ""),
    ],
)  # fmt: skip
def test_events_are_sentences_with_rounded_numbers(event, text):
    assert event_text(event) == text


# --------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    return find_browser(tmp_path_factory.mktemp("browser"))


@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_whole_report(browser, run, width):
    assert main(["report", str(run)]) == 0
    seen = look(browser, run / "report.html", width)
    assert seen["errors"] == seen["console"] == []
    assert all(name.startswith("data:") for name in seen["loaded"])
    assert seen["title"] == seen["headings"][0] == run.name
    names = [one.partition(" ")[0] for one in seen["headings"][1:]]
    assert names == ["Held-out", "Sample", "Goodput", "Starts", "Curves", "Events"]
    facts, heldout, *_, events = seen["tables"]
    assert [title for title, _ in facts] == [
        "done", "tokens", "loss", "speed", "plan speed-up", "model", "data", "layout", "device",
        "code", "lineage",
    ]  # fmt: skip
    assert dict(facts)["done"] == "step 20 of 20"
    assert dict(facts)["lineage"].startswith("from step 3,000 of base")
    assert heldout[1][:3] == ["web", "0.2000", "0.4000"]
    assert [row[1:] for row in events[1:3]] == [
        ["start", "0", "on 8 x NVIDIA H100 80GB HBM3: megascale train c.yaml --ranks 8"],
        ["save", "1,000", "checkpoint of 5.5 MiB, written in 0.35 s"],
    ]
    assert seen["texts"][0] == "def f(x):\n    return <b>x</b>" and seen["elements"] == []
    pictures = {name: size for name, *size in seen["images"]}
    assert pictures.keys() == {"loss", "bits_per_byte", "learning_rate", "speed", "grad_norm"}
    for is_loaded, own_width, shown_width in pictures.values():
        assert is_loaded and own_width > 1000 and 300 < shown_width <= width
    assert all(bar_width > 0 for name, bar_width in seen["bars"] if name.startswith("training"))
    assert seen["needed"] <= seen["width"] and seen["topRight"] <= width  # nothing is cut off


def test_the_browser_would_notice(browser, tmp_path):
    """What the test above rules out is seen where it is there."""
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><html><head><title>t</title></head><body><h1>h</h1>"
        '<script>thrower()</script><img alt="gone" src="gone.png">'
        '<div style="width: 5000px" class="facts">wide</div></body></html>'
    )
    seen = look(browser, page, 800)
    assert any("thrower" in error for error in seen["errors"])
    assert any(error.endswith("gone.png") for error in seen["errors"])
    assert any("thrower" in line for line in seen["console"])
    assert [one[0] for one in seen["images"]] == ["gone"] and seen["images"][0][2] == 0
    assert seen["needed"] > seen["width"] == 800 and seen["topRight"] > 5000
