"""Models of `transformers` made here, imported, run, exported and run there; lm-eval on them."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_train import command

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # within which some pairs turn often, some seldom
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
PATTERN = {
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2,
}
PATTERN["layer_types"] = PATTERN["layer_types"][:4]
FAMILIES = {
    "llama": {"rope_theta": 5e5},
    "llama 3": {"rope_parameters": LLAMA_3},
    "mistral": {"sliding_window": 16, "tie_word_embeddings": True},
    "ministral": PATTERN | {"head_dim": 12},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "pad_token_id": None}
    | {"rope_parameters": YARN},
    "smollm3 window": PATTERN
    | {"use_sliding_window": True, "no_rope_layers": [1, 0, 1, 0], "pad_token_id": None},
    "phi3": {"sliding_window": 16, "pad_token_id": None, "eos_token_id": 2},
    "olmo2": {"num_key_value_heads": 2, "pad_token_id": None, "rope_parameters": YARN},
    "olmo3": PATTERN
    | {"pad_token_id": None}
    | {
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 777.0},
        }
    },
    "qwen2 yarn": {"rope_parameters": YARN},
    "qwen3 yarn": {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8.0}}
    | PATTERN
    | {"use_sliding_window": True},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "qwen2": {"vocab_size": 100, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "mixtral": EXPERTS,
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS
    | {"moe_intermediate_size": 16, "norm_topk_prob": True, "head_dim": 16, "vocab_size": 100},
    "qwen3_moe probabilities": EXPERTS | {"moe_intermediate_size": 16, "norm_topk_prob": False},
}


def make(folder, family, max_shard_size="5GB", **options):
    """Save a random model of a family, its norms and biases random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split()[0], **SHAPE | FAMILIES[family] | options)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight, 1.0, 0.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def their_logits(folder, ids):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.as_tensor(ids)).logits


