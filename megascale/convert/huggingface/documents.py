"""The JSON files of a Hugging Face model folder, as they are. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megascale.errors import UserError
from megascale.parsing import read_json
from megascale.runtime.files import write_file

CONFIG = "config.json"
GENERATION = "generation_config.json"


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises UserError where there is none."""
    try:
        document = read_json(path)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give the folder of a Hugging Face model"
        ) from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not the JSON of a config; copy the model again")
    return document


def write_document(document: dict[str, Any], path: Path) -> None:
    """Write JSON as `transformers` does. Raises OSError."""
    write_file(path, json.dumps(document, indent=2) + "\n")
