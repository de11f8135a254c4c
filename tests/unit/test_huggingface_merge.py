"""config.json of a model that came from an import: its own words, and what has changed."""

import json
from dataclasses import replace

import pytest
from test_huggingface import GATED, MODELS, MOE, PLAIN, final, hf  # noqa: F401

from megascale.config import RopeScalingConfig
from megascale.errors import UserError

OWN = {
    "eos_token_id": [1, 2],
    "bos_token_id": 0,
    "house_rules": {"tone": "dry"},
    "attention_bias": False,
    "output_router_logits": False,
}


def kept(hf, folder, model, **stated):  # noqa: F811
    """The folder of an import of `model`, whose config.json also says `stated`."""

    theirs = hf.config.config_of(final(hf, model), 512, "float32")
    (folder / "imported").mkdir()
    hf.config.write_config(theirs, folder / "imported")
    path = folder / "imported/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OWN | stated))
    return folder


def merged(hf, folder, before, after, context_tokens=64, **stated):  # noqa: F811
    """The document, and the model that it is read as."""
    from megascale.convert.huggingface.kept import Kept
    from megascale.convert.huggingface.merge import merged_config

    known = Kept.of(kept(hf, folder, before, **stated))
    document = merged_config(known, final(hf, after), context_tokens, "bfloat16")
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return document, hf.config.model_of(hf.config.read_config(folder), path)


@pytest.mark.parametrize("name", MODELS)
def test_what_has_not_changed_stays_in_the_words_of_the_import(hf, tmp_path, name):  # noqa: F811
    document, model = merged(hf, tmp_path, MODELS[name], MODELS[name])
    before = json.loads((tmp_path / "imported/config.json").read_text())
    assert document == before | {"dtype": "bfloat16"} and document["model_type"] == name.split()[0]
    experts = model.ffn_hidden_size if document["model_type"] == "mixtral" else None
    wanted = final(hf, MODELS[name])
    assert model == replace(wanted, ffn_hidden_size=experts or wanted.ffn_hidden_size)


SCALED = replace(PLAIN, rope_scaling=RopeScalingConfig(factor=4, high_turns=4, original_tokens=32))
LLAMA_3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD_ROPE = {
    "rope_parameters": LLAMA_3 | {"rope_theta": 7.0, "original_max_position_embeddings": 16},
    "rope_theta": 7.0,
    "original_max_position_embeddings": 8,
}
IGNORED = {"sliding_window": 9, "layer_types": ["sliding_attention"] * 2, "num_experts": 3}
NOT_MEANT = {"decoder_sparse_step": 2, "mlp_only_layers": [0], "norm_topk_prob": False}


@pytest.mark.parametrize(
    ("before", "after", "stated", "kind"),
    [
        (PLAIN, replace(PLAIN, num_layers=4), IGNORED, "llama"),
        (PLAIN, replace(PLAIN, vocab_size=32, rope_base=9e4), OLD_ROPE, "llama"),
        (
            PLAIN,
            SCALED,
            OLD_ROPE | {"partial_rotary_factor": 0.5, "rope_parameters": None},
            "llama",
        ),
        (PLAIN, replace(PLAIN, sliding_window=5), IGNORED, "mistral"),
        (PLAIN, replace(PLAIN, moe=MOE), IGNORED | NOT_MEANT, "mixtral"),
        (MODELS["mistral"], replace(MODELS["mistral"], sliding_window=None), {}, "mistral"),
        (MODELS["mistral"], replace(MODELS["mistral"], sliding_window=99), {}, "mistral"),
        (
            MODELS["qwen2"],
            replace(MODELS["qwen2"], num_layers=4, tied_embeddings=False),
            {},
            "qwen2",
        ),
        (MODELS["qwen2"], replace(MODELS["qwen2"], sliding_window=3), {}, "qwen2"),
        (MODELS["qwen2 window"], replace(MODELS["qwen2"], num_layers=3), {}, "qwen2"),
        (MODELS["qwen3"], replace(MODELS["qwen3"], moe=MOE), NOT_MEANT, "qwen3_moe"),
        (MODELS["qwen3 window"], MODELS["qwen3_moe"], NOT_MEANT, "qwen3_moe"),
        (MODELS["qwen2_moe window"], MODELS["qwen2_moe"], {}, "qwen2_moe"),
        (MODELS["qwen2_moe"], MODELS["qwen2_moe window"], {}, "qwen2_moe"),
        (MODELS["qwen2"], replace(PLAIN, moe=GATED, qkv_bias=True), NOT_MEANT, "qwen2_moe"),
    ],
)
def test_what_has_changed_wins(hf, tmp_path, before, after, stated, kind):  # noqa: F811
    document, model = merged(hf, tmp_path, before, after, **stated)
    wanted = final(hf, after)
    if kind == "mixtral":
        wanted = replace(wanted, ffn_hidden_size=MOE.ffn_hidden_size)
    if after.vocab_size == 32:
        wanted = replace(wanted, vocab_multiple=32)
    assert model == wanted and document["model_type"] == kind
    assert document["house_rules"] == {"tone": "dry"} and document["eos_token_id"] == [1, 2]
    assert document["max_position_embeddings"] == 512


