"""Small corpora of real text, as bare Megatron prefixes."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import numpy as np

EOD, VOCAB = 256, 257


def write_tiny_corpus(folder: Path, files: int = 40, max_bytes: int = 4000) -> Path:
    """The heads of some source files of the standard library; returns the config's prefix.

    Writes `train` and `heldout` shards of the byte tokenizer below `folder`.
    """
    from megascale.corpus.shards import ShardWriter

    names = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: files + 4]
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("heldout", names[:4]), ("train", names[4:])):
        writer = ShardWriter(folder / part, np.uint16)
        for name in chosen:
            text = np.frombuffer(name.read_bytes()[:max_bytes], np.uint8)
            writer.add(np.append(text.astype(np.uint16), np.uint16(EOD)))
        writer.close()
    return folder / "train"


def tiny_config(folder: Path, **changes: str) -> Path:
    """A config of seconds on that corpus; `changes` replace whole sections."""
    prefix = write_tiny_corpus(folder)
    sections = {
        "model": "{num_layers: 2, hidden_size: 32, num_heads: 2}",
        "data": f"""
  sources:
    tiny: {{path: {prefix}, heldout: {folder / "heldout"}, vocab_size: {VOCAB}, eod_id: {EOD}}}
  context_tokens: 128
  global_batch_tokens: 1024""",
        "planner": "{capacity_tokens: 256}",
        "optim": "{lr: 1.0e-2}",
        "train": "{tokens: 30000, precision: fp32, threads: 1}",
        "eval": "{every_steps: 10, tokens: 2000}",
        "checkpoint": "{save_every_steps: 3}",
        "monitor": "{tensorboard: false}",
    }
    path = folder / "config.yaml"
    text = "".join(f"{name}: {value}\n" for name, value in {**sections, **changes}.items())
    path.write_text(text)
    return path


def rows(path):
    """The objects of a file of JSON lines; empty lines do not count."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]