def round_trip(folder, family, shard_bytes):
    """Make, import, export; what was said, and the largest differences of the logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from megascale.checkpoint.load import find_at
    from megascale.convert.one_rank import open_model

    first, ours, back = folder / "hf", folder / "ours", folder / "back"
    make(first, family, shard_bytes)
    said = [command("import", first, ours), command("export", ours, back, "--shard-bytes", "30K")]
    assert [status for status, _ in said] == [0, 0], said
    ids = np.random.default_rng(5).integers(0, 96, (2, 60))
    with open_model(find_at(ours), "fp32") as model:
        mine = torch.stack(model.logits(ids))
    expected = their_logits(first, ids)
    model = AutoModelForCausalLM.from_pretrained(back)
    text = model.generate(torch.as_tensor(ids[:, :5]), max_new_tokens=6, do_sample=False)
    again = (their_logits(back, ids) - expected).abs().max().item()
    shards = [len(list(one.glob("model-*.safetensors"))) for one in (first, back)]
    return said, (mine - expected).abs().max().item(), again, shards, text.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_in_and_out(ranks, tmp_path, family):
    sharded = family in ("llama", "qwen3_moe")
    size = "20KB" if sharded else "5GB"
    ((said, apart, again, shards, shape),) = ranks(
        1, round_trip, tmp_path, family, size, timeout_s=300
    )
    assert apart < 1e-4 and again == 0.0 and shape == (2, 11)
    assert (shards[0] > 1) == sharded and shards[1] > 1
    assert "largest difference" in said[0][1] and "tokenizer   none there" in said[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "ours"]


def losses_from(folder, overrides):
    """Summed losses of random sequences by the weights of a checkpoint, in any layout."""
    from dataclasses import replace

    from megascale.checkpoint.load import find_at, restore
    from megascale.config import parse_config
    from megascale.config.complete import complete
    from megascale.convert.one_rank import run_config
    from megascale.mesh.packing import TokenSequence, pack
    from megascale.model.build import build_model, pack_multiple
    from megascale.runtime import distributed
    from megascale.training.step import Learner, evaluate

    found = find_at(folder)
    config = complete(run_config(found))
    config = replace(config, parallel=parse_config("", overrides).parallel)
    ranks = distributed.start(config)
    learner = Learner(config, ranks, build_model(config, ranks), None)
    restore(found, learner.model, None, ranks)
    ids = np.random.default_rng(3).integers(0, 96, (2, 33))
    bag = [TokenSequence(row[:-1], row[1:]) for row in ids]
    batch = pack(bag, 0, pack_multiple(config, ranks.device), ranks.device)
    return evaluate(learner, [batch], 1)


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "olmo3"])
def test_every_layout_starts_from_an_import(ranks, tmp_path, family):
    import torch

    ranks(1, make, tmp_path / "hf", family)
    status, said = ranks(1, command, "import", tmp_path / "hf", tmp_path / "ours", "--no-check")[0]
    assert status == 0 and "logits" not in said
    ids = np.random.default_rng(3).integers(0, 96, (2, 33))
    logits = their_logits(tmp_path / "hf", ids[:, :-1]).flatten(0, 1)
    wanted = torch.as_tensor(ids[:, 1:]).flatten()
    expected = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
    layouts = [(1, []), (2, ["parallel.tensor=2"]), (2, ["parallel.pipeline=2"])]
    layouts += [(2, ["parallel.expert=2"])] if family == "mixtral" else []
    for world, overrides in layouts:
        loss, tokens = ranks(world, losses_from, tmp_path / "ours", overrides)[0]
        copies = tokens // 64
        assert tokens == 64 * copies and loss / copies == pytest.approx(expected, rel=1e-5)


def test_what_fails_leaves_nothing_behind(ranks, tmp_path):
    ranks(1, make, tmp_path / "hf", "qwen3", "20KB")
    hf, out = tmp_path / "hf", tmp_path / "out"

    def refused(*words):
        status, said = ranks(1, command, *words)[0]
        assert status == 2 and said.startswith("megascale: ") and said.count("\n") == 1, said
        return said

    assert "above --tolerance 0" in refused("import", hf, out, "--tolerance", "0")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
    assert ranks(1, command, "import", hf, out)[0][0] == 0
    assert "exists; choose another" in refused("import", hf, out)
    assert "--tolerance 0" in refused("export", out, tmp_path / "back", "--tolerance", "0")
    assert "no tokenizer" in refused("export", out, tmp_path / "back", "--tokenizer", tmp_path)
    assert "names no tokenizer" in refused("eval", out, "--tasks", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}
    shard = sorted(hf.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    assert "is damaged" in refused("import", hf, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


def test_bf16_is_kept_or_made(ranks, tmp_path):
    import torch
    from safetensors.torch import load_file

    ranks(1, make, tmp_path / "hf", "llama")
    status, said = ranks(
        1, command, "import", tmp_path / "hf", tmp_path / "ours", "--dtype", "bf16"
    )[0]
    assert status == 0 and "in bf16" in said, said
    status, said = ranks(1, command, "export", tmp_path / "ours", tmp_path / "back")[0]
    assert status == 0 and "llama in bfloat16, 1 file\n" in said, said
    first, back = (load_file(tmp_path / one / "model.safetensors") for one in ("hf", "back"))
    assert first.keys() == back.keys()
    assert all(first[name].to(torch.bfloat16).equal(back[name]) for name in first)
    again = ranks(1, command, "import", tmp_path / "back", tmp_path / "again", "--no-check")[0]
    assert again[0] == 0 and "in bf16" in again[1]


def has_lm_eval():
    return importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A prepared corpus of bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"The number {i} is {'odd' if i % 2 else 'even'}.\n" for i in range(400)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(
        f"name: x\nlicence: none\ninputs: [{{kind: jsonl, paths: [{folder}/texts.jsonl]}}]\n"
        "tokenizer: {kind: bytes}\n"
    )
    status, said = command("prepare", folder / "recipe.yaml", "--out", folder / "made")
    assert status == 0, said
    return folder / "made"


def trained(ranks, world, corpus, folder, *overrides):
    """A run of a few steps on `corpus`; its folder."""
    run = folder / "run"
    (folder / "config.yaml").write_text(
        f"run_dir: {run}\n"
        "model: {num_layers: 2, hidden_size: 32, num_heads: 2}\n"
        f"data: {{sources: {{numbers: {{path: {corpus}}}}}, context_tokens: 64,\n"
        "  global_batch_tokens: 1024}\n"
        "optim: {lr: 1.0e-2}\ntrain: {tokens: 20000, precision: fp32, threads: 1}\n"
        "eval: {every_steps: 0, tokens: 0}\nmonitor: {tensorboard: false}\n"
    )
    words = ("train", folder / "config.yaml", *overrides)
    status, said = ranks(world, command, *words, timeout_s=300)[0]
    assert status == 0, said
    return run


def make_with_tokenizer(folder, corpus):
    from megascale.convert.huggingface.tokenizer_folder import write_tokenizer

    make(folder, "llama", vocab_size=257)
    write_tokenizer(corpus, folder, 64)


def test_the_tokenizer_goes_along(ranks, corpus, tmp_path):
    ranks(1, make_with_tokenizer, tmp_path / "hf", corpus)
    ours = tmp_path / "ours"
    status, said = ranks(1, command, "import", tmp_path / "hf", ours, "--no-check")[0]
    assert status == 0 and f"tokenizer   {ours}/tokenizer" in said, said
    recipe = (corpus.parent / "recipe.yaml").read_text()
    tokenizer = f"tokenizer: {{kind: hf, path: {ours}/tokenizer}}"
    (tmp_path / "recipe.yaml").write_text(recipe.replace("tokenizer: {kind: bytes}", tokenizer))
    status, said = command("prepare", tmp_path / "recipe.yaml", "--out", tmp_path / "made")
    assert status == 0 and "tokenizer hf, 257 ids" in said, said
    assert (tmp_path / "made/train.bin").read_bytes() == (corpus / "train.bin").read_bytes()
    status, said = ranks(1, command, "export", ours, tmp_path / "back", "--no-check")[0]
    assert status == 0, said
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_config_continues_a_model(ranks, corpus, tmp_path):
    """configs/continue_from_hf.yaml as it stands, but for sizes."""
    ranks(1, make_with_tokenizer, tmp_path / "hf", corpus)
    ours, run = tmp_path / "imports/model", tmp_path / "run"
    ours.parent.mkdir()
    assert ranks(1, command, "import", tmp_path / "hf", ours)[0][0] == 0
    for name in ("new", "general"):
        tokenizer = f"tokenizer={{kind: hf, path: {ours}/tokenizer}}"
        words = (corpus.parent / "recipe.yaml", "--out", tmp_path / name, tokenizer)
        status, said = command("prepare", *words)
        assert status == 0, said
    words = [Path(__file__).parents[2] / "configs/continue_from_hf.yaml", f"run_dir={run}"]
    words += [f"start.checkpoint={ours}", "data.context_tokens=64", "train.threads=1"]
    words += [f"data.sources.{name}.path={tmp_path / name}" for name in ("new", "general")]
    words += ["data.global_batch_tokens=1024", "train.tokens=6000", "optim.warmup_tokens=2000"]
    status, said = command("plan", *words)
    assert status == 0 and "257 ids" in said and "new 95.00%, general 5.00%" in said, said
    answers = ranks(2, command, "train", *words, "optim.lr=1e-2")
    assert answers[0][0] == 0, answers[0][1]
    steps = [row for row in rows_of(run) if "loss" in row]
    first, last = (row["eval"] for row in rows_of(run) if "eval" in row)
    assert len(steps) >= 6 and steps[0]["lr"] < steps[1]["lr"] > steps[-1]["lr"]
    assert first.keys() == last.keys() == {"new", "general"}
    assert last["new"]["loss"] < first["new"]["loss"] - 0.5
    assert ranks(1, command, "export", run, tmp_path / "back")[0][0] == 0
    assert (tmp_path / "back/tokenizer.json").exists()
    status, said = command("plan", *words, "data.replay_fraction=0.05")
    assert status == 2 and "has read nothing that could be replayed; give text like" in said


@pytest.mark.parametrize(
    ("family", "world", "overrides"),
    [
        ("llama", 2, ["parallel.tensor=2", "model.num_heads=4", "model.num_kv_heads=2"]),
        ("qwen3_moe", 2, ["model.qk_norm=true", "model.moe.num_experts=4", "parallel.expert=2"]),
    ],
)
def test_our_own_runs_go_out(ranks, corpus, tmp_path, family, world, overrides):
    run = trained(ranks, world, corpus, tmp_path, *overrides)
    status, said = ranks(1, command, "export", run, tmp_path / "out")[0]
    assert status == 0 and f"{family} in float32, 1 file" in said, said
    assert f"tokenizer   of {corpus}" in said
    (continued,) = ranks(1, continue_text, tmp_path / "out", "The number 1")
    assert continued.startswith("The number 1")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["bos_token_id"] == generation["eos_token_id"] == 256


def continue_text(folder, prompt):
    """What a user of `transformers` gets."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.parallel_block=true"], "no family of Hugging Face has model.parallel_block"),
        (["model.moe.shared_ffn_hidden_size=16"], "model.moe.shared_ffn_hidden_size"),
        (["model.moe.attention_experts=2"], "model.moe.attention_experts"),
    ],
)
def test_models_that_no_family_has_stay_here(ranks, corpus, tmp_path, overrides, said):
    run = trained(ranks, 1, corpus, tmp_path, "train.stop_after_steps=1", *overrides)
    status, told = ranks(1, command, "export", run, tmp_path / "out")[0]
    assert status == 2 and said in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


