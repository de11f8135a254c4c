"""Sources whose ids mean other text to one another, or to the model that they continue."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megascale.cli import main
from megascale.config import dump_config, parse_config
from megascale.corpus.describe import tokenizer_mark
from megascale.train.start import tokenizers_apart


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """Corpora of a few texts, by tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"text number {number} says so\n" * 20)
    kinds = {"bytes": "bytes", "bpe": "bpe", "same": "bpe", "other": "bpe"}
    for name, kind in kinds.items():
        tokenizer = {"kind": kind}
        if kind == "bpe":
            tokenizer["vocab_size"] = 270 if name == "other" else 280
        inputs = [{"kind": "files", "paths": [str(folder / "*.txt")]}]
        recipe = {"name": "few", "inputs": inputs, "tokenizer": tokenizer}
        recipe |= {"description": "a few texts", "licence": "none"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["prepare", str(folder / f"{name}.yaml"), "--out", str(folder / name)]) == 0
    return {name: folder / name for name in kinds}


def run_of(*sources: Path):
    text = {"data": {"sources": {one.name: {"path": str(one)} for one in sources}}}
    return parse_config(yaml.safe_dump(text))


def test_marks_tell_tokenizers_apart(corpora, tmp_path):
    marks = {name: tokenizer_mark(path) for name, path in corpora.items()}
    assert marks["bytes"] == "bytes" and marks["bpe"] == marks["same"] != marks["other"]
    assert tokenizer_mark(tmp_path) is None


def test_sources_of_two_tokenizers_are_warned_of(corpora):
    assert list(tokenizers_apart(run_of(corpora["bpe"], corpora["same"]))) == []
    [warning] = tokenizers_apart(run_of(corpora["bytes"], corpora["bpe"]))
    assert "was made by another tokenizer than" in warning


@pytest.mark.parametrize("new, warned", [("same", False), ("bytes", True), ("other", True)])
def test_a_model_of_another_tokenizer_is_warned_of(corpora, tmp_path, new, warned):
    manifest = {
        "format": 1,
        "position": {"step": 1, "tokens_seen": 1, "seed": 1, "cursor": {},
                     "config": dump_config(run_of(corpora["bpe"]))},
        "optimizer_steps": 1, "layout": {}, "versions": {}, "files": {},
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    config = run_of(corpora[new])
    config = replace(config, start=replace(config.start, checkpoint=str(tmp_path)))
    found = list(tokenizers_apart(config))
    assert len(found) == warned
    if warned:
        assert "knows another tokenizer than the sources were made by" in found[0]
