"""Small twins of the recipes train: the same options, tiny sizes, at most 4 ranks."""

import copy
import json
import math
from pathlib import Path

import pytest
import yaml
from test_huggingface_models import SHAPE
from test_train import command
from tiny_corpus import EOD, VOCAB, rows, write_tiny_corpus
from toy_m1 import small_book

from megascale.config.load import whole_number

RECIPES = sorted((Path(__file__).parents[2] / "configs/recipes").glob("*.yaml"))
MOST_RANKS, STEPS = 4, 5
BATCH_TOKENS = 1024
CONTEXT, LONG_CONTEXT = 128, 256
"""Of a twin; the longer one of recipes beyond 128Ki, which replay what shorter contexts read."""
TINY_MODEL = {
    "num_layers": SHAPE["num_hidden_layers"],
    "hidden_size": SHAPE["hidden_size"],
    "num_heads": SHAPE["num_attention_heads"],
    "num_kv_heads": SHAPE["num_key_value_heads"],
    "head_dim": 8,
    "ffn_hidden_size": SHAPE["intermediate_size"],
}
TINY_MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}
PEAK = 1e-2
"""Learning rate of a twin that starts from no other: five steps must show that a loss falls."""

OF_SIZE = (
    "the Step Law was fitted on",
    "is less than a sequence",
    "is less than one step",
    "optim.schedule lasts",  # longer than the small model of a run that grows
)
"""Warnings that sizes of a twin are the reason of."""


def number(value):
    """A number of tokens of a recipe, such as 8Ki."""
    return whole_number(str(value), "tokens", 0)


def tokens_scaled(section, factor):
    """With every number of tokens of `section` times `factor`, at least one."""
    return {
        key: max(1, round(factor * number(value))) if key.endswith("tokens") and value else value
        for key, value in section.items()
    }


def twin(tree, folder, sources, start, faster):
    """The config of a recipe's twin, with rates `faster` times higher, and its number of ranks."""
    made = copy.deepcopy(tree)
    cut = {name: min(2, size) for name, size in made.get("parallel", {}).items()}
    fewest = math.prod(cut.values())
    ranks = min(MOST_RANKS, 2 * fewest if cut.get("expert", 1) == 1 else fewest)
    hdp = ranks // (cut.get("tensor", 1) * cut.get("pipeline", 1))
    tokens = (2 * STEPS - 1) * BATCH_TOKENS // 2  # reached in the last step
    shrink = tokens / number(made["train"]["tokens"])
    train = {"tokens": tokens, "precision": "fp32", "threads": 1}
    data = {"sources": sources, "global_batch_tokens": BATCH_TOKENS}
    if made["data"]["global_batch_tokens"] == "steplaw":  # many small steps for so few tokens
        data.pop("global_batch_tokens")
        train["stop_after_steps"] = STEPS
    optim = tokens_scaled(made["optim"], shrink)
    rates = {key: faster * optim[key] for key in optim if key.endswith("lr") and faster != 1}
    changes = {
        "model": tiny(made["model"]),
        "parallel": cut,
        "data": made["data"] | data | {"context_tokens": context_of(made)},
        "planner": {"capacity_tokens": capacity_of(made, hdp)},
        "optim": optim | rates,
        "train": made["train"] | train,
        "eval": made["eval"] | {"every_steps": STEPS, "tokens": 500},
        "monitor": {"tensorboard": False},
    }
    if "start" in made:
        changes["start"] = made["start"] | {"checkpoint": str(start)}
    if "growth" in made:
        changes["growth"] = tokens_scaled(made["growth"], shrink)
    if "emergency_dir" in made["checkpoint"]:
        changes["checkpoint"] = made["checkpoint"] | {"emergency_dir": str(folder / "node")}
    return made | changes | {"run_dir": str(folder / "run")}, ranks


def tiny(model):
    """A model with the same options; its vocabulary is that of the corpus or the checkpoint."""
    sizes = {key: TINY_MODEL.get(key, value) for key, value in model.items() if key != "vocab_size"}
    if "moe" in model:
        sizes["moe"] = {key: TINY_MOE.get(key, value) for key, value in model["moe"].items()}
    return sizes


def context_of(tree):
    return LONG_CONTEXT if number(tree["data"]["context_tokens"]) > 2**17 else CONTEXT


