"""Nothing that a checkpoint says of itself leads out of its folder."""

import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from megascale.checkpoint.manifest import FileSum
from megascale.checkpoint.pickles import RestrictedUnpickler
from megascale.checkpoint.storage import (
    Entry,
    Written,
    read_index,
    write_index,
    write_tensors,
)
from megascale.errors import UserError

OUTSIDE = ["../out.distcp", "/etc/passwd", "a/../../out.distcp", "sub/out.distcp", "..", ""]


def indexed(folder, file):
    """An index that says one tensor is in `file`."""
    entries = [[Entry("weight", (2,), torch.float32, (0,), (2,))]]
    folder.mkdir(exist_ok=True)
    write_index(folder, entries, [Written(file, FileSum(1, "0"), ((0, 1),))])
    return folder


@pytest.mark.parametrize("file", OUTSIDE)
def test_tensors_are_in_the_folder(tmp_path, file):
    with pytest.raises(UserError, match="is refused"):
        read_index(indexed(tmp_path / "checkpoint", file))


def test_a_plain_name_is_fine(tmp_path):
    assert set(read_index(indexed(tmp_path / "checkpoint", "__0_0.distcp")).tensors) == {"weight"}


def test_writing_makes_no_folder_but_its_own(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "gone/checkpoint", 0, [torch.zeros(2)])
    assert not list(tmp_path.iterdir())


class Old:
    """A member of an enumeration as Python before 3.11.4 writes it."""

    def __init__(self, kind, name):
        self.of = (kind, name)

    def __reduce__(self):
        return getattr, self.of


def unpickled(value):
    return RestrictedUnpickler(io.BytesIO(pickle.dumps(value))).load()


def test_members_of_enumerations_are_read_as_every_python_writes_them():
    for member in _MEM_FORMAT_ENCODING:
        assert unpickled(Old(_MEM_FORMAT_ENCODING, member.name)) is member
    for kind, name in (
        (_MEM_FORMAT_ENCODING, "mro"),
        (_MEM_FORMAT_ENCODING, "__init_subclass__"),
        (Metadata, "__init__"),
        (torch.Size, "__class__"),
    ):
        with pytest.raises(pickle.UnpicklingError, match="no member of an enumeration"):
            unpickled(Old(kind, name))