QUESTIONS = [("The number 3 is", 0), ("The number 8 is", 1), ("The number 21", 0), ("", 1)]
CHOICES = [" odd.", " even."]
TASKS = {
    "odd_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: [" odd.", " even."]
metric_list: [{metric: acc}]
""",
    "odd_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "odd_generate": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{continuation}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def write_tasks(folder, continuations):
    """Three tasks on four questions; `continuations` are the right answers of the last."""
    folder.mkdir()
    rows = [
        {"question": question, "label": label, "text": question * 9 + "x", "continuation": right}
        for (question, label), right in zip(QUESTIONS, continuations)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n{text}"
        )
    return rows


def judge(exported, rows):
    """(accuracy, bits per byte) by `transformers` alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported).eval()

    def log_likelihood(prompt, text):
        ids = torch.tensor([[256, *prompt.encode(), *text.encode()]])
        with torch.no_grad():
            chances = model(ids[:, :-1]).logits.log_softmax(-1)[0]
        each = chances.gather(-1, ids[0, 1:, None])[:, 0]
        return each[len(prompt.encode()) :].sum().item()

    best = [np.argmax([log_likelihood(row["question"], one) for one in CHOICES]) for row in rows]
    right = np.mean([guess == row["label"] for guess, row in zip(best, rows)])
    total, count = 0.0, 0
    for row in rows:  # windows of the context, the last of which begins so early that it is full
        data = [256, *row["text"].encode()]
        for start in range(1, len(data), 64):
            end = min(start + 64, len(data))
            ids = torch.tensor([data[max(0, end - 65) : end]])
            with torch.no_grad():
                chances = model(ids[:, :-1]).logits.log_softmax(-1)[0]
            each = chances.gather(-1, ids[0, 1:, None])[:, 0]
            total += each[start - end :].sum().item()
        count += len(data) - 1
    return right, -total / count / math.log(2)


