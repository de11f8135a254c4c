"""Sources whose ids mean other text to one another, or to the model that they continue."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megascale.cli import main
from megascale.config import dump_config, finalize, parse_config
from megascale.convert.huggingface.model_folder import write_configs
from megascale.corpus.sources import SourceInfo, describe, identity
from megascale.corpus.tokenizer_mark import mark_of, tokenizer_mark
from megascale.errors import UserError
from megascale.run.checkpoint_tokenizer import text_tokens, tokenizer_folder
from megascale.run.resolve import load_run
from megascale.run.same_tokenizer import require_same_tokenizer, warn_if_tokenizers_differ


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


def warnings_of(config) -> list[str]:
    infos = {name: SourceInfo.of(one) for name, one in config.data.sources.items()}
    return list(warn_if_tokenizers_differ(config, infos))


def test_marks_tell_tokenizers_apart(corpora, tmp_path):
    marks = {name: tokenizer_mark(path) for name, path in corpora.items()}
    assert marks["bytes"] == "bytes" and marks["bpe"] == marks["same"] != marks["other"]
    assert tokenizer_mark(tmp_path) is None


def config_file(folder, *sources, **data) -> Path:
    known = {name: {"path": str(path)} for name, path in ((one.name, one) for one in sources)}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"data": {"sources": known} | data}))
    return path


def test_sources_of_two_tokenizers_are_an_error(corpora, tmp_path):
    load_run(config_file(tmp_path, corpora["bpe"], corpora["same"]))
    mixed = config_file(tmp_path, corpora["same"], corpora["bytes"], corpora["bpe"])
    said = "sources 'bpe' and 'bytes' were made by different tokenizers .vocabularies .* and bytes"
    with pytest.raises(UserError, match=f"{said}.*data.allow_different_tokenizers=true"):
        load_run(mixed)
    meant = load_run(mixed, ["data.allow_different_tokenizers=true"])
    [warning] = warn_if_tokenizers_differ(meant.config, meant.sources)
    assert "sources 'bpe' and 'bytes'" in warning and "the same ids mean other text" in warning


def test_a_source_that_is_only_evaluated_counts_too(corpora, tmp_path):
    only = [{"blend": {"bpe": 1, "other": 0}}]
    with pytest.raises(UserError, match="'bpe' and 'other' were made by different tokenizers"):
        load_run(config_file(tmp_path, corpora["bpe"], corpora["other"], stages=only))


def test_replay_counts_where_it_is_blended(corpora):
    text = {"sources": {name: {"path": str(corpora[name])} for name in ("bpe", "bytes")}}
    config = finalize(parse_config(yaml.safe_dump({"data": text})), {"bpe": 1, "bytes": 1}, 300)
    replay = replace(config.data.sources["bytes"], replay=True)
    sources = {"bpe": config.data.sources["bpe"], "replay/bytes": replay}
    infos = {name: SourceInfo.of(one) for name, one in sources.items()}
    for share, is_error in ((0, False), (0.25, True)):
        (stage,) = config.data.stages
        stages = (replace(stage, blend={"bpe": 1 - share, "replay/bytes": share}),)
        data = replace(config.data, sources=sources, stages=stages)
        run = replace(config, data=data)
        if is_error:
            with pytest.raises(UserError, match="'bpe' and 'replay/bytes'"):
                require_same_tokenizer(run, infos)
        else:
            require_same_tokenizer(run, infos)


def test_bare_shards_are_compared_by_the_ids_that_they_name(corpora, tmp_path):
    prefix = {"path": str(corpora["bytes"] / "train"), "vocab_size": 300}
    for ids, error in (
        ({"eod_id": 256}, None),
        ({"eod_id": 255}, "end-of-document ids 256 and 255"),
        ({"eod_id": 256, "bos_id": 7}, "ids before a document's first token 256 and 7"),
    ):
        sources = {"whole": {"path": str(corpora["bytes"])}, "bare": prefix | ids}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"data": {"sources": sources}}, sort_keys=False))
        if error is None:
            load_run(path)
        else:
            with pytest.raises(UserError, match=f"'whole' and 'bare'.*{error}"):
                load_run(path)


def test_bare_shards_of_a_prepared_corpus_are_compared_by_its_tokenizer(corpora, tmp_path):
    """`bpe` and `other` have ids in common, and the ends of documents too."""
    facts = {name: describe(str(corpora[name])) for name in ("bpe", "other")}
    ids = {"vocab_size": 300, "eod_id": facts["bpe"].eod_id}
    assert ids["eod_id"] == facts["other"].eod_id
    path, linked = tmp_path / "run.yaml", tmp_path / "elsewhere"
    linked.mkdir()
    for name in ("train", "heldout"):
        for ending in ("bin", "idx"):
            (linked / f"{name}.{ending}").symlink_to(corpora["other"] / f"{name}.{ending}")

    def load(**sources):
        path.write_text(yaml.safe_dump({"data": {"sources": sources}}, sort_keys=False))
        load_run(path)

    whole, same = {"path": str(corpora["bpe"])}, {"path": str(corpora["same"] / "train")} | ids
    load(whole=whole, bare=same)
    load(bare=same | {"heldout": str(corpora["bpe"] / "heldout")})
    for prefix in (corpora["other"] / "train", linked / "train"):
        other = {"path": str(prefix)} | ids
        for sources in ({"whole": whole, "bare": other}, {"whole": same, "bare": other}):
            with pytest.raises(UserError, match="'whole' and 'bare' were made .*vocabularies"):
                load(**sources)
    for heldout in (corpora["other"] / "heldout", linked / "heldout"):
        with pytest.raises(UserError, match=r"'bare' and 'bare \(heldout\)' were made by"):
            load(bare=same | {"heldout": str(heldout)})


def test_shards_beside_a_corpus_or_a_file_of_its_name_are_of_no_corpus(corpora, tmp_path):
    for ending in ("bin", "idx"):
        content = (corpora["other"] / f"train.{ending}").read_bytes()
        (tmp_path / f"own.{ending}").write_bytes(content)
    info = describe(str(tmp_path / "own"), None, 300, 256)
    facts = (corpora["bpe"] / "corpus.json").read_text()
    for text in (None, "[1]", "{", facts):
        if text is not None:
            (tmp_path / "corpus.json").write_text(text)
        assert mark_of(info).content is None


def test_a_tokenizer_file_of_another_form_is_the_same_tokenizer(corpora, tmp_path):
    """As other versions of the library write it: merges as text, spaces, another cut."""
    mark = tokenizer_mark(corpora["bpe"])
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    tree = json.loads((corpora["bpe"] / "tokenizer/tokenizer.json").read_text())
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    del tree["model"]["ignore_merges"]
    tree["truncation"] = {
        "max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"
    }  # fmt: skip
    path.write_text(json.dumps(tree, indent=3))
    assert tokenizer_mark(tmp_path) == mark
    for change in ({"normalizer": {"type": "Lowercase"}}, {"added_tokens": []}):
        path.write_text(json.dumps(tree | change))
        assert tokenizer_mark(tmp_path) not in (mark, None)


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
    found = warnings_of(config)
    assert len(found) == warned
    if warned:
        assert f"trained with another tokenizer than source '{new}'" in found[0]


def found_with(folder, **sources):
    """A checkpoint that has read these sources."""
    position = SimpleNamespace(cursor={"sources": sources} if sources else {})
    return SimpleNamespace(folder=folder, manifest=SimpleNamespace(position=position))


@pytest.mark.parametrize("model_ids, fits", [(280, True), (384, True), (279, False)])
def test_a_tokenizer_has_no_ids_that_the_model_lacks(corpora, tmp_path, model_ids, fits):
    from transformers import LlamaConfig

    from megascale.convert.huggingface.tokenizer_folder import write_tokenizer

    bpe, theirs = corpora["bpe"], LlamaConfig(vocab_size=model_ids)
    config = replace(run_of(), model=replace(run_of().model, vocab_size=model_ids))
    write_tokenizer(bpe, tmp_path, 64)
    if fits:
        assert max(text_tokens(found_with(tmp_path), config, str(bpe)).end_ids) < 280
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
