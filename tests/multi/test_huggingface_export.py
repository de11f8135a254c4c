"""What an imported model said of text and generation comes back by exports of its branches."""

import json
import shutil
from pathlib import Path

import pytest
from test_huggingface_models import SHAPE
from test_train import command

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "pad_token_id": 3,
    "rope_theta": 5e5,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "sliding_window": 8,  # which a Llama ignores
    "house_rules": {"tone": "dry", "list": [1, 2]},
    "attention_dropout": 0.1,
}
GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "pad_token_id": 3,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "max_new_tokens": 40,
}


def write_backend(folder, extra=()):
    """A byte-level BPE whose ids do not depend on `extra`, tokens that come after the others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: number for number, name in enumerate([*SPECIAL, *names])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL, *extra])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))


def write_original(folder, **changes):
    """A model folder as one on the hub: ids, chat template, settings, files of old tokenizers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    write_backend(folder)
    stated = SHAPE | {"vocab_size": 264} | CONFIG | changes
    files = {
        "config.json": stated,
        "generation_config.json": GENERATION,
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "<|im_end|>"},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "padding_side": "left",
            "model_max_length": 4096,
        },
    }
    for name, document in files.items():
        (folder / name).write_text(json.dumps(document))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer.model").write_bytes(b"\x01\x02")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    saved = folder / "saved"
    model.save_pretrained(saved)
    shutil.move(saved / "model.safetensors", folder / "model.safetensors")
    shutil.rmtree(saved)


def seen_by_transformers(folder):
    """What a user of `transformers` gets from a model folder, as plain values."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config, generation = AutoConfig.from_pretrained(folder).to_dict(), model.generation_config
    chat = [{"role": "user", "content": "Say something."}]
    return {
        "config": {k: v for k, v in config.items() if k not in ("_name_or_path", "dtype")},
        "generation": generation.to_dict(),
        "template": tokenizer.chat_template and tokenizer.apply_chat_template(chat)["input_ids"],
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "text": tokenizer("Some text.")["input_ids"],
        "side": (tokenizer.padding_side, tokenizer.model_max_length),
    }


def prepared(folder, tokenizer):
    """A corpus that `tokenizer`, a section of a recipe, makes of a few texts."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": f"The number {i} is of interest."}) for i in range(300)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(
        f"name: x\nlicence: none\ninputs: [{{kind: jsonl, paths: [{folder}/texts.jsonl]}}]\n"
        f"tokenizer: {tokenizer}\n"
    )
    status, said = command("prepare", folder / "recipe.yaml", "--out", folder / "made")
    assert status == 0, said
    return folder / "made"


def branch(ranks, start, corpus, run, *overrides, resume=None):
    """A run of a few steps from `start`; its folder."""
    (run.parent / f"{run.name}.yaml").write_text(
        f"run_dir: {run}\nstart: {{checkpoint: {start}}}\n"
        f"data: {{sources: {{x: {{path: {corpus}}}}}, context_tokens: 64,\n"
        "  global_batch_tokens: 256}\n"
        "optim: {lr: 1.0e-3}\ntrain: {tokens: 1000, precision: fp32, threads: 1}\n"
        "eval: {every_steps: 0, tokens: 0}\nmonitor: {tensorboard: false}\n"
    )
    words = ["train", run.parent / f"{run.name}.yaml", *overrides]
    words += ["--resume", resume] if resume else []
    status, said = ranks(1, command, *words, timeout_s=300)[0]
    assert status == 0, said
    return run


def done(ranks, *words):
    """What a command that must succeed said."""
    status, said = ranks(1, command, *words, timeout_s=300)[0]
    assert status == 0, said
    return said


@pytest.fixture(scope="module")
def model(rank_pools, tmp_path_factory):
    """An original, its import, and a corpus by its tokenizer."""
    folder, ranks = tmp_path_factory.mktemp("model"), rank_pools.run
    ranks(1, write_original, folder / "hf")
    said = done(ranks, "import", folder / "hf", folder / "ours")
    assert "note        attention_dropout = 0.1 is not applied in training here" in said
    corpus = prepared(folder / "text", f"{{kind: hf, path: {folder}/ours/tokenizer}}")
    return folder / "hf", folder / "ours", corpus


FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FILES += ("chat_template.jinja", "tokenizer.model")


def assert_all_came_back(ranks, original, exported, **changed):
    first, last = (ranks(1, seen_by_transformers, one)[0] for one in (original, exported))
    first["config"] |= changed
    assert last == first
    assert last["ids"] == [1, 5, 3] and last["config"]["eos_token_id"] == [2, 5]
    for name in FILES:
        assert (exported / name).read_bytes() == (original / name).read_bytes()
    stated = json.loads((exported / "config.json").read_text())
    assert stated["house_rules"] == CONFIG["house_rules"] and stated["sliding_window"] == 8


