"""The valid examples that cases change, in a folder of their own."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ARCHIVE = Path(__file__).parents[1] / "data" / "run_642fa59.tar.xz"
COST = {
    "a": 1e-12, "b": 1e-8, "fixed": 1e-3, "latency": 1e-4, "node_size": 8,
    "transfer_intra": 1e-10, "transfer_inter": 1e-9,
}  # fmt: skip
PARENT = {"checkpoint": "/srv/fixture/run/checkpoints/00000004", "step": 4, "tokens_seen": 2079}
LINEAGE = {"made_by": "megascale branch run config.yaml", "parents": [PARENT]}
PULSE = {
    "rank": 0, "node": "n0", "state": "runs", "phase": "forward", "last": "all_reduce", "calls": 7,
    "waits": False, "quiet_s": 0.5, "step": 4, "memory_mib": 100, "device_mib": 0,
}  # fmt: skip
SPENT = {"training": 3.0, "planning": 0.1, "evaluation": 0.2, "saving": 0.1}
TIME = "2026-11-30T07:15:{:02}.122+00:00"
EVENTS: list[dict[str, Any]] = [
    {"time": TIME.format(1), "event": "launch", "nodes": 1},
    {"time": TIME.format(2), "event": "error", "step": 0, "error": "no port", "starting": True},
    {
        "time": TIME.format(2), "event": "start", "began": 1796022939.1, "step": 0, "world": 2,
        "total_steps": 16, "command": "megascale train config.yaml",
        "layout": {"world": 2, "tensor": 1, "pipeline": 1, "expert": 1, "hdp": 2},
        "precision": "fp32", "device": "cpu", "nodes": 1, "versions": {"megascale": "0.2.0"},
    },
    {"time": TIME.format(4), "event": "progress", "step": 3, "spent": SPENT},
    {"time": TIME.format(5), "event": "skip", "step": 3, "loss": 9.0},
    {"time": TIME.format(6), "event": "rollback", "step": 3, "to_step": 1},
    {"time": TIME.format(7), "event": "failure", "error": "rank 1 ended", "rank": 1},
    {"time": TIME.format(8), "event": "attempt", "number": 1},
    {"time": TIME.format(9), "event": "failure", "error": "no start"},
    {"time": TIME.format(10), "event": "start", "began": 1796022949.1, "step": 1, "world": 2},
    {"time": TIME.format(10), "event": "rewind", "last_step": 3, "step_s": 0.1, "written": 1.79e9},
    {"time": TIME.format(12), "event": "save", "step": 4, "bytes": 139912, "seconds": 0.1},
    {"time": TIME.format(13), "event": "leave", "why": "a node was lost"},
    {"time": TIME.format(13), "event": "straggler", "rank": 1, "node": "n0", "slowdown": 1.2},
    {"time": TIME.format(13), "event": "sample", "prompt": "def ", "text": "f(x):\n"},
    {"time": TIME.format(14), "event": "stop", "step": 8, "spent": SPENT, "asked": False},
]  # fmt: skip
EXPERTS = {
    "step": 4,
    "choices": [96, 32],
    "share": {"a": [[0.25, 0.75], [0.5, 0.5]], "b": [[0.5, 0.5], [1.0, 0.0]]},
}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "vocab_size": 257, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False, "max_position_embeddings": 512, "initializer_range": 0.02,
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip
QWEN_MOE = {
    **{name: value for name, value in LLAMA.items() if name not in ("rope_scaling", "mlp_bias")},
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": 128,
    "use_sliding_window": True, "max_window_layers": 0, "router_aux_loss_coef": 0.01,
}  # fmt: skip
INDEX = {
    "metadata": {"total_size": 1000},
    "weight_map": {
        f"model.layers.{i}.weight": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    },
}
MODEL = {
    "num_layers": 4, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "sliding_window": 64,
    "rope_scaling": {"factor": 8.0, "original_tokens": 64, "low_turns": 1.0, "high_turns": 4.0},
    "moe": {
        "num_experts": 4, "top_k": 2, "ffn_hidden_size": 32, "balance": "global",
        "balance_weight": 0.01, "shared_ffn_hidden_size": 16,
    },
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "run_dir": "run2",
    "seed": 7,
    "model": MODEL,
    "parallel": {"tensor": 1, "pipeline": 1, "expert": 2},
    "data": {
        "sources": {"words": {"path": "corpora/corpus"}, "more": {"path": "corpora/corpus"}},
        "stages": [
            {"tokens": 4096, "blend": {"words": 0.5, "more": 0.5}},
            {"blend": {"words": 1.0}},
        ],
        "context_tokens": 128,
        "global_batch_tokens": 512,
        "max_epochs": 50,
    },
    "planner": {"name": "hybrid", "capacity_tokens": 256, "ahead_steps": 2, "timeout_s": 30.0},
    "optim": {
        "lr": 1e-2, "curve": "wsd", "min_lr": 1e-4, "warmup_tokens": 81, "anneal_tokens": 800,
        "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip_grad_norm": 1.0,
    },
    "train": {
        "tokens": "8Ki", "precision": "fp32", "threads": 1,
        "spikes": {"action": "warn", "window_steps": 100, "deviations": 8.0, "patience_steps": 10},
    },
    "eval": {"every_steps": 4, "tokens": 4000, "sample_prompt": "a", "sample_tokens": 20},
    "checkpoint": {"save_every_steps": 4, "keep_last": 2, "emergency_every_steps": 20},
    "monitor": {"tensorboard": False, "log_every_steps": 10, "profile_steps": [3, 5]},
}  # fmt: skip
SCHEDULE = [
    {"shape": "linear", "tokens": 81, "lr": 0.01, "timescale": 10.0},
    {"shape": "cosine", "tokens": 8111, "lr": 0.001},
    {"shape": "exponential", "tokens": 500, "lr": 0.0001},
    {"shape": "constant", "lr": 0.001},
]
RECIPE: dict[str, Any] = {
    "name": "corpus",
    "description": "Paragraphs.",
    "licence": "Apache-2.0",
    "inputs": [
        {"kind": "jsonl", "paths": ["texts.jsonl"], "text_column": "text"},
        {"kind": "files", "paths": ["*.yaml"], "exclude": ["x*"]},
    ],
    "heldout_fraction": 0.2,
    "min_characters": 2,
    "tokenizer": {"kind": "bytes"},
}
SPLIT: dict[str, Any] = {
    "name": "split",
    "inputs": [
        {"kind": "jsonl", "paths": ["sources.jsonl"], "source_column": "meta.from"},
        {"kind": "jsonl", "paths": ["sources.jsonl"], "text_column": "note", "source_column": "by"},
    ],
    "heldout_fraction": 0.2,
    "tokenizer": {"kind": "bpe", "vocab_size": 260},
}
OUTPUTS: dict[str, Any] = {
    "name": "outputs",
    "licence": "Apache-2.0",
    "outputs": {
        "web": {"inputs": [{"kind": "jsonl", "paths": ["texts.jsonl"]}], "description": "Lines."},
        "code": {"inputs": [{"kind": "files", "paths": ["*.yaml"], "exclude": ["x*"]}]},
    },
    "deduplicate": False,
}
"""Recipes of several corpora."""
DOCUMENTS: list[dict[str, Any]] = [
    {"text": "a cat sat here", "note": "one", "by": "a/b", "meta": {"from": "web"}},
    {"text": "a dog did not", "note": None, "by": "a b", "meta": {"from": "code", "id": 3}},
    {"text": "two", "note": "three", "by": "web", "meta": {"from": "web"}},
]
"""Documents that name their sources."""
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 1000000000000000019884624838656,
    "eos_token": {"content": "</s>", "special": True},
    "bos_token": "<s>",
    "add_bos_token": True,
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
}


@dataclass
class Scene:
    """A folder with one valid example of everything; the current folder of all cases."""

    folder: Path

    def __post_init__(self) -> None:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(self.folder, filter="data")
        whole = self.folder / "whole"
        shutil.copytree(self.folder / "run", whole)
        (self.folder / "cost.json").write_text(json.dumps(COST))
        (self.folder / "lengths.txt").write_text("100\n2000\n30\n4096\n64\n" * 3)
        lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
        (self.folder / "sources.jsonl").write_text(lines)
        (self.folder / "full.yaml").write_text(yaml.safe_dump(CONFIG))
        (self.folder / "small.txt").write_text("the cat sat on the mat\n" * 4)
        (self.folder / "sweep.txt").write_text("optim.lr=1e-3 run_dir='a b'\nseed=2 run_dir=c\n")

    @cached_property
    def config(self) -> Any:
        """The resolved config of the run."""
        return yaml.safe_load((self.folder / "run" / "config.yaml").read_text())

    @cached_property
    def corpus(self) -> Any:
        """The content of corpus.json."""
        return json.loads((self.folder / "corpora" / "corpus" / "corpus.json").read_text())

    @cached_property
    def manifest(self) -> Any:
        """The content of manifest.json."""
        path = self.folder / "whole" / "checkpoints" / "00000004" / "manifest.json"
        return json.loads(path.read_text())

    @cached_property
    def metrics(self) -> list[Any]:
        """The rows of metrics.jsonl."""
        lines = (self.folder / "whole" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def bytes_of(self, name: str) -> bytes:
        """The content of an example that no case changes."""
        known: dict[str, bytes] = self.__dict__.setdefault("_bytes", {})
        if name not in known:
            known[name] = (self.folder / name).read_bytes()
        return known[name]

    @cached_property
    def codebook(self) -> Path:
        """A file of a small codebook."""
        from toy_m1 import small_book

        path = self.folder / "book.safetensors"
        small_book().save(path)
        return path

    @cached_property
    def tokenizer(self) -> Path:
        """A folder of a small tokenizer of Hugging Face."""
        from tokenizer_files import byte_bpe

        path = self.folder / "tokenizer"
        path.mkdir()
        byte_bpe().save(str(path / "tokenizer.json"))
        return path
