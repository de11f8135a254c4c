"""How much of a held-out set a run scores, what it says of it, and resumes of older runs."""

import json
import math

import numpy as np
from test_train import command

from megascale.corpus.heldout import choose_part
from megascale.corpus.shards import Shard
from megascale.corpus.sources import describe

TOKENS = 4000


def make(folder):
    """A corpus of bytes, of long documents in letters of two and three bytes; a config."""
    draws = np.random.default_rng(0)
    texts = ["".join(draws.choice(list("漢字äöü abc"), 1500)) for _ in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(
        f"name: x\nheldout_fraction: 0.3\ntokenizer: {{kind: bytes}}\n"
        f"inputs: [{{kind: jsonl, paths: [{folder}/texts.jsonl]}}]\n"
    )
    assert command("prepare", folder / "recipe.yaml", "--out", folder / "corpus")[0] == 0
    (folder / "config.yaml").write_text(
        f"run_dir: {folder}/run\n"
        "model: {num_layers: 1, hidden_size: 16, num_heads: 2}\n"
        f"data: {{sources: {{long: {{path: {folder}/corpus}}}}, context_tokens: 64,\n"
        "  global_batch_tokens: 1024}\n"
        "optim: {lr: 1.0e-2}\ntrain: {tokens: 4096, precision: fp32, threads: 1}\n"
        f"eval: {{every_steps: 1, tokens: {TOKENS}}}\nmonitor: {{tensorboard: false}}\n"
    )


def train(ranks, world, folder, *words):
    status, said = ranks(world, command, "train", folder / "config.yaml", *words, timeout_s=400)[0]
    assert status == 0, said
    path = folder / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return said, [row["eval"]["long"] for row in rows if "eval" in row]


def test_what_is_scored_is_said_and_recorded(ranks, tmp_path):
    make(tmp_path)
    heldout = Shard.open(tmp_path / "corpus/heldout")
    part = choose_part(describe(str(tmp_path / "corpus")), 64, TOKENS)
    read = [heldout.read(d, start, count) for d, start, count in part.spans_n3.tolist()]
    num_bytes = sum(int((ids < 256).sum()) for ids in read)
    whole = f"{heldout.num_tokens:,} tokens"
    status, said = command("plan", tmp_path / "config.yaml")
    assert status == 0 and f"about {TOKENS:,} of {whole}, in {part.documents} of " in said, said

    said, scores = train(ranks, 2, tmp_path, "train.stop_after_steps=2")
    assert f"held-out long: every evaluation scores {part.tokens:,} of {whole}, in " in said
    assert f"bits/byte, {part.tokens:,} of {whole}" in said and "do not compare" not in said
    for score in scores:
        assert 0.95 * TOKENS <= score["tokens"] == part.tokens <= TOKENS
        assert (score["documents"], score["set_documents"]) == (part.documents, part.set_documents)
        assert score["set_tokens"] == heldout.num_tokens and score["part"] == part.mark
        bits = score["loss"] * score["tokens"] / math.log(2)
        assert score["bits_per_byte"] == bits / num_bytes

    said, more = train(ranks, 1, tmp_path, "train.stop_after_steps=3", "--resume", "auto")
    assert "do not compare" not in said and [one["part"] for one in more] == [part.mark] * 3
    _as_an_older_version(tmp_path / "run" / "metrics.jsonl")
    said, more = train(ranks, 1, tmp_path, "--resume", "auto")
    assert "warning: evaluations of 'long' so far scored another part of its held-out set" in said
    assert "(1,074 tokens); their losses do not compare with those from here on" in said
    assert [one["tokens"] for one in more] == [1074] * 3 + [part.tokens]


def _as_an_older_version(path):
    """Turn the evaluations of a record into those of fewer documents, without their mark."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "eval" in row:
            score = row["eval"]["long"]
            kept = {name: score[name] for name in ("loss", "bits_per_byte")}
            row["eval"]["long"] = {**kept, "tokens": 1074}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