def test_branches_give_back_what_an_import_kept(ranks, model, tmp_path):
    original, ours, corpus = model
    shutil.copytree(ours, tmp_path / "ours")
    done(ranks, "export", tmp_path / "ours", tmp_path / "direct")
    assert_all_came_back(ranks, original, tmp_path / "direct")
    first = branch(ranks, tmp_path / "ours", corpus, tmp_path / "first")
    shutil.rmtree(tmp_path / "ours")
    branch(ranks, first, corpus, tmp_path / "second", "train.stop_after_steps=2")
    shutil.rmtree(first)
    second = branch(ranks, first, corpus, tmp_path / "second", resume="auto")
    said = done(ranks, "export", second, tmp_path / "back")
    assert "note" not in said and f"tokenizer   of {corpus}" in said
    assert_all_came_back(ranks, original, tmp_path / "back")
    latest = max((second / "checkpoints").glob("0*"))
    done(ranks, "export", latest, tmp_path / "again", "--tokenizer", original)
    assert_all_came_back(ranks, original, tmp_path / "again")


def test_grown_models_give_it_back_too(ranks, model, tmp_path):
    original, ours, corpus = model
    done(ranks, "grow", ours, "--factor", "2", "--out", tmp_path / "grown")
    run = branch(ranks, tmp_path / "grown", corpus, tmp_path / "run")
    done(ranks, "export", run, tmp_path / "back")
    assert_all_came_back(ranks, original, tmp_path / "back", num_hidden_layers=4)


def test_what_the_model_has_become_wins(ranks, model, tmp_path):
    """Rotary angles, window, context; a shorter context afterwards takes nothing back."""
    original, ours, corpus = model
    changes = ["model.rope_base=9e4", "model.sliding_window=24", "data.context_tokens=192"]
    first = branch(ranks, ours, corpus, tmp_path / "first", *changes)
    second = branch(ranks, first, corpus, tmp_path / "second")
    said = done(ranks, "export", second, tmp_path / "back")
    assert "mistral in float32" in said
    first, last = (ranks(1, seen_by_transformers, x)[0] for x in (original, tmp_path / "back"))
    config = last["config"]
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 9e4}
    assert (config["sliding_window"], config["max_position_embeddings"]) == (24, 192)
    assert last["generation"] == first["generation"] and last["template"] == first["template"]
    assert config["eos_token_id"] == [2, 5] and config["house_rules"] == CONFIG["house_rules"]


def write_scaled(folder, scaling):
    write_original(folder, rope_scaling=scaling)


def inverse_frequencies(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.model.rotary_emb.inv_freq.tolist()


def limit_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).model_max_length