def capacity_of(tree, hdp):
    """So many tokens that the longest sequence takes as many ranks as in the recipe, or all."""
    ranks = number(tree["data"]["context_tokens"]) / number(tree["planner"]["capacity_tokens"])
    return math.ceil(context_of(tree) / min(ranks, hdp))


class Twins:
    """The twins that were trained, each once, after the one that it starts from."""

    def __init__(self, folder, run):
        self.folder, self.run_ranks = folder, run
        self.trees = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES}
        self.done = {}

    def trained(self, name):
        """(the recipe, its twin's run folder, what the twin printed)."""
        if name not in self.done:
            self.done[name] = self._train(name)
        return self.done[name]

    def _train(self, name):
        tree, folder = self.trees[name], self.folder / name
        folder.mkdir()
        config, ranks = twin(tree, folder, self._sources(name), *self._start(tree))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        answers = self.run_ranks(ranks, command, "train", folder / "config.yaml")
        assert {status for status, _ in answers} == {0}, answers[0][1]
        return tree, folder / "run", answers[0][1]

    def _sources(self, name):
        if name.startswith("infowindow"):
            return {"web": {"path": str(windows(self.folder / "windows"))}}
        made = {}
        for source in self.trees[name]["data"]["sources"]:
            folder = self.folder / f"corpus-{source}"
            if not folder.exists():  # another length for each, so that each has its own text
                write_tiny_corpus(folder, max_bytes=3000 + 100 * len(source) + ord(source[0]))
            ids = {"vocab_size": VOCAB, "eod_id": EOD}
            made[source] = {"path": f"{folder}/train", "heldout": f"{folder}/heldout", **ids}
        return made

    def _start(self, tree):
        """(what a twin starts from, how much higher its rates are), as those of its start are."""
        start, lr = tree.get("start", {}).get("checkpoint"), tree["optim"]["lr"]
        for name, other in self.trees.items():
            if other["run_dir"] == start:
                return self.trained(name)[1], PEAK / other["optim"]["lr"]
        faster = 1 if lr == "steplaw" else PEAK / lr
        return (None if start is None else self._imported()), faster

    def _imported(self):
        """A tiny Llama of Hugging Face, imported."""
        model, out = self.folder / "llama", self.folder / "imported"
        ((status, said),) = self.run_ranks(1, imported, model, out)
        assert status == 0, said
        return out


def imported(model, out):
    """`megascale import` of a tiny Llama with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": VOCAB, "initializer_range": 0.02, "tie_word_embeddings": False}
    config = AutoConfig.for_model("llama", **shape, rms_norm_eps=1e-5)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    return command("import", model, out)


def windows(folder):
    """A corpus of Equal-Info Windows by a codebook of a random M1."""
    folder.mkdir()
    small_book().save(folder / "b16.safetensors")
    texts = [f"line {i % 97} of text {i % 13}, {'word ' * (i % 29)}\n" * 20 for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    inputs = f"inputs: [{{kind: jsonl, paths: ['{folder}/texts.jsonl']}}]"
    (folder / "recipe.yaml").write_text(f"name: x\nheldout_fraction: 0.1\n{inputs}\n")
    tokenizer = ("--tokenizer", f"infowindow:{folder}/b16.safetensors", "--processes", "1")
    words = ("prepare", folder / "recipe.yaml", "--out", folder / "corpus", *tokenizer)
    status, said = command(*words)
    assert status == 0, said
    return folder / "corpus"


@pytest.fixture(scope="module")
def twins(rank_pools, tmp_path_factory):
    return Twins(tmp_path_factory.mktemp("twins"), rank_pools.run)


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_the_twin_of_a_recipe_trains(twins, name):
    tree, run, said = twins.trained(name)
    steps = [row for row in rows(run / "metrics.jsonl") if "loss" in row]
    losses = [row["loss"] for row in steps]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0], losses
    assert not any(row["skipped"] for row in steps)
    if "replay_fraction" in tree["data"]:
        assert steps[-1]["replayed"] == pytest.approx(tree["data"]["replay_fraction"], abs=0.1)
    if "growth" in tree:
        assert (run.with_name("run-base") / "metrics.jsonl").exists()
    warnings = [line for line in said.splitlines() if "warning" in line]
    assert not [line for line in warnings if not any(cause in line for cause in OF_SIZE)]
