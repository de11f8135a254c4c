"""Shards: the bytes of megatron-core's builder, and what happens to damaged ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.corpus.shards import HEADER, MAGIC, Shard, ShardWriter, writing
from megascale.errors import UserError

DOCUMENTS = [[1, 2, 3, 0], [0], list(range(500)) + [0], [7, 0]]


@pytest.fixture(scope="module")
def megatron():
    import torch

    from megascale.runtime import cpu

    if not torch.cuda.is_available():
        cpu.install()
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def _write(prefix, dtype=np.uint16, documents=DOCUMENTS):
    with writing(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document))
    return prefix


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_same_bytes_as_megatron(megatron, tmp_path, dtype):
    import torch

    documents = [[token % 200 for token in document] for document in DOCUMENTS]
    _write(tmp_path / "ours", dtype, documents)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        ours, theirs = ((tmp_path / f"{who}.{ending}").read_bytes() for who in ("ours", "theirs"))
        assert ours == theirs


def test_megatron_reads_ours(megatron, tmp_path):
    theirs = megatron.IndexedDataset(str(_write(tmp_path / "ours")))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS


def test_reads_megatron_documents_of_several_sequences(megatron, tmp_path):
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    for sequences in ([[1, 2], [3]], [[4, 5, 6]], [[7], [8], [9]]):
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "x.idx"))
    shard = Shard.open(tmp_path / "x")
    assert [shard.read(i).tolist() for i in range(3)] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert shard.num_tokens == 9


@settings(max_examples=100)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=3), max_size=3), max_size=6
    )
)
def test_reads_what_megatron_writes(megatron, tmp_path, documents):
    """Documents of none, one and several sequences, in any order."""
    import torch

    for path in tmp_path.iterdir():
        path.unlink()  # not written over: shards of the example before may still be mapped
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "x.idx"))
    shard = Shard.open(tmp_path / "x")
    wanted = [sum(sequences, []) for sequences in documents]
    assert [shard.read(i).tolist() for i in range(shard.num_documents)] == wanted
    assert shard.num_tokens == sum(map(len, wanted))


@pytest.mark.parametrize(
    "bounds",
    [[0, 3, 2, 3], [0, 9, 9, 3], [1, 2, 3], [0, 1, 2], [3, 0], [], [0, -(2**63), 2**41, 3]],
)
def test_bounds_that_cannot_be(tmp_path, bounds):
    """Also where their number is that of documents of one sequence each."""
    lengths, offsets = np.array([2, 3, 1], "<i4"), np.array([0, 4, 10], "<i8")
    parts = (lengths, offsets, np.array(bounds, "<i8"))
    header = HEADER.pack(MAGIC, 1, 8, len(lengths), len(bounds))
    (tmp_path / "x.idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    (tmp_path / "x.bin").write_bytes(bytes(12))
    with pytest.raises(UserError, match="do not cover"):
        Shard.open(tmp_path / "x")


def test_a_document_too_long_for_the_format(tmp_path, monkeypatch):
    monkeypatch.setattr("megascale.corpus.shards.MOST_TOKENS", 3)
    with pytest.raises(UserError, match="document 1 of .* 4 tokens and the format holds 3"):
        _write(tmp_path / "x", documents=[[1, 2, 3], [1, 2, 3, 4]])


def test_reads_parts_of_a_document(tmp_path):
    shard = Shard.open(_write(tmp_path / "x"))
    assert shard.num_documents == 4
    assert shard.read(2, 490, 5).tolist() == [490, 491, 492, 493, 494]
    assert shard.read(1).tolist() == [0]
    for start, count in ((-1, 1), (0, 502), (500, 2)):
        with pytest.raises(IndexError):
            shard.read(2, start, count)


def test_nothing_appears_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), writing(tmp_path / "x", np.uint16) as writer:
        writer.add(np.array([1]))
        raise RuntimeError
    assert not (tmp_path / "x.bin").exists() and not (tmp_path / "x.idx").exists()


def test_an_empty_shard(tmp_path):
    ShardWriter(tmp_path / "x", np.uint16).close()
    assert Shard.open(tmp_path / "x").num_documents == 0


@pytest.mark.parametrize("ending, left", [("bin", 10), ("bin", 0), ("idx", 30), ("idx", 100)])
def test_cut_short(tmp_path, ending, left):
    _write(tmp_path / "x")
    path = tmp_path / f"x.{ending}"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=f"x.{ending}"):
        Shard.open(tmp_path / "x")


def test_a_multimodal_index_is_named(megatron, tmp_path):
    import torch

    builder = megatron.IndexedDatasetBuilder(
        str(tmp_path / "x.bin"), dtype=np.uint16, multimodal=True
    )
    for tokens, mode in (([1, 2], 0), ([3], 1), ([4, 5, 6], 0)):
        builder.add_item(torch.tensor(tokens), mode)
        builder.end_document()
    builder.finalize(str(tmp_path / "x.idx"))
    with pytest.raises(UserError, match=r"x\.idx: is a multimodal index .* without modes"):
        Shard.open(tmp_path / "x")


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        Shard.open(tmp_path / "x")
    _write(tmp_path / "x")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(UserError, match="belongs beside"):
        Shard.open(tmp_path / "x")


@settings(max_examples=300)
@given(data=st.data())
def test_a_mutated_index_is_refused_or_readable(tmp_path, data):
    whole = (_write(tmp_path / "x"), (tmp_path / "x.idx").read_bytes())[1]
    raw = bytearray(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            at = data.draw(st.integers(0, len(raw) - 1))
            few = data.draw(st.binary(min_size=1, max_size=8))
            raw[at : at + len(few)] = few[: len(raw) - at]
    (tmp_path / "x.idx").unlink()
    (tmp_path / "x.idx").write_bytes(raw)
    try:
        shard = Shard.open(tmp_path / "x")
    except UserError:
        assert bytes(raw) != whole
        return
    for document in range(shard.num_documents):
        assert len(shard.read(document)) == shard.lengths[document]