def test_a_longer_context_keeps_angles_and_raises_the_limit_of_texts(ranks, tmp_path):
    """Llama 3's scaling, whose original context is that of the import where it is not stated."""
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1, "high_freq_factor": 4}
    ranks(1, write_scaled, tmp_path / "hf", scaling)
    path = tmp_path / "hf/tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"model_max_length": 100}))
    done(ranks, "import", tmp_path / "hf", tmp_path / "ours")
    done(ranks, "export", tmp_path / "ours", tmp_path / "same")
    assert (tmp_path / "same/tokenizer_config.json").read_bytes() == path.read_bytes()
    corpus = prepared(tmp_path / "text", f"{{kind: hf, path: {tmp_path}/ours/tokenizer}}")
    long = branch(ranks, tmp_path / "ours", corpus, tmp_path / "long", "data.context_tokens=192")
    short = branch(ranks, long, corpus, tmp_path / "short")
    expected = ranks(1, inverse_frequencies, tmp_path / "hf")[0]
    for number, (run, words) in enumerate(
        [(long, []), (short, []), (short, ["--tokenizer", tmp_path / "hf"])]
    ):
        out = tmp_path / f"back{number}"
        said = done(ranks, "export", run, out, *words)
        assert "note" not in said
        assert ranks(1, inverse_frequencies, out)[0] == pytest.approx(expected, rel=1e-6)
        assert ranks(1, limit_of, out)[0] == 192
        assert (out / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize("limit", [1000000000000000019884624838656, 4096, None])
def test_a_higher_limit_of_texts_stays(tmp_path, limit):
    from megascale.convert.huggingface.tokenizer_folder import raise_max_length

    path = tmp_path / "tokenizer_config.json"
    path.write_text(text := json.dumps({"model_max_length": limit} if limit else {}))
    raise_max_length(tmp_path, 4096)
    assert path.read_text() == text
    path.unlink()
    raise_max_length(tmp_path, 4096)
    assert not path.exists()


def test_a_larger_vocabulary_keeps_the_ids_it_has(ranks, model, tmp_path):
    original, ours, _ = model
    write_backend(tmp_path / "larger", extra=["<|tool|>", "<|call|>"])
    shutil.copy(original / "tokenizer_config.json", tmp_path / "larger")
    corpus = prepared(tmp_path / "text", f"{{kind: hf, path: {tmp_path}/larger}}")
    words = ("--operator", "resize", "--vocab", "272", "--out", tmp_path / "grown")
    done(ranks, "grow", ours, *words)
    run = branch(ranks, tmp_path / "grown", corpus, tmp_path / "run")
    said = done(ranks, "export", run, tmp_path / "back")
    assert "note" not in said
    first, last = (ranks(1, seen_by_transformers, x)[0] for x in (original, tmp_path / "back"))
    first["config"]["vocab_size"] = 272
    assert last == first
    saved = json.loads((tmp_path / "back/tokenizer.json").read_text())
    assert saved["added_tokens"][-1]["content"] == "<|call|>"
    assert not (tmp_path / "back/tokenizer.model").exists()  # it is of the smaller vocabulary


def test_another_tokenizer_brings_its_own_ids(ranks, model, tmp_path):
    original, ours, _ = model
    corpus = prepared(tmp_path / "text", "{kind: bytes}")
    run = branch(ranks, ours, corpus, tmp_path / "run")
    said = done(ranks, "export", run, tmp_path / "back")
    assert "is another than the imported one, so ids that begin and end a text are its own" in said
    last = ranks(1, seen_by_transformers, tmp_path / "back")[0]
    assert last["ids"] == [256, 256, None] and last["template"] is None
    assert last["text"] == [256, *b"Some text."]
    assert (last["config"]["bos_token_id"], last["config"]["eos_token_id"]) == (256, 256)
    generation = last["generation"]
    assert (generation["eos_token_id"], generation["temperature"]) == (256, 0.6)


def test_ids_that_the_model_lacks_are_left_out_aloud(ranks, model, tmp_path):
    _, ours, corpus = model
    shutil.copytree(ours, tmp_path / "ours")
    generation = tmp_path / "ours/imported/generation_config.json"
    generation.write_text(json.dumps(GENERATION | {"eos_token_id": [2, 264], "pad_token_id": 900}))
    said = done(ranks, "export", tmp_path / "ours", tmp_path / "back", "--no-check")
    assert (
        "the model knows 264 ids, so what is above them was left out of eos_token_id = [2, 264]"
        in said
    )
    assert "left out of pad_token_id = 900 of generation_config.json" in said
    found = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert (found["eos_token_id"], found["pad_token_id"]) == ([2], None)
    generation.write_text(json.dumps(GENERATION | {"eos_token_id": [2]}))
    run = branch(ranks, tmp_path / "ours", corpus, tmp_path / "run")
    assert "documents ended with id 5 in training, and eos_token_id = [2] of the import" in done(
        ranks, "export", run, tmp_path / "run_back"
    )
    generation.write_text("[")
    status, said = ranks(1, command, "export", tmp_path / "ours", tmp_path / "x")[0]
    assert status == 2 and "generation_config.json: not JSON: " in said, said
    assert said.count("\n") == 1 and not (tmp_path / "x").exists()


def test_an_import_by_an_earlier_version_is_exported_as_before(ranks, model, tmp_path):
    _, ours, corpus = model
    shutil.copytree(ours, tmp_path / "ours", ignore=lambda *_: ["imported"])
    run = branch(ranks, tmp_path / "ours", corpus, tmp_path / "run")
    done(ranks, "export", run, tmp_path / "back")
    last = ranks(1, seen_by_transformers, tmp_path / "back")[0]
    assert last["ids"] == [1, 5, None] and last["text"][0] == 1  # as documents of the corpus begin


def test_a_model_without_generation_settings_gets_none(ranks, tmp_path):
    folder: Path = tmp_path / "hf"
    ranks(1, write_original, folder)
    (folder / "generation_config.json").unlink()
    done(ranks, "import", folder, tmp_path / "ours", "--no-check")
    done(ranks, "export", tmp_path / "ours", tmp_path / "back", "--no-check")
    assert not (tmp_path / "back/generation_config.json").exists()
    assert_all_came_back(ranks, folder, tmp_path / "back")
