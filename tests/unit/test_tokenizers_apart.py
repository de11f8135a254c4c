"""Sources whose ids mean other text to one another, or to the model that they continue."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megascale.cli import main
from megascale.config import dump_config, parse_config
from megascale.corpus.describe import describe, identity, tokenizer_mark
from megascale.errors import UserError
from megascale.train.eval_command import text_tokens
from megascale.train.export_command import tokenizer_folder, write_configs
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


def found_with(folder, **sources):
    """A checkpoint that has read these sources."""
    position = SimpleNamespace(cursor={"sources": sources} if sources else {})
    return SimpleNamespace(folder=folder, manifest=SimpleNamespace(position=position))


@pytest.mark.parametrize("model_ids, fits", [(280, True), (384, True), (279, False)])
def test_a_tokenizer_has_no_ids_that_the_model_lacks(corpora, tmp_path, model_ids, fits):
    from transformers import LlamaConfig

    from megascale.checkpoint.huggingface.tokenizer import write_tokenizer

    bpe, theirs = corpora["bpe"], LlamaConfig(vocab_size=model_ids)
    config = replace(run_of(), model=replace(run_of().model, vocab_size=model_ids))
    write_tokenizer(bpe, tmp_path, 64)
    if fits:
        assert text_tokens(found_with(tmp_path), config, str(bpe)).end_id < 280
        write_configs(theirs, tmp_path, bpe)
        return
    said = f"tokenizer of {bpe}: it has 280 ids, the model knows 279; give the one"
    with pytest.raises(UserError, match=said):
        text_tokens(found_with(tmp_path), config, str(bpe))
    with pytest.raises(UserError, match=said):
        write_configs(theirs, tmp_path, bpe)


def test_a_corpus_gives_its_tokenizer_while_it_is_what_was_read(corpora, tmp_path):
    config, held = run_of(corpora["bpe"]), identity(describe(str(corpora["bpe"])))
    assert tokenizer_folder(found_with(tmp_path, bpe=held), config, None) == corpora["bpe"]
    assert tokenizer_folder(found_with(tmp_path), config, None) == corpora["bpe"]
    other = found_with(tmp_path, bpe="4 documents of 9 tokens, content 0")
    assert tokenizer_folder(other, config, str(corpora["bpe"])) == corpora["bpe"]
    with pytest.raises(UserError, match="'bpe' held 4 documents.*now: 30 doc.*give --tokenizer"):
        tokenizer_folder(other, config, None)