def test_a_longer_context_of_training_counts(hf, tmp_path):  # noqa: F811
    from megascale.convert.huggingface.kept import Kept, pass_on

    document, _ = merged(hf, tmp_path, PLAIN, PLAIN, context_tokens=600)
    assert document["max_position_embeddings"] == 600
    for name, context_tokens, wanted in (("a", 700, 700), ("b", 64, 512)):
        (tmp_path / name).mkdir()
        pass_on(tmp_path, tmp_path / name, context_tokens)
        assert Kept.of(tmp_path / name).config["max_position_embeddings"] == wanted
    pass_on(tmp_path / "nothing there", tmp_path / "a", 64)
    assert Kept.of(tmp_path / "a").config["max_position_embeddings"] == 700


def inverse_frequencies(config):
    """As transformers has them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config).inv_freq.double().numpy()


@pytest.mark.parametrize(
    "stated",
    [
        {"rope_parameters": LLAMA_3 | {"rope_theta": 9e3}},
        {"rope_parameters": None, "rope_scaling": LLAMA_3, "rope_theta": 9e3},
        {"rope_parameters": LLAMA_3 | {"rope_theta": 9e3, "original_max_position_embeddings": 16}},
        {
            "rope_parameters": None,
            "rope_scaling": LLAMA_3,
            "rope_theta": 9e3,
            "original_max_position_embeddings": 16,
        },
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9e3}},
    ],
)
@pytest.mark.parametrize("contexts", [[64], [8192], [2048, 64], [2048, 8192, 64], [600, 600]])
def test_angles_stay_whatever_the_context_becomes(hf, tmp_path, stated, contexts):  # noqa: F811
    """Scaled angles depend on the context of the import where it states no other number."""
    from megascale.convert.huggingface.kept import Kept, pass_on
    from megascale.convert.huggingface.merge import merged_config

    def read(folder):
        return hf.config.read_config(folder), folder / "config.json"

    known = Kept.of(kept(hf, tmp_path, PLAIN, max_position_embeddings=64, **stated))
    before = inverse_frequencies(read(known.folder)[0])
    model = final(hf, hf.config.model_of(*read(known.folder)))
    *earlier, last = contexts
    home = tmp_path
    for number, context_tokens in enumerate(earlier):
        home, parent = tmp_path / str(number), home
        home.mkdir()
        pass_on(parent, home, context_tokens)
    document = merged_config(Kept.of(home), model, last, "float32")
    assert document["max_position_embeddings"] == max(64, *contexts)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(document))
    assert inverse_frequencies(read(out)[0]) == pytest.approx(before, rel=1e-6)
    assert final(hf, hf.config.model_of(*read(out))) == model


def test_code_of_the_imported_folder_is_not_spoken_of(hf, tmp_path):  # noqa: F811
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}, "torch_dtype": "float16"}
    document, _ = merged(hf, tmp_path, PLAIN, PLAIN, **code)
    assert "auto_map" not in document and "torch_dtype" not in document
    stated = hf.config.config_from({**document, **code}, tmp_path)
    assert any("auto_map names code" in note for note in hf.config.import_notes(stated))


@pytest.mark.parametrize("text", ["[]", "{", None])
def test_what_was_kept_must_be_readable(hf, tmp_path, text):  # noqa: F811
    from megascale.convert.huggingface.kept import Kept

    kept(hf, tmp_path, PLAIN)
    path = tmp_path / "imported/config.json"
    path.write_text(text) if text is not None else path.unlink()
    with pytest.raises(UserError, match="imported/config.json") as refusal:
        Kept.of(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_that_only_its_own_code_reads_is_compared_by_its_files(hf, tmp_path):  # noqa: F811
    first, same, other, without = (tmp_path / name for name in ("a", "b", "c", "d"))
    for folder, content in ((first, b"\x01"), (same, b"\x01"), (other, b"\x02")):
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(content)
    without.mkdir()
    assert hf.tokenizer_folder.relation(same, first) == "same"
    assert hf.tokenizer_folder.relation(other, first) == "other"
    assert hf.tokenizer_folder.relation(other, without) == "same"  # nothing is known of it


def test_what_was_kept_says_how_long_its_context_is(hf, tmp_path):  # noqa: F811
    from megascale.convert.huggingface.kept import Kept

    kept(hf, tmp_path, PLAIN, max_position_embeddings=None)
    with pytest.raises(UserError, match="lacks max_position_embeddings; import the model again"):
        Kept.of(tmp_path)
