"""`megascale plot --schedule`: the points of the picture are the run's, and need no corpus."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megascale import cli
from megascale.config import SegmentConfig, StageConfig
from megascale.corpus.shards import ShardWriter
from megascale.monitor.plot_style import short_rate
from megascale.monitor.schedule_plot import sampled_tokens, stage_spans
from megascale.optim import steplaw

RUN = """
run_dir: runs/continual
data:
  sources: {web: {path: nowhere/web}, code: {path: nowhere/code}}
  stages: [{tokens: 60M, blend: {web: 1}}, {blend: {web: 1, code: 1}}]
train: {tokens: 100M}
"""
WEB, CODE = (0x92, 0xC5, 0xDE), (0xF4, 0xA5, 0x82)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def coloured(path: Path, colour: tuple[int, int, int]) -> int:
    """Pixels of a colour."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int(np.all(np.abs(image - colour) < 6, axis=-1).sum())


@pytest.mark.parametrize("curve", ["cosine", "infinite", "wsd", "constant"])
@pytest.mark.filterwarnings("error")
def test_the_picture_shows_the_curve_and_the_shares(config, tmp_path, capsys, curve) -> None:
    out = tmp_path / "out.png"
    words = ["plot", "--schedule", str(config), f"optim.curve={curve}", "--out", str(out)]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert coloured(out, (0x21, 0x66, 0xAC)) > 2000
    assert coloured(out, WEB) / coloured(out, CODE) == pytest.approx(0.8 / 0.2, rel=0.05)


def test_it_lies_here_under_the_name_of_the_config(config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", "--schedule", str(config)]) == 0
    assert (tmp_path / "run_schedule.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "runs").exists()  # a folder there would keep the run from starting


def test_the_step_law_needs_no_corpus_either(config, tmp_path, monkeypatch) -> None:
    asked = []
    law = steplaw.peak_lr
    monkeypatch.setattr(steplaw, "peak_lr", lambda *what: asked.append(what) or law(*what))
    words = ["optim.lr=steplaw", "data.global_batch_tokens=steplaw", "--out"]
    assert cli.main(["plot", "--schedule", str(config), *words, str(tmp_path / "a.png")]) == 0
    assert [tokens for _, tokens in asked] == [100_000_000]


def test_shares_that_follow_from_missing_corpora_are_left_out(config, tmp_path, capsys) -> None:
    out = tmp_path / "a.png"
    assert cli.main(["plot", "--schedule", str(config), "data.stages=[]", "--out", str(out)]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("without data.stages the shares follow from the corpora, so left out: ")
    assert coloured(out, (0x21, 0x66, 0xAC)) > 2000 and coloured(out, WEB) == 0


def test_shares_that_follow_from_corpora_are_theirs(config, tmp_path) -> None:
    sources = "{vocab_size: 257, eod_id: 256, path: %s}"
    words = ["data.stages=[]"]
    for name, documents in (("web", 30), ("code", 10)):
        writer = ShardWriter(tmp_path / name, np.uint16)
        for _ in range(documents):
            writer.add(np.full(100, 256, np.uint16))
        writer.close()
        words.append(f"data.sources.{name}={sources % (tmp_path / name)}")
    out = tmp_path / "a.png"
    assert cli.main(["plot", "--schedule", str(config), *words, "--out", str(out)]) == 0
    assert coloured(out, WEB) / coloured(out, CODE) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], "give RUN, the folder of a run, or --schedule CONFIG"),
        (["--schedule", "no_such.yaml"], "no_such.yaml"),
        (["--schedule", "CONFIG", "--out", "x.pdf"], "--out x.pdf: must end in .png"),
        (["--schedule", "CONFIG", "--out", "/proc/no/x.png"], "choose a file you may write"),
        (["--schedule", "CONFIG", "optim.curv=wsd"], "did you mean 'curve'"),
        (["--schedule", "CONFIG", "runs/quickstart"], "override 'runs/quickstart': write it as"),
    ],
)
def test_mistakes_are_one_clear_line(config, words, hint, capsys) -> None:
    words = [str(config) if word == "CONFIG" else word for word in words]
    assert cli.main(["plot", *words]) == 2
    shown = capsys.readouterr().err
    assert hint in shown and shown.count("\n") == 1


def test_every_joint_and_jump_is_drawn() -> None:
    segments = (SegmentConfig(tokens=333_331, lr=1.0), SegmentConfig(lr=0.1))
    seen = sampled_tokens(segments, 10**6)
    assert {0, 333_331, 333_332, 10**6} <= set(seen.tolist())
    assert seen[-1] == 10**6 and (np.diff(seen) > 0).all()


def test_stages_end_with_the_run() -> None:
    first, second, third = (StageConfig(tokens=tokens, blend={"a": 1}) for tokens in (60, 50, 9))
    assert stage_spans([first, second, third], 100) == [(0, 60, first), (60, 100, second)]
    assert stage_spans([first, second], 200) == [(0, 60, first), (60, 200, second)]


@pytest.mark.parametrize(
    ("lr", "text"),
    [(3e-4, "3e-4"), (1.65e-4, "1.65e-4"), (0.0, "0"), (1.0, "1e0"), (2e-10, "2e-10")],
)
def test_rates_as_people_write_them(lr: float, text: str) -> None:
    assert short_rate(lr) == text
