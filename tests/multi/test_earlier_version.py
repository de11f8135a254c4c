"""What an earlier version made still works: `tests/data/run_642fa59.tar.xz`.

A corpus of bytes and a run of 8 of 16 steps, with checkpoints of steps 4 and 8. That version
counted the 127 padded rows of the vocabulary in the softmax, and saved them.
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_train import command

ARCHIVE = Path(__file__).parents[1] / "data" / "run_642fa59.tar.xz"
CHANGED = "the loss will change: {} was trained with 127 padded rows of the vocabulary"
PADDED_LOSS = 5.194764512508505
"""Of the held-out documents after step 8, as the earlier version reported it."""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder that the earlier version worked in, unpacked."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def there(folder: Path, *words: object) -> Any:
    """`command` with `folder` as the working directory."""
    os.chdir(folder)
    try:
        return command(*words)
    finally:
        os.chdir("/")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def done(ranks: Any, folder: Path, *words: object, world: int = 1) -> str:
    """What rank 0 prints. Fails where the command does."""
    status, said = ranks(world, there, folder, *words)[0]
    assert status == 0, said
    return str(said)


def heldout_loss(model: Path, corpus: Path, context: int, budget: int) -> float:
    """Mean loss of the held-out documents by `transformers`, on the run's own choice of them."""
    import torch
    from transformers import AutoModelForCausalLM

    from megascale.corpus.heldout import choose_part
    from megascale.corpus.shards import Shard
    from megascale.corpus.sources import describe

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).double().eval()
    shard, total, count = Shard.open(corpus / "heldout"), 0.0, 0
    for document, begin, length in choose_part(describe(str(corpus)), context, budget).spans_n3:
        ids = np.concatenate([[256], shard.read(document).astype(np.int64)])
        for start in range(begin, begin + length, context):
            piece = torch.tensor(ids[start : min(start + context, begin + length) + 1])
            with torch.no_grad():
                logits = theirs(piece[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
            count += len(piece) - 1
    return total / count


def test_it_resumes_with_one_line_about_its_loss(ranks: Any, made: Path) -> None:
    said = done(ranks, made, "train", "config.yaml", "--resume", "auto")
    line = CHANGED.format("run/checkpoints/00000008")
    assert said.count(line) == 1 and "resumed at step 8" in said and "done: 16 steps" in said
    curve = {row["step"]: row for row in rows(made / "run") if "loss" in row}
    assert sorted(curve) == list(range(1, 17))
    assert curve[9]["loss"] < curve[8]["loss"] - 0.2  # 127 logits near those of rare bytes
    # its own checkpoint now holds ids alone, on any ranks, and the line is not printed again
    more = ("train", "config.yaml", "--resume", "auto", "train.tokens=10Ki")
    said = done(ranks, made, *more, "parallel.tensor=2", "model.vocab_multiple=1", world=2)
    assert "the loss will change" not in said and "resumed at step 16" in said
    assert "changed since the checkpoint: model.vocab_multiple: 128 -> 1" in said


def test_its_held_out_loss_is_that_of_its_export(ranks: Any, made: Path) -> None:
    """The model of step 8 by its export, then by the first evaluation of a branch from it."""
    done(ranks, made, "export", "run", "exported")
    expected = ranks(1, heldout_loss, made / "exported", made / "corpora" / "corpus", 128, 4000)[0]
    assert expected < PADDED_LOSS - 0.2
    words = ("run", "config.yaml", "run_dir=branched", "eval.every_steps=1")
    said = done(ranks, made, "branch", *words, "train.stop_after_steps=1")
    assert said.count(CHANGED.format(made / "run/checkpoints/00000008")) == 1
    first = next(row["eval"]["words"] for row in rows(made / "branched") if "eval" in row)
    assert first["loss"] == pytest.approx(expected, rel=1e-6)
    done(ranks, made, "export", "branched", "next")
    expected = ranks(1, heldout_loss, made / "next", made / "corpora" / "corpus", 128, 4000)[0]
    last = [row["eval"]["words"] for row in rows(made / "branched") if "eval" in row][-1]
    assert last["loss"] == pytest.approx(expected, rel=1e-6)


def test_an_earlier_step_resumes_on_tensor_ranks(ranks: Any, made: Path) -> None:
    """Two ranks continue as one does, to the rounding of sums."""
    words = ("train", "config.yaml", "--resume", "4", "eval.every_steps=0")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(made / "two", filter="data")
    assert "resumed at step 4" in done(ranks, made, *words)
    layout = ("parallel.tensor=2", "model.vocab_multiple=3")
    done(ranks, made / "two", *words, *layout, world=2)
    one, two = (
        [row["loss"] for row in rows(run / "run") if "loss" in row and row["step"] > 4]
        for run in (made, made / "two")
    )
    assert two[-8:] == pytest.approx(one[-8:], rel=1e-5)


def rows_of(folder: Path) -> dict[str, int]:
    """Rows of the embedding in a checkpoint: in its files, and as they are read."""
    from megascale.checkpoint.load import find_at
    from megascale.checkpoint.storage import read_index
    from megascale.checkpoint.tensors import Tensors

    key, found = "embedding.word_embeddings.weight", find_at(folder)
    read = Tensors(found)
    assert read.read(key).shape == read.shapes[key]
    return {"stored": read_index(found.folder).tensors[key].size[0], "read": read.shapes[key][0]}


@pytest.mark.parametrize("words", [("zero", "--factor", 2), ("width",)], ids=["zero", "width"])
def test_it_grows_to_a_model_of_its_ids(ranks: Any, made: Path, words: tuple[object, ...]) -> None:
    assert ranks(1, rows_of, made / "run")[0] == {"stored": 384, "read": 257}
    done(ranks, made, "grow", "run", "--operator", *words, "--optimizer", "grow", "--out", "big")
    assert ranks(1, rows_of, made / "big")[0] == {"stored": 257, "read": 257}
    config = (made / "config.yaml").read_text().splitlines(keepends=True)
    (made / "next.yaml").write_text("".join(one for one in config if "model:" not in one))
    options = ("start.optimizer=keep", "run_dir=next", "train.stop_after_steps=1")
    said = done(ranks, made, "branch", "big", "next.yaml", *options, "parallel.tensor=2", world=2)
    assert "done: 1 steps" in said and "the loss will change" not in said


def test_its_files_are_read(ranks: Any, made: Path) -> None:
    said = done(ranks, made, "status", "run")
    assert "step 8 of 8" in said and "loss 5.2727" in said
    assert "wrote run/plots/loss.png" in done(ranks, made, "plot", "run")
    assert done(ranks, made, "checkpoint", "verify", "run").count(": good") == 2
    assert str(made / "run") in done(ranks, made, "lineage", "run")