@pytest.mark.skipif(not has_lm_eval(), reason="lm-eval is not installed")
def test_lm_eval_judges_as_transformers_does(ranks, corpus, tmp_path):
    run = trained(ranks, 1, corpus, tmp_path)
    assert ranks(1, command, "export", run, tmp_path / "out", "--no-check")[0][0] == 0
    continuations = [
        ranks(1, continue_text, tmp_path / "out", question)[0][len(question) :].split(".")[0]
        for question, _ in QUESTIONS
    ]
    rows = write_tasks(tmp_path / "tasks", [*continuations[:3], "something else"])
    ((right, bits),) = ranks(1, judge, tmp_path / "out", rows)
    words = ("--include", tmp_path / "tasks", "--out", tmp_path / "results.json")
    status, said = ranks(
        1, command, "eval", run, "--tasks", ",".join(TASKS), *words, timeout_s=300
    )[0]
    assert status == 0 and "odd_choice" in said, said
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results["odd_choice"]["acc,none"] == pytest.approx(right)
    assert results["odd_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert results["odd_generate"]["exact_match,none"] == 0.75
    status, said = ranks(1, command, "eval", run, "--tasks", "no_such_task")[0]
    assert status == 2 and "lm-eval has no no_such_task" in said and said.count("\n") == 1
