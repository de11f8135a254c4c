"""Cases for every reader of files: a changed example, read by what reads such files."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz import mutate
from fuzz.harness import Target, Wrong
from fuzz.scene import (
    CONFIG,
    COST,
    DOCUMENTS,
    EVENTS,
    EXPERTS,
    INDEX,
    LINEAGE,
    LLAMA,
    OUTPUTS,
    PARENT,
    PULSE,
    QWEN_MOE,
    RECIPE,
    SCHEDULE,
    SPLIT,
    TOKENIZER_CONFIG,
    Scene,
)  # fmt: skip

Rng = random.Random
READERS: dict[str, tuple[Target, int]] = {}
"""Name to a target and its weight, the part of all cases that it gets."""


def reader(weight: int) -> Callable[[Target], Target]:
    """Enter a target under the name of its function."""

    def enter(target: Target) -> Target:
        READERS[target.__name__] = (target, weight)
        return target

    return enter


def written(scene: Scene, name: str, content: bytes | str) -> Path:
    """A file of the case."""
    path = scene.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    return path


def a_config(rng: Rng, scene: Scene) -> Any:
    """One of the example configs."""
    kind = rng.randrange(3)
    if kind == 0:
        return scene.config
    if kind == 1:
        return CONFIG
    rest = {name: value for name, value in CONFIG.items() if name != "optim"}
    return {**rest, "optim": {"schedule": SCHEDULE}}


@reader(12)
def config(rng: Rng, scene: Scene) -> None:
    """A config, read and finalized."""
    from megascale.config import Layout, dump_config, finalize, load_config, parse_config

    path = written(scene, "case.yaml", mutate.yaml_text(rng, a_config(rng, scene)))
    found = load_config(path)
    if parse_config(dump_config(found)) != found:
        raise Wrong("a config that does not come back from its dump")
    found = finalize(found, dict.fromkeys(found.data.sources, 1000), 257)
    if parse_config(dump_config(found)) != found:
        raise Wrong("a finalized config that does not come back from its dump")
    Layout.of(found, 8)


@reader(8)
def overrides(rng: Rng, scene: Scene) -> None:
    """A config with overrides."""
    from megascale.config import finalize, load_config

    given = [
        "train.tokens=20M", "model.num_layers=3", "optim.lr=1e-3", "data.context_tokens=64",
        "train.spikes={action: warn}", "parallel.tensor=2", "run_dir=x", "planner.budget_s=0.5",
        "planner.capacity_tokens=auto",
    ]  # fmt: skip
    found = load_config(scene.folder / "config.yaml", mutate.words(rng, rng.sample(given, 2)))
    finalize(found, dict.fromkeys(found.data.sources, 1000), 257)


@reader(6)
def recipe(rng: Rng, scene: Scene) -> None:
    """A recipe of one corpus or of several."""
    from megascale.corpus.recipe import load_recipe

    example = rng.choice((RECIPE, SPLIT, OUTPUTS))
    found = load_recipe(written(scene, "case.yaml", mutate.yaml_text(rng, example)))
    if not found.named_inputs or found.makes_several != (found.is_split or bool(found.outputs)):
        raise Wrong("a recipe that makes nothing")


@reader(5)
def whole_number(rng: Rng, scene: Scene) -> None:
    """A number of an option."""
    from megascale.config.load import whole_number

    text = mutate.word(rng) + rng.choice(("", "K", "Ki", "T", "e99", ".5", ".5M"))
    whole_number(text, "--x", 1)


@reader(6)
def cost(rng: Rng, scene: Scene) -> None:
    """COST.json, and a plan with it."""
    import numpy as np

    from megascale.planner import PLANNERS, CostModel, Problem

    model = CostModel.load(written(scene, "case.json", mutate.json_bytes(rng, COST)))
    lengths = np.array([100, 30, 700, 5], dtype=np.int64)
    plan = PLANNERS["hybrid"](Problem.of(lengths, 4, 256, "free", model))
    plan.check(lengths)


@reader(5)
def lengths(rng: Rng, scene: Scene) -> None:
    """A file of lengths."""
    from megascale.simulate.lengths import read_lengths

    lines = scene.bytes_of("lengths.txt").splitlines()
    lines[rng.randrange(len(lines))] = mutate.word(rng).encode("utf-8", "surrogateescape")
    content = mutate.damaged(rng, b"\n".join(lines)) if rng.random() < 0.3 else b"\n".join(lines)
    read_lengths(str(written(scene, "case.txt", content)), "--lengths ")


@reader(6)
def corpus_file(rng: Rng, scene: Scene) -> None:
    """corpus.json."""
    from megascale.corpus.sources import describe, read_corpus_file

    folder = scene.folder / "changed"
    if not folder.exists():
        shutil.copytree(scene.folder / "corpora" / "corpus", folder)
    written(scene, "changed/corpus.json", mutate.json_bytes(rng, scene.corpus))
    read_corpus_file(folder)
    describe(str(folder))


@reader(6)
def shard_index(rng: Rng, scene: Scene) -> None:
    """A `.idx`, and every document."""
    from megascale.corpus.shards import Shard

    written(scene, "shard.bin", scene.bytes_of("corpora/corpus/train.bin"))
    content = mutate.damaged(rng, scene.bytes_of("corpora/corpus/train.idx"))
    written(scene, "shard.idx", content)
    shard = Shard.open(scene.folder / "shard")
    for document in range(min(100, shard.num_documents)):
        shard.read(document)


@reader(3)
def heldout_sizes(rng: Rng, scene: Scene) -> None:
    """The sizes of held-out texts."""
    from megascale.corpus.check import _sizes
    from megascale.corpus.shards import Shard

    shard = Shard.open(scene.folder / "corpora" / "corpus" / "heldout")
    content = mutate.damaged(rng, scene.bytes_of("corpora/corpus/heldout.bytes.npy"))
    _sizes(str(written(scene, "case.npy", content)), shard)


@reader(6)
def manifest(rng: Rng, scene: Scene) -> None:
    """manifest.json, and where the checkpoint comes from."""
    from megascale.checkpoint.manifest import Manifest, verify
    from megascale.config import parse_config
    from megascale.run.origin import origin_of

    value = scene.manifest
    if rng.random() < 0.3:
        value = {**value, "position": {**value["position"], "cursor": {"origin": LINEAGE}}}
    folder = written(scene, "checkpoint/manifest.json", mutate.json_bytes(rng, value)).parent
    origin_of(folder)
    found = Manifest.read(folder)
    verify(folder, found)
    parse_config(found.position.config)


@reader(3)
def checkpoint_index(rng: Rng, scene: Scene) -> None:
    """`.metadata`, the index of tensors."""
    from megascale.checkpoint.storage import read_index

    content = mutate.damaged(rng, scene.bytes_of("whole/checkpoints/00000004/.metadata"))
    read_index(written(scene, "checkpoint/.metadata", content).parent)


@reader(4)
def megatron_checkpoint(rng: Rng, scene: Scene) -> None:
    """A checkpoint of Megatron: its index, what is saved beside the tensors, and its YAML."""
    import io
    from argparse import Namespace

    import torch

    from megascale.convert.megatron.read import Foreign

    shape = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 64}
    options = {**shape, "swiglu": True, "rotary_base": 10000, "window_size": [3, 0]}
    arguments = Namespace()
    options |= {"iteration": 3, "param_groups": [{"step": 3, "lr": 0.1}]}
    changed = mutate.tree(rng, options) if rng.random() < 0.6 else options
    vars(arguments).update(changed if isinstance(changed, dict) else {})
    common = io.BytesIO()
    torch.save({"args": arguments, "optimizer": changed}, common)
    place = "whole/checkpoints/00000004"
    files = {
        ".metadata": scene.bytes_of(f"{place}/.metadata"),
        "common.pt": common.getvalue(),
        "metadata.json": scene.bytes_of(f"{place}/metadata.json"),
    }
    name = rng.choice(("none", *files))
    files |= {name: mutate.damaged(rng, files[name])} if name in files else {}
    for name, content in files.items():
        folder = written(scene, f"megatron/{name}", content).parent
    for path in (scene.folder / place).glob("*.distcp"):
        shutil.copy(path, folder)
    Foreign.open(folder, rng.randrange(1, 300))


@reader(2)
def checkpoint_names(rng: Rng, scene: Scene) -> None:
    """Names of folders, `latest` and the list of steps that were left behind."""
    from megascale.checkpoint import folder as folders

    place = scene.folder / "checkpoints"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for _ in range(2):
        name = rng.choice(["00000004", *mutate.TEXTS, *map(str, mutate.NUMBERS)])
        name = name.replace("\0", "").replace("/", "").replace("\ud800", "")[:200] or "x"
        if name not in (".", ".."):
            (place / name).mkdir(parents=True, exist_ok=True)
    for file in (folders.LATEST, folders.LEFT):
        if not (place / file).exists():
            (place / file).write_bytes(mutate.word(rng).encode("utf-8", "surrogateescape"))
    folders.own_steps(place)
    folders.read_latest(place)


@reader(4)
def lineage(rng: Rng, scene: Scene) -> None:
    """lineage.json."""
    from megascale.run.origin import home_of, origin_of

    origin = origin_of(written(scene, "child/lineage.json", mutate.json_bytes(rng, LINEAGE)).parent)
    for parent in origin.parents if origin else ():
        f"{home_of(parent.checkpoint).is_dir()}, {parent.step:,}, {parent.tokens_seen:,}"


def a_log(rng: Rng, rows: list[Any]) -> bytes:
    """The lines of a log, some of them changed, repeated or out of order."""
    lines = []
    for row in rows:
        changed = rng.random() < 0.35
        lines.append(mutate.json_bytes(rng, row) if changed else json.dumps(row).encode())
    if rng.random() < 0.2:
        rng.shuffle(lines)
    content = b"\n".join(lines) + b"\n"
    return mutate.damaged(rng, content) if rng.random() < 0.1 else content


def run_of(rng: Rng, scene: Scene) -> Path:
    """A run folder whose logs, of which one is changed, tell of experts and ranks too."""
    rows = scene.metrics
    ranks = [{"step": step, "slowdown": [1.0, 1.1, None]} for step in (2, 4)]
    logs = {"metrics.jsonl": rows, "events.jsonl": EVENTS, "ranks.jsonl": ranks,
            "experts.jsonl": [EXPERTS, EXPERTS]}  # fmt: skip
    chosen = rng.choice(list(logs))
    for name, values in logs.items():
        whole = "".join(json.dumps(row) + "\n" for row in values).encode()
        written(scene, f"run/{name}", a_log(rng, values) if name == chosen else whole)
    parent = {**PARENT, "checkpoint": str(scene.folder / "whole/checkpoints/00000004")}
    origin = {**LINEAGE, "parents": [parent]}
    is_branch = rng.random() < 0.5
    written(scene, "run/lineage.json", mutate.json_bytes(rng, origin) if is_branch else b"{}")
    return scene.folder / "run"


@reader(10)
def run_logs(rng: Rng, scene: Scene) -> None:
    """events.jsonl and metrics.jsonl, as `status` and `report` see them."""
    from megascale.commands.report import render
    from megascale.commands.status import as_json, shown
    from megascale.monitor.story import read_story

    run = run_of(rng, scene)
    story = read_story(run)
    now = rng.choice((1796022955.0, time.time(), 0.0))
    json.dumps(as_json(story, now))
    _rendered(shown(run, story, now))
    "".join(render(run, story, {}, now))


def _rendered(shown: Any) -> None:
    import io

    from rich.console import Console

    Console(markup=False, highlight=False, file=io.StringIO(), width=100).print(shown)


@reader(6)
def curves(rng: Rng, scene: Scene) -> None:
    """Logs, as the plots read them."""
    from megascale.monitor.experts import read_shares
    from megascale.monitor.metrics import rewind
    from megascale.monitor.run_curves import go_on_from, load_curves, smooth
    from megascale.monitor.stragglers import read_slowdowns
    from megascale.run.ancestry import earlier_parts

    run = run_of(rng, scene)
    read_shares(run)
    read_slowdowns(run)
    drawn = go_on_from(earlier_parts(run), load_curves(run, "run"))
    smooth(drawn.own.columns["loss"])
    rewind(run / "metrics.jsonl", 4)


@reader(4)
def heartbeats(rng: Rng, scene: Scene) -> None:
    """heartbeats.json."""
    from rich.console import Group

    from megascale.commands.status import _ranks
    from megascale.monitor.rank_states import read_heartbeats

    value = {"time": 1796022955.0, "ranks": [PULSE, {**PULSE, "rank": 1, "waits": True}]}
    written(scene, "run/heartbeats.json", mutate.json_bytes(rng, value))
    found = read_heartbeats(scene.folder / "run", 1796022956.0)
    (scene.folder / "run" / "heartbeats.json").unlink()
    json.dumps(found)
    _rendered(Group(*_ranks(found)))


@reader(3)
def verdict(rng: Rng, scene: Scene) -> None:
    """Why ranks ended, as their agent wrote it."""
    from megascale.launch.driver import _cause

    value = {"error": "RuntimeError: x", "time": 1796022955.0, "rank": 1, "node": "n0"}
    cause = _cause(1, written(scene, "case.json", mutate.json_bytes(rng, value)))
    if cause is None or not isinstance(cause.error, str):
        raise Wrong(f"a cause of the wrong kind: {cause}")


@reader(4)
def tokenizer_config(rng: Rng, scene: Scene) -> None:
    """tokenizer_config.json."""
    from megascale.corpus.hugging_face import find_tokenizer

    content = mutate.json_bytes(rng, TOKENIZER_CONFIG)
    find_tokenizer(
        str(written(scene, f"{scene.tokenizer.name}/tokenizer_config.json", content).parent)
    )


@reader(3)
def tokenizer_file(rng: Rng, scene: Scene) -> None:
    """tokenizer.json."""
    from megascale.corpus.hugging_face import find_tokenizer

    value = json.loads(scene.bytes_of(f"{scene.tokenizer.name}/tokenizer.json"))
    path = written(scene, "other_tokenizer/tokenizer.json", mutate.json_bytes(rng, value))
    find_tokenizer(str(path.parent))


@reader(5)
def model_config(rng: Rng, scene: Scene) -> None:
    """config.json of a Hugging Face model."""
    from megascale.convert.huggingface.config import model_of, read_config

    value = rng.choice((LLAMA, QWEN_MOE))
    path = written(scene, "model/config.json", mutate.json_bytes(rng, value))
    model_of(read_config(path.parent), path)


@reader(3)
def model_index(rng: Rng, scene: Scene) -> None:
    """The index of a Hugging Face model."""
    from megascale.convert.huggingface.model_files import INDEX as NAME
    from megascale.convert.huggingface.model_files import _listed

    for name, file in _listed(
        written(scene, f"model/{NAME}", mutate.json_bytes(rng, INDEX)).parent
    ).items():
        if not isinstance(name, str) or not isinstance(file, str):
            raise Wrong(f"{name!r}: {file!r} in the index")


@reader(1)
def codebook(rng: Rng, scene: Scene) -> None:
    """A codebook."""
    from megascale.infowindow.codebook import Codebook

    content = scene.codebook.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.5:
        header = json.loads(content[8 : 8 + size])
        if rng.random() < 0.5:
            said = json.loads(header["__metadata__"]["megascale"])
            header["__metadata__"]["megascale"] = mutate.json_bytes(rng, said).decode(
                "utf-8", "replace"
            )
            text = json.dumps(header).encode()
        else:
            text = mutate.json_bytes(rng, header)
        content = len(text).to_bytes(8, "little") + text + content[8 + size :]
    else:
        content = mutate.damaged(rng, content[: size + 64]) + content[size + 64 :]
    Codebook.open(written(scene, "case.safetensors", content))


@reader(2)
def coded_file(rng: Rng, scene: Scene) -> None:
    """A file of windows, decoded."""
    from megascale.infowindow.codebook import Codebook
    from megascale.infowindow.stream import decode_file, encode_file

    if "book" not in scene.__dict__:
        scene.__dict__["book"] = Codebook.open(scene.codebook)
        book = scene.__dict__["book"]
        encode_file(
            scene.folder / "small.txt", scene.folder / "small.eqi", book, book.windows, bool
        )
    path = written(scene, "case.eqi", mutate.damaged(rng, scene.bytes_of("small.eqi")))
    decode_file(path, scene.folder / "case.out", scene.__dict__["book"], bool)


@reader(3)
def document_line(rng: Rng, scene: Scene) -> None:
    """A line of JSON with a document that names its source, and the folder of that."""
    import pyarrow as pa

    from megascale.corpus.inputs import Table, read_documents
    from megascale.corpus.source_names import folder_names

    table = Table("x", "line", "line", "text", (), source=rng.choice((None, "meta.from")))
    line = mutate.json_bytes(rng, rng.choice(DOCUMENTS))
    ((text, source),) = read_documents(table, [0], pa.table({"line": [line]}))
    if not isinstance(text, bytes) or (source is None) != (table.source is None):
        raise Wrong(f"a document {text!r} of source {source!r}")
    for name in folder_names([source] if source is not None else []).values():
        if Path(name).name != name or len(name.encode()) > 128:
            raise Wrong(f"the folder {name!r} of source {source!r}")


@reader(2)
def set_file(rng: Rng, scene: Scene) -> None:
    """corpora.json, which says what may be replaced."""
    from megascale.corpus.made import find_made
    from megascale.corpus.recipe import parse_recipe

    recipe = parse_recipe("{name: x, inputs: [{kind: jsonl, paths: [sources.jsonl]}]}")
    value = {"format": 1, "name": "x", "source_fingerprint": "0", "corpora": ["a", "b"],
             "left_out": {"c": "no document"}}  # fmt: skip
    path = written(scene, "set/corpora.json", mutate.json_bytes(rng, value))
    find_made(recipe, path.parent, "0", force=True)


@reader(2)
def sweep_line(rng: Rng, scene: Scene) -> None:
    """A line of a sweep."""
    from megascale.launch.sweep import sweep_words

    line = " ".join(mutate.words(rng, ["optim.lr=1e-3", "run_dir='a b'", "seed=2"]))
    sweep_words(line, "--sweep x, line 1")
