"""Unpickling files of unknown origin: only the listed classes, and no code of the file."""

from __future__ import annotations

import pickle
from enum import Enum, EnumType
from typing import Any

import torch

SAFE_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"}
    | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
"""By module, the classes and functions of checkpoint metadata."""


class Skipped:
    """In the place of an object that is not needed. It keeps nothing of the pickle."""

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def __hash__(self) -> int:
        return id(self)

    def append(self, _item: Any) -> None:
        """Of a list."""

    def extend(self, _items: Any) -> None:
        """Of a list."""

    def add(self, _item: Any) -> None:
        """Of a set."""


class RestrictedUnpickler(pickle.Unpickler):
    """Knows the classes of checkpoint metadata, and members of their enumerations."""

    def find_class(self, module: str, name: str) -> Any:
        """A listed class. Raises pickle.UnpicklingError for all else."""
        if (module, name) == ("builtins", "getattr"):
            return _member  # how Python before 3.11.4 writes a member of an enumeration
        if name not in SAFE_GLOBALS.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which it has no need of")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Enum:
    """A member of an enumeration. Raises pickle.UnpicklingError for any other attribute."""
    if not (isinstance(kind, EnumType) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it asks for {name!r}, which is no member of an enumeration")
    member: Enum = kind.__members__[name]
    return member
