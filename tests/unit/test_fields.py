"""The table of metrics: rows, the console's line, scores and pictures follow from its records."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image

from megascale.config import finalize
from megascale.config.load import parse_config
from megascale.corpus.batches import Cursor, GlobalBatch, SourceCursor
from megascale.model.balance import ExpertUse
from megascale.model.counts import batch_flops
from megascale.monitor import metric_fields as fields
from megascale.monitor.console import Console
from megascale.monitor.metric_fields import Curve, Field, Picture, Shown
from megascale.monitor.metrics import MetricsWriter
from megascale.monitor.plots import plot_run
from megascale.monitor.run_curves import load_curves
from megascale.monitor.step_record import StepRecord, StepResult
from megascale.training.evaluate import HeldoutScore

CONFIG = """
model: {num_layers: 2, hidden_size: 32, num_heads: 2}
data: {sources: {web: {path: web}}}
train: {tokens: 10000}
"""
ALWAYS = {
    "step": 3,
    "tokens_seen": 300,
    "num_tokens": 100,
    "loss": 2.0,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "step_s": 4.0,
    "tokens_per_s": 25.0,
    "mfu": None,
    "plan_s": 0.25,
    "plan_wait_s": 0.002,
    "plan_over_bound": 1.5,
    "skipped": False,
}
"""The row of `record()`."""


def record(peak_flops=None, cursor=None, result=None, config=None, **more) -> StepRecord:
    number = np.zeros(2, np.int64)
    usual = StepResult(
        loss=2.0, num_tokens=100, grad_norm=0.5, lr=1e-3, skipped=False, stop=False,
        writes_done=True, seconds=4.0, offload_gib=0.0, experts=None,
    )  # fmt: skip
    return StepRecord(
        config=config or finalize(parse_config(CONFIG), {"web": 10_000}, 257),
        cursor=cursor or Cursor(step=3, tokens_seen=300),
        batch=GlobalBatch(2, np.zeros(2, np.int16), number, number, np.array([60, 40], np.int32)),
        plan=types.SimpleNamespace(plan_s=0.25, predicted_s=3.0, lower_bound_s=2.0),
        plan_wait_s=0.002,
        result=dataclasses.replace(usual, **(result or {})),
        world=2,
        peak_flops=peak_flops,
        bytes_per_token_S=np.array([4.0]),
        **more,
    )


def test_a_row_has_the_fields_of_earlier_versions_in_their_order() -> None:
    row = fields.row_of(record())
    assert row == ALWAYS and list(row) == list(ALWAYS)


def test_some_rows_have_more() -> None:
    use = ExpertUse(torch.tensor([[[8.0, 0, 0, 0], [2, 2, 2, 2]]]), torch.full((2, 4), 0.25))
    config = parse_config(CONFIG.replace("path: web", "path: web, replay: true"))
    config = finalize(config, {"web": 10_000}, 257)
    cursor = Cursor(3, 300, sources={"web": SourceCursor(tokens=75)})
    row = fields.row_of(record(1e12, cursor, {"offload_gib": 1.5, "experts": use}, config))
    assert row == ALWAYS | {
        "mfu": pytest.approx(batch_flops(config.model, [60, 40], 1) / (4.0 * 2 * 1e12)),
        "replayed": 0.25,
        "offload_gib": 1.5,
        "balance_loss": 1.0,
        "max_violation": 3.0,
        "dead_experts": 3,
    }
    added = ["replayed", "offload_gib", "balance_loss", "max_violation", "dead_experts"]
    assert list(row) == [*ALWAYS, *added]


def test_the_row_and_the_console_know_the_speed_up_over_static() -> None:
    row = fields.row_of(record(static_s=3.93))
    assert row == ALWAYS | {"speedup_over_static": pytest.approx(1.31)}
    assert "  1.31x static" in Console(200, 0).line(row)
    assert "static" not in Console(200, 0).line(fields.row_of(record()))


def test_the_console_knows_bits_per_byte() -> None:
    assert fields.for_console(record()) == {
        "bits_per_byte": pytest.approx(2.0 * 100 / math.log(2) / 400)
    }


def test_a_line_has_the_mean_wait_since_the_last_line() -> None:
    console = Console(200, 0)
    row = ALWAYS | {"plan_wait_s": 0.01}
    console.take(row | {"step": 1})
    assert "plan wait 20.0 ms" in console.line(row | {"step": 2, "plan_wait_s": 0.03})
    assert "plan wait 10.0 ms" in console.line(row)
    assert "plan wait" not in console.line(row | {"plan_wait_s": 0.0099})


def test_the_console_has_its_own_order() -> None:
    names = [field.name for field, _ in fields.shown_fields()]
    assert names == [name for name in fields.CONSOLE_ORDER if name in names]
    assert names[:5] == ["loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_s"]


def test_the_speed_up_over_static_has_its_place_after_the_speed(monkeypatch) -> None:
    new = Field(
        "speedup_over_static", "", "Predicted.", lambda step: 1.25, console=Shown("{}x static")
    )
    others = tuple(field for field in fields.FIELDS if field.name != new.name)
    monkeypatch.setattr(fields, "FIELDS", (*others, new))
    line = Console(200, 0).line(ALWAYS | {"mfu": 0.5, "speedup_over_static": 1.25})
    assert line.endswith("25 tok/s  1.25x static  MFU 50.0 %")


def test_scores_have_their_attributes_in_order() -> None:
    score = HeldoutScore(2.0, None, 50, 2, 100, 4, "a mark")
    assert list(fields.score_row(score).items()) == list(dataclasses.asdict(score).items())


def test_a_new_record_is_in_rows_on_the_console_and_in_a_picture(tmp_path, monkeypatch) -> None:
    picture = Picture("waits", "Waits for plans", numbers="percent", from_zero=True)
    new = Field(
        "wait_share", "fraction", "Wait for the plan over the step's time.",
        lambda step: step.plan_wait_s / step.result.seconds,
        number="{:.2%}".format,
        console=Shown("waits {}"),
        curve=Curve(picture, "share"),
    )  # fmt: skip
    monkeypatch.setattr(fields, "FIELDS", (*fields.FIELDS, new))
    metrics, console = MetricsWriter(tmp_path, False, (), 0, {}), Console(200, 0)
    for step in range(1, 31):
        row = fields.row_of(record(cursor=Cursor(step, 100 * step)))
        metrics.write(row)
    metrics.close()
    assert list(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]).items()) == [
        *(ALWAYS | {"step": 1, "tokens_seen": 100}).items(),
        ("wait_share", 0.0005),
    ]
    assert console.line(row).endswith("25 tok/s  waits 0.05%")
    assert set(load_curves(tmp_path, "a").columns["wait_share"]) == {0.0005}
    path = plot_run([tmp_path], tmp_path / "out")[-1]
    assert path.name == "waits.png"
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    blue = np.all(np.abs(image - (0x21, 0x66, 0xAC)) < 12, axis=-1)
    assert blue.sum() > 500  # the curve


def test_a_picture_that_no_run_has_values_for_is_left_out(tmp_path, monkeypatch) -> None:
    test_a_new_record_is_in_rows_on_the_console_and_in_a_picture(tmp_path, monkeypatch)
    (tmp_path / "old").mkdir()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    old = "".join(json.dumps({name: row[name] for name in ALWAYS}) + "\n" for row in rows)
    (tmp_path / "old" / "metrics.jsonl").write_text(old)
    drawn = [path.stem for path in plot_run([tmp_path / "old"], tmp_path / "plots")]
    assert drawn == ["loss", "learning_rate", "speed", "grad_norm"]


def test_names_are_unique() -> None:
    for table in (fields.FIELDS, fields.SCORES, fields.pictures()):
        names = [one.name for one in table]
        assert len(set(names)) == len(names)
