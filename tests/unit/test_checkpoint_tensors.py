"""Checkpoints written and read as global tensors, without ranks."""

import os
import re
import sys

import pytest

from megascale.errors import UserError


@pytest.fixture(scope="module")
def tools():
    """The modules that need torch and megatron-core."""
    from megascale.runtime import distributed

    distributed.prepare_device("cpu")
    from megascale.checkpoint import load, manifest, tensors

    return load, manifest, tensors


def pieces(tensors):
    """Three layers, one piece each, and a vector."""
    import torch

    for layer in range(3):
        stack = torch.arange(8.0).view(1, 4, 2) + 100 * layer
        yield tensors.Piece("decoder.layers.w", (3, 4, 2), (layer, 0, 0), stack)
    yield tensors.Piece.whole("norm", torch.ones(5, dtype=torch.bfloat16))


def test_what_is_written_is_read(tools, tmp_path):
    import torch

    load, manifest, tensors = tools
    position = manifest.Position(0, 7, 1, "seed: 1\n", {})
    tensors.write_checkpoint(tmp_path / "out", pieces(tensors), position)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = load.find_at(tmp_path / "out")
    assert found.manifest.position == position
    stored = tensors.Tensors(found)
    assert stored.shapes == {"decoder.layers.w": (3, 4, 2), "norm": (5,)}
    assert stored.read("norm").equal(torch.ones(5, dtype=torch.bfloat16))
    assert stored.read("decoder.layers.w", (2,), (1,)).shape == (1, 4, 2)
    assert stored.read("decoder.layers.w", (1, 3), (2, 1)).tolist() == [[[106, 107]], [[206, 207]]]
    with pytest.raises(KeyError):
        stored.read("nothing")


def test_a_checkpoint_is_whole_or_not_there(tools, tmp_path):
    load, manifest, tensors = tools
    position = manifest.Position(0, 0, 1, "", {})
    lacking = list(pieces(tensors))[1:]
    with pytest.raises(RuntimeError, match=r"decoder\.layers\.w: 16 elements"):
        tensors.write_checkpoint(tmp_path / "out", lacking, position)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists; choose another"):
        tensors.write_checkpoint(tmp_path / "out", pieces(tensors), position)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load.find_at(tmp_path / "out")


def test_damage_is_found(tools, tmp_path):
    load, manifest, tensors = tools
    folder = tmp_path / "out"
    tensors.write_checkpoint(folder, pieces(tensors), manifest.Position(0, 0, 1, "", {}))
    data = folder / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="checksum differs"):
        load.find_at(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are in Linux's /proc")
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tools, tmp_path, monkeypatch):
    _, manifest, tensors = tools
    done, out = [], tmp_path / "out"
    for name in ("fsync", "rename"):
        honest = getattr(os, name)

        def noted(first, *others, name=name, honest=honest):
            place = os.path.realpath(f"/proc/self/fd/{first}" if name == "fsync" else first)
            honest(first, *others)
            place = re.sub(r"(\.tmp-out)-[0-9a-f]{16}", r"\1", place)  # the unfinished folder
            place = re.sub(r"\.tmp-([^/]*)-[0-9a-f]{16}$", r"\1", place)  # an unfinished file
            done.append((name, os.path.relpath(place, tmp_path.resolve())))

        monkeypatch.setattr(os, name, noted)
    tensors.write_checkpoint(out, pieces(tensors), manifest.Position(0, 0, 1, "", {}))
    files = ["__0_0.distcp", ".metadata", "metadata.json", "common.pt", "manifest.json"]
    assert done == [
        *(("fsync", f".tmp-out/{name}") for name in files),
        ("fsync", ".tmp-out"),
        ("rename", ".tmp-out"),
        ("fsync", "."),
    ]
