"""Names in indexes that somebody else may have written stay in their folder."""

import json

import pytest
from tokenizer_files import byte_bpe

from megascale.convert.huggingface.model_files import INDEX, ModelFiles
from megascale.convert.huggingface.tokenizer_folder import copy_tokenizer
from megascale.corpus.prepare import prepare
from megascale.corpus.recipe import InputConfig, Recipe, TokenizerConfig
from megascale.corpus.sources import describe, read_corpus_file
from megascale.errors import UserError

OUTSIDE = ["../secret", "/etc/hostname", "a/../../secret", "..", ".", "", "a//b", "a\0b"]


@pytest.mark.parametrize("name", [*OUTSIDE, "sub/model.safetensors", 7, None])
def test_shards_of_a_model(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(UserError, match="is no index of tensors and files; copy the model again"):
        ModelFiles.open(tmp_path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "in.txt").write_text("some text to be prepared\n" * 20)
    (folder / "secret").write_text("secret")
    texts = InputConfig(kind="files", paths=(str(folder / "in.txt"),))
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=260)
    prepare(Recipe(name="x", inputs=(texts,), tokenizer=tokenizer), folder / "out", processes=1)
    return folder / "out"


def test_files_of_a_corpus_may_be_in_folders_of_it(corpus):
    assert "tokenizer/tokenizer.json" in read_corpus_file(corpus)["files"]
    assert describe(str(corpus)).train == str(corpus / "train")


@pytest.mark.parametrize("name", OUTSIDE)
def test_files_of_a_corpus(corpus, name):
    path = corpus / "corpus.json"
    before = path.read_text()
    facts = json.loads(before)
    facts["files"][name] = {"bytes": 6, "sha256": "0" * 64}
    path.write_text(json.dumps(facts))
    try:
        with pytest.raises(UserError, match="not a corpus file of format"):
            read_corpus_file(corpus)
    finally:
        path.write_text(before)


def test_a_tokenizer_brings_no_file_of_elsewhere(tmp_path):
    secret, source = tmp_path / "id_rsa", tmp_path / "model"
    secret.write_text("secret")
    source.mkdir()
    byte_bpe().save(str(source / "tokenizer.json"))
    (source / "merges.txt").symlink_to(secret)
    with pytest.raises(UserError, match="id_rsa, outside its folder; copy the file there"):
        copy_tokenizer(source, tmp_path / "out")
    (source / "merges.txt").unlink()
    (source / "vocab.json").symlink_to("tokenizer.json")
    assert copy_tokenizer(source, tmp_path / "out")


def test_a_cache_of_hugging_face_is_made_of_links(tmp_path):
    blobs, source = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/abc"
    blobs.mkdir(parents=True)
    source.mkdir(parents=True)
    byte_bpe().save(str(blobs / "1234"))
    (source / "tokenizer.json").symlink_to("../../blobs/1234")
    (tmp_path / "hub").symlink_to(tmp_path / "models--x")
    for folder in (source, tmp_path / "hub/snapshots/abc"):
        assert copy_tokenizer(folder, tmp_path / "out")
    (source / "merges.txt").symlink_to("../../../secret")
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(UserError, match="outside its folder"):
        copy_tokenizer(source, tmp_path / "out")
