"""Megatron's pickles beside the tensors, read without importing or running what they name.

A class of Megatron, of its libraries or of torch becomes a class that keeps nothing (`Skipped`).
Plain values remain: numbers, texts, lists, mappings and the `Namespace` of arguments.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from megascale.checkpoint.pickles import RestrictedUnpickler, Skipped
from megascale.checkpoint.storage import one_line
from megascale.errors import UserError
from megascale.reading import open_regular

MOST_PICKLE_BYTES = 1 << 28
"""Most bytes of a pickle, which usually has some kilobytes."""
PLAIN: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): Namespace,
    ("types", "SimpleNamespace"): Namespace,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "getattr"): Skipped,  # a member of an enumeration, by Python before 3.11.4
    ("torch", "Size"): torch.Size,
}
SKIPPED = (
    "apex",
    "collections",
    "datetime",
    "enum",
    "functools",
    "megatron",
    "modelopt",
    "nemo",
    "numpy",
    "pathlib",
    "signal",
    "torch",
    "transformer_engine",
)
"""Packages whose classes and functions become `Skipped`: none of their modules is imported."""
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class IndexUnpickler(RestrictedUnpickler):
    """For `.metadata`: the classes of its tensors; all else of torch becomes `Skipped`."""

    def find_class(self, module: str, name: str) -> Any:
        """A listed class, or one that keeps nothing. Raises pickle.UnpicklingError for others."""
        try:
            return super().find_class(module, name)
        except pickle.UnpicklingError:
            return _plain(module, name)


def _plain(module: str, name: str) -> Any:
    """A class of `PLAIN`, or a stand-in. Raises pickle.UnpicklingError for any other name."""
    if (module, name) in PLAIN:
        return PLAIN[module, name]
    if module.partition(".")[0] not in SKIPPED:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not read")
    return type(name, (Skipped,), {"__module__": module})


@dataclass(frozen=True)
class _Storage:
    """Values of a tensor in the file, which are read only where they are needed."""

    archive: zipfile.ZipFile
    name: str
    dtype: torch.dtype | None

    def value(self, place: int) -> Any:
        """The number at `place`. Raises KeyError, ValueError."""
        if self.dtype is None:
            return Skipped()
        size = self.dtype.itemsize
        with self.archive.open(self.name) as stream:
            stream.seek(place * size)
            return torch.frombuffer(bytearray(stream.read(size)), dtype=self.dtype)[0].item()


class _CommonUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        """A plain class, a stand-in, or the function that makes a tensor a number."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _number
        if module == "torch" and name in _DTYPES:
            return partial(_Storage, dtype=_DTYPES[name])
        return _plain(module, name)

    def persistent_load(self, mark: Any) -> Any:
        """A storage of the file."""
        kind, key = mark[1], str(mark[2])
        name = f"{self._folder}data/{key}"
        if isinstance(kind, partial):
            return _Storage(self._archive, name, kind.keywords["dtype"])
        return _Storage(self._archive, name, None)


def _number(storage: Any, place: Any, size: Any, *_: Any) -> Any:
    """The value of a tensor of one element; other tensors become `Skipped`."""
    is_single = isinstance(storage, _Storage) and all(count == 1 for count in size)
    return storage.value(int(place)) if is_single else Skipped()


def read_saved(file: IO[bytes], where: str) -> Any:
    """The plain values that `torch.save` has written; `where` begins errors.

    Tensors of one element become numbers. Raises UserError for another format, and where the
    pickle asks for a class that is not listed: nothing in it is executed.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (pickled,) = [one for one in archive.infolist() if one.filename.endswith("/data.pkl")]
            if pickled.file_size > MOST_PICKLE_BYTES:
                raise ValueError(f"its pickle has more than {MOST_PICKLE_BYTES:,} bytes")
            folder = pickled.filename.removesuffix("data.pkl")
            return _CommonUnpickler(archive, folder, archive.read(pickled)).load()
    except zipfile.BadZipFile:
        raise UserError(f"{where} is refused: it is damaged, or older than torch 1.6") from None
    except Exception as error:  # a forged pickle can raise anything
        raise UserError(f"{where} is refused: {one_line(error)}") from None


def read_saved_file(path: Path) -> Any:
    """`read_saved` of a file. Raises UserError also where there is none."""
    try:
        with open_regular(path) as file:
            return read_saved(file, str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
