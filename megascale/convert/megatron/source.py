"""A checkpoint of Megatron on disk: its folder, and its files beside the tensors."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale.checkpoint.load import MEGATRON_FILES
from megascale.checkpoint.manifest import MANIFEST
from megascale.checkpoint.storage import METADATA, Index, read_index
from megascale.convert.megatron.pickles import IndexUnpickler, read_saved, read_saved_file
from megascale.errors import UserError
from megascale.parsing import parse_yaml, read_json, read_yaml_text
from megascale.reading import MOST_TEXT_BYTES, open_regular, read_whole

LATEST, RUN_CONFIG = MEGATRON_FILES
"""The first is beside the folders of iterations; the second is Megatron-Bridge's."""
BACKEND, COMMON, TRAIN_STATE = "metadata.json", "common.pt", "train_state.pt"
COMMON_KEY = "common_state/shard_0_1"
"""Where megatron-core 0.17 and later keep what `common.pt` held before."""
PER_RANK = "mp_rank_*"
"""Folders of Megatron's older format, with one pickle for each rank."""


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like a checkpoint of Megatron, of any format."""
    names = (LATEST, BACKEND, METADATA, COMMON, RUN_CONFIG)
    is_foreign = any((path / name).exists() for name in names) or any(path.glob(PER_RANK))
    return is_foreign and not (path / "config.json").exists()


@dataclass(frozen=True)
class Source:
    """A `torch_dist` checkpoint, whose tensors have not been read."""

    folder: Path
    index: Index
    common: Mapping[str, Any]
    """What Megatron saved beside the tensors: arguments, iteration, settings of the optimizer."""
    run_config: Mapping[str, Any]
    """Of Megatron-Bridge; empty where there is none."""
    progress: Mapping[str, Any]
    """Of Megatron-Bridge: iteration and samples; empty where there is none."""

    @staticmethod
    def open(path: Path) -> Source:
        """Find the checkpoint at `path`: its own folder, or the folder of its iterations.

        Raises UserError for any other format, and where a file is refused or missing.
        """
        folder = folder_of(path)
        _require_format(folder)
        index = read_index(folder, IndexUnpickler)
        _require_files(folder, index)
        state = folder / TRAIN_STATE
        return Source(
            folder,
            index,
            _mapping(_common(folder, index), folder / COMMON),
            _read_yaml(folder / RUN_CONFIG),
            _mapping(read_saved_file(state), state) if state.exists() else {},
        )


def folder_of(path: Path) -> Path:
    """The folder of a checkpoint: `path`, or its latest iteration.

    Raises UserError where that folder is missing.
    """
    if not (path / LATEST).exists():
        return path
    try:
        word = read_whole(path / LATEST, MOST_TEXT_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        word = ""
    if word != "release" and not (word.isdigit() and len(word) < 19):
        raise UserError(f"{path / LATEST} names no iteration; give the folder of one, iter_*")
    folder = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not folder.is_dir():
        raise UserError(f"{path / LATEST} names {folder.name}, which is not there")
    return folder


def _require_format(folder: Path) -> None:
    """Raise UserError unless the folder is in the `torch_dist` format."""
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} is a checkpoint of megascale already; runs start from it as is")
    if any(folder.glob(PER_RANK)):
        raise UserError(
            f"{folder} is in Megatron's format `torch`, with a pickle for each rank, which is not "
            "read; load it with Megatron-LM and convert it: --ckpt-convert-format torch_dist "
            "--ckpt-convert-save DIR"
        )
    try:
        backend = _mapping(read_json(folder / BACKEND), folder / BACKEND).get("sharded_backend")
    except OSError as error:
        raise UserError(
            f"{folder / BACKEND}: {error.strerror}; a checkpoint of megatron-core has it, so this "
            "is another format, or was not written to its end"
        ) from None
    if backend != "torch_dist":
        raise UserError(
            f"{folder} is in the format {str(backend)[:40]!r}, which is not read; load it with "
            "Megatron and save it with --ckpt-format torch_dist"
        )


def _require_files(folder: Path, index: Index) -> None:
    """Raise UserError where a file that the index names is missing or too short."""
    ends: dict[str, int] = {}
    for place in index.metadata.storage_data.values():
        ends[place.relative_path] = max(
            ends.get(place.relative_path, 0), place.offset + place.length
        )
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; copy the checkpoint again, with all its files")
        if path.stat().st_size < end:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes of {end:,}; copy the checkpoint again"
            )


def _common(folder: Path, index: Index) -> Any:
    if (folder / COMMON).exists():
        return read_saved_file(folder / COMMON)
    for mark, place in index.metadata.storage_data.items():
        if mark.fqn == COMMON_KEY:
            path = folder / place.relative_path
            with open_regular(path) as file:
                file.seek(place.offset)
                return read_saved(io.BytesIO(file.read(place.length)), f"{COMMON_KEY} of {path}")
    raise UserError(f"{folder / COMMON} is missing; copy the checkpoint again, with all its files")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        return _mapping(parse_yaml(read_yaml_text(path), str(path)), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_description(path: Path) -> Mapping[str, Any]:
    """A YAML that a user has written. Raises UserError where it cannot be read."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    return _read_yaml(path)


def _mapping(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no mapping")
    return value


def named(tree: Any, name: str) -> Iterator[Any]:
    """All values under a key of nested mappings and lists."""
    if isinstance(tree, dict):
        if name in tree:
            yield tree[name]
        for value in tree.values():
            yield from named(value, name)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from named(value, name)
