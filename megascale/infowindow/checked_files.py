"""Files of this package: safetensors with a kind, a version and a checksum, and nothing to run."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megascale.errors import UserError
from megascale.parsing import parse_json
from megascale.runtime import files
from megascale.runtime.outputs import Kind

VERSION = 1
METADATA = "megascale"
_MOST_HEADER_BYTES = 1 << 20
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    arrays: Arrays
    facts: Mapping[str, Any]
    digest: str
    """SHA-256 of arrays and facts."""


def digest_of(kind: str, arrays: Arrays, facts: Mapping[str, Any]) -> str:
    """SHA-256 of the content, whatever the order in which a file keeps it."""
    whole = hashlib.sha256(json.dumps([kind, VERSION, facts], sort_keys=True).encode())
    for name in sorted(arrays):
        one = np.ascontiguousarray(arrays[name])
        whole.update(json.dumps([name, one.dtype.str, one.shape]).encode())
        whole.update(one.tobytes())
    return whole.hexdigest()


def require_file(path: Path) -> None:
    """Raises UserError where a file cannot have this name: no folder for it, or not a file there,
    such as a folder, or a device, which a file would take the place of."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: no such folder; make it, or choose another place")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: there, and not a file; choose another name")


@contextmanager
def output_file(path: Path) -> Iterator[BinaryIO]:
    """As `runtime.files.whole_file`. Raises UserError where `path` cannot be written."""
    try:
        require_file(path)
        with files.whole_file(path) as write:
            yield write
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be made: {error.strerror or error}; choose another place")


def make_place(path: Path) -> None:
    """Make the folder of a file to be. Raises UserError where the file cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_file(path)
        probe = files.unfinished_file(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def write_arrays(path: Path, kind: str, arrays: Arrays, facts: Mapping[str, Any]) -> str:
    """Write a file that appears whole or not at all; its digest. Raises UserError."""
    from safetensors.numpy import save

    digest = digest_of(kind, arrays, facts)
    said = {"kind": kind, "version": VERSION, "sha256": digest, "facts": facts}
    # under one key, since the library writes several in any order
    metadata = {METADATA: json.dumps(said, sort_keys=True)}
    whole = {name: np.ascontiguousarray(one) for name, one in arrays.items()}
    make_place(path)
    with output_file(path) as file:
        file.write(save(whole, metadata=metadata))
    return digest


def files_of(kind: str) -> Kind:
    """Files that say that they are of a kind, whatever their version."""

    def fits(path: Path) -> bool:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(size, _MOST_HEADER_BYTES)), str(path))
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        said = metadata.get(METADATA) if isinstance(metadata, dict) else None
        return isinstance(said, str) and f'"kind": "{kind}"' in said

    return Kind(f"a file of {kind}", fits)


def read_arrays(path: Path, kind: str, made_by: str) -> Content:
    """Read a file of a kind; `made_by` is the command that makes one.

    Raises UserError for what is missing, cannot be read, of another kind or version, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    again = f"make it with {made_by}"
    _require_readable(path, made_by)
    try:
        with safe_open(str(path), framework="numpy") as file:
            said = parse_json((file.metadata() or {}).get(METADATA, "{}").encode(), str(path))
            _require(path, kind, said, again)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = said["facts"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged or no {kind} file; {again}") from None
    digest = digest_of(kind, arrays, facts)
    if digest != said.get("sha256"):
        raise UserError(f"{path}: damaged, its checksum is not that of its content; {again}")
    return Content(arrays, facts, digest)


def _require_readable(path: Path, made_by: str) -> None:
    """Raises UserError for all but a file that can be opened; does not wait for pipes."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise UserError(f"{path}: {what}; give the file that {made_by} wrote")
        with open(path, "rb") as file:
            file.read(1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make it with {made_by}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that can be read") from None


def _require(path: Path, kind: str, said: Mapping[str, Any], again: str) -> None:
    if said.get("kind") != kind:
        raise UserError(f"{path}: holds {said.get('kind', 'something else')}, no {kind}; {again}")
    if said.get("version") != VERSION:
        raise UserError(
            f"{path}: {kind} of version {said.get('version')}, this program reads version "
            f"{VERSION}; {again}"
        )
