"""What an import keeps of a model folder beside the weights, for the exports of its branches.

Our model knows shapes, window and rotary angles. All else that a model folder says (the ids that
begin and end a text, how text is generated, chat template, options that the family ignores) is
kept as it came in the folder `imported` of the checkpoint. A run that starts from the checkpoint
copies it into its run_dir, and an export merges it (`merge.py`) with what the model has become.
No torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale.convert.huggingface.documents import (
    CONFIG,
    GENERATION,
    read_document,
    write_document,
)
from megascale.errors import UserError

KEPT = "imported"
"""Folder beside a checkpoint, or in a run_dir: the imported model folder without its weights."""
POSITIONS = "max_position_embeddings"
ID_ENDING = "_token_id"


@dataclass(frozen=True)
class Kept:
    """What an import has kept."""

    folder: Path
    config: Mapping[str, Any]
    """Its config.json."""
    generation: Mapping[str, Any] | None
    """Its generation_config.json; None: the model had none."""

    @staticmethod
    def of(home: Path) -> Kept | None:
        """What is kept in the folder of a checkpoint or a run; None where nothing is.

        Raises UserError where it cannot be read.
        """
        folder = home / KEPT
        if not folder.is_dir():
            return None
        config, path = read_document(folder / CONFIG), folder / GENERATION
        if not isinstance(config.get(POSITIONS), int):
            raise UserError(f"{folder / CONFIG} lacks {POSITIONS}; import the model again")
        return Kept(folder, config, read_document(path) if path.is_file() else None)


def keep(source: Path, theirs: Any, home: Path) -> None:
    """Keep what `source`, a model folder with the config `theirs`, says besides its weights.

    Raises UserError where it cannot be read, OSError.
    """
    from megascale.convert.huggingface.tokenizer_folder import FILES, copy_tokenizer

    folder = home / KEPT
    folder.mkdir()
    # the value of the family's default too, since a branch may raise it
    positions = {POSITIONS: theirs.max_position_embeddings}
    write_document(read_document(source / CONFIG) | positions, folder / CONFIG)
    if (source / GENERATION).is_file():
        read_document(source / GENERATION)  # it is refused here, before it is kept
    copy_tokenizer(source, folder, (GENERATION, *FILES))


def pass_on(parent: Path, home: Path, context_tokens: int) -> None:
    """Copy what a checkpoint or run has kept to one that comes from it.

    `context_tokens` is the context of the parent's training, which the model has learned.
    Raises UserError where it cannot be read, OSError.
    """
    from megascale.convert.huggingface.tokenizer_folder import raise_max_length

    kept = Kept.of(parent)
    if kept is None:
        return
    folder = home / KEPT
    shutil.copytree(kept.folder, folder, dirs_exist_ok=True)
    if context_tokens > kept.config[POSITIONS]:
        write_document({**kept.config, POSITIONS: context_tokens}, folder / CONFIG)
        raise_max_length(folder, context_tokens)


def without_unknown_ids(
    document: Mapping[str, Any], vocab_size: int
) -> tuple[dict[str, Any], list[str]]:
    """A config without the ids of special tokens that a model of `vocab_size` ids lacks.

    Also returns the options that named them.
    """
    fitting: dict[str, Any] = {}
    lost: list[str] = []
    for name, value in document.items():
        if not name.endswith(ID_ENDING):
            fitting[name] = value
            continue
        ids = value if isinstance(value, list) else [value]
        known = [one for one in ids if not (isinstance(one, int) and one >= vocab_size)]
        if len(known) == len(ids):
            fitting[name] = value
        else:
            lost.append(f"{name} = {value}")
            fitting[name] = (known or None) if isinstance(value, list) else None
    return fitting, lost
