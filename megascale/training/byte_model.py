"""The run of M1, the byte model behind Equal-Info Windows: its data, its config, its freezing.

Windows begin anywhere, and M1 knows nothing of the text before. So it learns on pieces that begin
anywhere: documents are cut at random into lengths from 8 bytes to its context, as many of each
order of magnitude.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megascale.errors import UserError
from megascale.infowindow.checked_files import files_of, make_place
from megascale.infowindow.m1 import KIND, M1, MOST_TERMS, Shape
from megascale.parsing import dump_yaml, parse_yaml, read_yaml_text
from megascale.runtime.files import write_file
from megascale.runtime.outputs import Kind, Output, require_outputs

if TYPE_CHECKING:
    from megascale.config import RunConfig

M1_FILE = "m1.safetensors"
SHORTEST_PIECE, SHORTEST_CONTEXT = 8, 16
SHAPES = {
    "paper": (
        {"num_layers": 3, "hidden_size": 256, "num_heads": 4, "ffn_hidden_size": 1024},
        1024,
    ),
    "small": ({"num_layers": 2, "hidden_size": 96, "num_heads": 3, "ffn_hidden_size": 256}, 256),
}
"""Model and context in tokens. paper: 3.2M parameters, the 3M of arXiv 2404.03626, section 3.2,
with a third matrix in the feed-forward part. small: 0.2M, for tests and short runs."""
CONFIG = """
planner: {capacity_tokens: 4Ki}
optim: {lr: 3.0e-3, warmup_tokens: 500K}
train: {tokens: 20M, precision: fp32}
eval: {every_steps: 200, tokens: 50K}
checkpoint: {save_every_steps: 200}
monitor: {log_every_steps: 50}
"""


def _is_own_config(path: Path) -> bool:
    tree = parse_yaml(read_yaml_text(path), str(path))
    return isinstance(tree, dict) and Path(str(tree.get("run_dir"))).name == "run"


OWN_CONFIG = Kind("a config that train-m1 has written", _is_own_config)


def config_of(out: Path) -> Path:
    """The config of the run below `out`."""
    return out / "m1.yaml"


def write_config(
    corpora: Sequence[Path], out: Path, shape: str, overrides: Sequence[str] = ()
) -> None:
    """Cut the corpora into pieces below `out`, where they are not yet, and write the run's config.

    Pieces are cut for the context that the overrides leave in force. The config holds what the
    overrides say, but for where to stop early, which is of one call. Raises UserError for a corpus
    that does not hold bytes, a folder that cannot be written, and a run that cannot be frozen.
    """
    from megascale.config import parse_config
    from megascale.config.load import apply_overrides

    model, context_tokens = SHAPES[shape]
    tree: dict[str, Any] = parse_yaml(CONFIG, "config")
    tree["run_dir"] = str(out / "run")
    tree["model"] = {**model, "vocab_multiple": 1}
    tree["data"] = {"context_tokens": context_tokens, "global_batch_tokens": "16Ki"}
    tree["data"]["sources"] = _sources(corpora, out, context_tokens)
    config = parse_config(dump_yaml(tree), overrides, str(config_of(out)))
    if config.run_dir != tree["run_dir"]:
        raise UserError(f"run_dir={config.run_dir}: the run lies below --out; leave run_dir out")
    _require_plain(config)
    context_tokens = config.data.context_tokens
    tree["data"]["sources"] = sources = _sources(corpora, out, context_tokens)
    outputs = [(M1_FILE, files_of(KIND)), (config_of(out).name, OWN_CONFIG)]
    require_outputs([Output("--out", out / name, kind, True) for name, kind in outputs])
    make_place(out / M1_FILE)
    try:
        for corpus, source in zip(corpora, sources.values(), strict=True):
            pieces = Path(source["path"]).parent
            for part in ("train", "heldout"):
                _cut(corpus / part, pieces / part, context_tokens - 1)
        apply_overrides(tree, overrides)
        tree["train"].pop("stop_after_steps", None)
        write_file(config_of(out), dump_yaml(tree))
    except OSError as error:
        where = error.filename or out
        raise UserError(f"{where}: {error.strerror}; choose another --out") from None


def _sources(corpora: Sequence[Path], out: Path, context_tokens: int) -> dict[str, dict[str, Any]]:
    """The pieces of every corpus as a source of the run, in a folder that its content names."""
    from megascale.corpus.sources import describe, read_corpus_file

    sources: dict[str, dict[str, Any]] = {}
    for i, corpus in enumerate(corpora):
        facts = read_corpus_file(corpus)
        describe(str(corpus))
        if facts["tokenizer"]["kind"] != "bytes":
            raise UserError(
                f"{corpus}: M1 learns from bytes, and this is a corpus of "
                f"{facts['tokenizer']['kind']}; prepare one with tokenizer.kind=bytes"
            )
        shards = {name: facts["files"][f"{name}.bin"]["sha256"] for name in ("train", "heldout")}
        content = hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:12]
        pieces = out / f"pieces-{context_tokens}" / content
        source = {"path": str(pieces / "train"), "vocab_size": 257, "eod_id": 256}
        if facts["heldout"]["documents"] > 0:
            source["heldout"] = str(pieces / "heldout")
        sources[f"{i}_{corpus.resolve().name}"] = source
    return sources


def _cut(source: Path, target: Path, longest: int) -> None:
    """Cut every document of a shard at random, the same way every time."""
    from megascale.corpus.shards import Shard, writing

    if Path(f"{target}.idx").exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shard, random = Shard.open(source), np.random.default_rng(0)
    with writing(target, shard.dtype) as writer:
        for i in range(shard.num_documents):
            tokens = shard.read(i)[:-1]
            begin = 0
            while begin < len(tokens):
                length = int(SHORTEST_PIECE * (longest / SHORTEST_PIECE) ** random.random())
                writer.add(np.append(tokens[begin : begin + length], shard.dtype.type(256)))
                begin += length


def freeze(run: Path) -> M1:
    """The M1 of a run's latest good checkpoint.

    Raises UserError for a model that M1's arithmetic does not know.
    """
    from megascale.checkpoint.load import find_at
    from megascale.checkpoint.tensors import Tensors
    from megascale.convert.huggingface.weights import export_tensors
    from megascale.convert.one_rank import run_config

    found = find_at(run)
    config = run_config(found)
    require_freezable(config)
    weights = {
        name: tensor.float().numpy()
        for name, tensor in export_tensors(Tensors(found), config.model, "llama")
    }
    return M1.freeze(shape_of(config), weights)


def shape_of(config: RunConfig) -> Shape:
    """M1's sizes, from the config of its run."""
    model = config.model
    numbers: dict[str, Any] = {
        name: getattr(model, name) for name in Shape.__dataclass_fields__ if hasattr(model, name)
    }
    return Shape(context_bytes=config.data.context_tokens - 1, **numbers)


def require_freezable(config: RunConfig) -> None:
    """Raises UserError for a run whose model cannot be frozen; `config` is finalized."""
    _require_plain(config)
    shape_of(config).require_exact()


NOT_FROZEN = (
    "moe",
    "qk_norm",
    "qkv_bias",
    "parallel_block",
    "norm_position",
    "sliding_window",
    "rope_scaling",
    "attention_pattern",
)
"""Options of `model` that M1 does not have."""


def _require_plain(config: RunConfig) -> None:
    from megascale.config import ModelConfig

    model, plain = config.model, ModelConfig()
    for name in NOT_FROZEN:
        if getattr(model, name) != getattr(plain, name):
            raise UserError(f"M1: model.{name} is not among what can be frozen; leave it out")
    if not SHORTEST_CONTEXT <= config.data.context_tokens <= MOST_TERMS:
        raise UserError(
            f"M1: data.context_tokens = {config.data.context_tokens} must be from "
            f"{SHORTEST_CONTEXT} to {MOST_TERMS}"
        )
