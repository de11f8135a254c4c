"""How a new run begins with what another one has learned, and where it goes on in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megascale.checkpoint.load import Found, read_manifest
from megascale.checkpoint.manifest import Position
from megascale.config import RunConfig, dump_config, load_config
from megascale.corpus.batches import Cursor, SourceCursor
from megascale.errors import UserError
from megascale.train.resume import changes

LINEAGE = "lineage.json"
"""File of a run_dir: the origin of the run."""
DECIDES_PIECES = ("seed", "data.context_tokens")
"""What must be as it was for a source to go on without repeating itself."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint that something was made from."""

    checkpoint: str
    """Its folder, absolute."""
    step: int
    tokens_seen: int

    @staticmethod
    def of(found: Found) -> Parent:
        """A found checkpoint as a parent."""
        position = found.manifest.position
        return Parent(str(found.folder.resolve()), position.step, position.tokens_seen)


@dataclass(frozen=True)
class Origin:
    """Where a run, or a checkpoint that no run wrote, comes from."""

    made_by: str
    """What made it, in words that a user can type."""
    parents: tuple[Parent, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values for `json.dump`."""
        return asdict(self)

    @staticmethod
    def from_json(value: Any) -> Origin:
        """Inverse of `to_json`. Raises KeyError or TypeError for anything else."""
        return Origin(value["made_by"], tuple(Parent(**one) for one in value["parents"]))


def model_of_start(config: RunConfig) -> dict[str, Any]:
    """The model section, as nested mappings, of the checkpoint that `config` starts from.

    A run that has begun keeps it in its own folder, so it can be resumed when its parent is gone.
    Raises UserError where there is no checkpoint.
    """
    own, start = Path(config.run_dir) / "config.yaml", Path(config.start.checkpoint or "")
    if Path(config.run_dir).resolve() in (start.resolve(), *start.resolve().parents):
        raise UserError(
            f"start.checkpoint = {start} is in run_dir {config.run_dir}; a run that starts from "
            "another needs a run_dir of its own"
        )
    if own.exists():
        begun = load_config(own)
        if begun.start == config.start:
            return _model(dump_config(begun))
    try:
        position = read_manifest(start).position
    except UserError as error:
        raise UserError(f"start.checkpoint: {error}") from None
    return _model(position.config)


def continued(
    parent: Position, config: RunConfig, identity: Mapping[str, str]
) -> tuple[Cursor, list[str]]:
    """Where the data of a run that starts from `parent` begins, and what the user should know.

    `identity` says what each source of this run holds.
    """
    if config.start.data == "restart" or "data" not in parent.cursor:
        return Cursor(), ["every source is read from its beginning"]
    was = yaml.safe_load(parent.config)
    old = {"seed": was["seed"], "data.context_tokens": was["data"]["context_tokens"]}
    new = {"seed": config.seed, "data.context_tokens": config.data.context_tokens}
    changed = [name for name in DECIDES_PIECES if old[name] != new[name]]
    read = Cursor.from_json(parent.cursor["data"]).sources
    sources, notes = {}, []
    for name, one in read.items():
        if name not in identity:
            continue
        reasons = [f"{key} changed" for key in changed]
        if parent.cursor["sources"].get(name) != identity[name]:
            reasons.append("it holds other documents now")
        if reasons:
            notes.append(f"source '{name}' is read from its beginning: {', '.join(reasons)}")
            continue
        sources[name] = SourceCursor(pieces=one.pieces, tokens=one.tokens)
        notes.append(f"source '{name}' goes on after the {one.tokens:,} tokens read before")
    notes += [f"source '{name}' is new" for name in identity if name not in read]
    return Cursor(sources=sources), notes


def taken_over(parent: Position, config: RunConfig) -> list[str]:
    """What a run takes from the checkpoint it starts from, and what begins anew, a line each."""
    optimizer = "goes on" if config.start.optimizer == "keep" else "begins anew"
    changed = changes(_model(parent.config), _model(dump_config(config)))
    return [
        f"starts with the weights of {config.start.checkpoint}, step {parent.step:,}, "
        f"{parent.tokens_seen:,} tokens seen; the optimizer {optimizer}, the learning rate "
        "follows this run's own schedule",
        *(f"model.{key}: {was} -> {now}" for key, (was, now) in changed.items()),
    ]


def _model(text: str) -> dict[str, Any]:
    return dict((yaml.safe_load(text) or {}).get("model") or {})
