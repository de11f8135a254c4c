"""config.json, safetensors and tokenizer files of Hugging Face, without running a model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megascale.config import ModelConfig, MoeConfig, RopeScalingConfig, RunConfig
from megascale.errors import UserError

PLAIN = ModelConfig(
    num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, vocab_size=24, vocab_multiple=8
)
MOE = MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=6)
GATED = replace(MOE, shared_ffn_hidden_size=10, shared_gate=True)
MODELS = {
    "llama": PLAIN,
    "llama untied": replace(PLAIN, tied_embeddings=False, rope_base=5e5, norm_eps=1e-6),
    "llama 3": replace(
        PLAIN, rope_scaling=RopeScalingConfig(factor=4, high_turns=4, original_tokens=32)
    ),
    "mistral": replace(PLAIN, sliding_window=3, head_dim=6),
    "ministral": replace(PLAIN, sliding_window=3, attention_pattern=("sliding", "full")),
    "llama yarn": replace(
        PLAIN,
        rope_scaling=RopeScalingConfig(kind="yarn", high_turns=32, factor=4, original_tokens=19),
    ),
    "llama linear": replace(PLAIN, rope_scaling=RopeScalingConfig(kind="linear", factor=4)),
    "smollm3": replace(PLAIN, attention_pattern=("full", "full_nope")),
    "smollm3 window": replace(PLAIN, sliding_window=3, attention_pattern=("full", "sliding_nope")),
    "qwen2 pattern": replace(
        PLAIN, qkv_bias=True, sliding_window=3, attention_pattern=("full", "sliding")
    ),
    "olmo2": replace(PLAIN, qk_norm=True, qk_norm_heads="all", norm_position="after"),
    "olmo3": replace(
        PLAIN,
        qk_norm=True,
        qk_norm_heads="all",
        norm_position="after",
        sliding_window=3,
        local_rope_base=99.0,
        rope_scaling=RopeScalingConfig(kind="linear", factor=2),
        attention_pattern=("sliding", "full"),
    ),
    "mistral odd heads": replace(PLAIN, num_heads=6, head_dim=2),
    "qwen2": replace(PLAIN, qkv_bias=True),
    "qwen2 window": replace(PLAIN, qkv_bias=True, sliding_window=3),
    "qwen3": replace(PLAIN, qk_norm=True, head_dim=6),
    "qwen3 window": replace(PLAIN, qk_norm=True, sliding_window=5),
    "mixtral": replace(PLAIN, moe=MOE, sliding_window=3),
    "qwen2_moe": replace(PLAIN, moe=GATED, qkv_bias=True),
    "qwen2_moe without biases": replace(PLAIN, moe=replace(GATED, normalize_top_k=False)),
    "qwen2_moe window": replace(PLAIN, moe=GATED, qkv_bias=True, sliding_window=3),
    "qwen2_moe one expert": replace(PLAIN, moe=replace(GATED, top_k=1, normalize_top_k=False)),
    "qwen3_moe": replace(PLAIN, moe=MOE, qk_norm=True),
    "qwen3_moe window": replace(PLAIN, moe=MOE, qk_norm=True, sliding_window=4),
}


@pytest.fixture(scope="module")
def hf():
    """The package, whose modules need megatron-core."""
    from megascale.runtime import distributed

    distributed.prepare_device("cpu")
    from megascale.convert import huggingface
    from megascale.convert.huggingface import (
        config,
        families,
        model_files,
        tokenizer_folder,
        weights,
    )

    assert (
        huggingface.__doc__ and config and families and model_files and tokenizer_folder and weights
    )
    return huggingface


def final(hf, model):
    return hf.config.complete(RunConfig(model=model)).model


@pytest.mark.parametrize("name", MODELS)
def test_a_config_comes_back(hf, tmp_path, name):
    model = final(hf, MODELS[name])
    theirs = hf.config.config_of(model, 77, "bfloat16")
    assert theirs.model_type == name.split()[0]
    hf.config.write_config(theirs, tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["dtype"] == "bfloat16"
    if name != "olmo3":  # it has angles by kind of layer
        assert document["rope_theta"] == model.rope_base
    assert document["max_position_embeddings"] == 77
    again = hf.config.model_of(hf.config.read_config(tmp_path), tmp_path)
    # the dense size of a Mixtral is that of its experts
    ffn = model.ffn_hidden_size if theirs.model_type != "mixtral" else MOE.ffn_hidden_size
    assert again == replace(model, ffn_hidden_size=ffn)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel_block": True}, "parallel_block"),
        ({"qkv_bias": True, "qk_norm": True}, "qkv_bias with model.qk_norm"),
        ({"qkv_bias": True, "moe": MOE}, "qkv_bias with model.moe"),
        ({"moe": replace(MOE, shared_ffn_hidden_size=4)}, "shared_ffn_hidden_size"),
        ({"moe": replace(MOE, balance="loss_free")}, "loss_free"),
        ({"moe": replace(MOE, normalize_top_k=False)}, "normalize_top_k = false"),
        ({"moe": GATED, "qk_norm": True}, "shared_gate with model.qk_norm"),
        ({"attention_pattern": ("full_nope",), "qk_norm": True}, "attention_pattern"),
        ({"sliding_window": 3, "local_rope_base": 9.0}, "sliding_window"),
    ],
)
def test_models_of_no_family_are_refused(hf, changes, said):
    with pytest.raises(UserError, match=f"no family of Hugging Face has model.*{said}"):
        hf.config.config_of(final(hf, replace(PLAIN, **changes)), 64, "float32")


OLD_LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_theta": 1234.0,
}


def read(hf, folder, **changes):
    (folder / "config.json").write_text(json.dumps(OLD_LLAMA | changes))
    return hf.config.model_of(hf.config.read_config(folder), folder / "config.json")


def test_defaults_and_names_of_old_configs(hf, tmp_path):
    model = read(hf, tmp_path)
    assert (model.rope_base, model.num_kv_heads, model.head_dim) == (1234.0, 4, 8)
    assert not model.tied_embeddings and model.norm_eps == 1e-6
    assert model.vocab_multiple == 128  # 4 divides 100, which is too few for tensor ranks
    assert read(hf, tmp_path, vocab_size=96).vocab_multiple == 32
    window = {"model_type": "mistral", "num_key_value_heads": 2}
    assert read(hf, tmp_path, **window).sliding_window == 4096
    assert read(hf, tmp_path, **window, sliding_window=None).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not built; llama, mistral"),
        ({"model_type": ["llama"]}, "is not built"),
        (
            {"model_type": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": [0]},
            r"mlp_only_layers = \[0\]",
        ),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True, "decoder_sparse_step": 2}, "sparse"),
        ({"model_type": "mixtral", "num_experts_per_tok": 1}, "one expert per token"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary embedding .*dynamic"),
        ({"model_type": "deepseek_v3"}, r"'deepseek_v3' is not built \(MLA is not built\); llama"),
        ({"model_type": "gemma3_text"}, "GeGLU is not built"),
        ({"model_type": "gpt_oss"}, "attention sinks is not built"),
        ({"model_type": "qwen3_next"}, "linear attention is not built"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
            "mscale = 0.7 is not built; give attention_factor",
        ),
        (
            {"model_type": "smollm3", "num_key_value_heads": 2, "no_rope_layers": [1]}
            | {"layer_types": ["full_attention"] * 2},
            "no_rope_layers must have 2 values",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75, "hidden_size": 64}, "partial_rot"),
        (
            {"model_type": "phi3", "pad_token_id": 0}
            | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}}
            | {"rope_theta": 1e4},
            "longrope",
        ),
        ({"num_attention_heads": 5}, "config.json: .*5"),
        ({"num_key_value_heads": 3}, "model.num_kv_heads = 3 does not divide"),
        ({"num_hidden_layers": "two"}, "config.json: "),
    ],
)
def test_what_our_model_cannot_be_is_said_in_one_line(hf, tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as refusal:
        read(hf, tmp_path, **changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_config(hf, tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        hf.config.read_config(tmp_path)


def kind_of(hf, model):
    return hf.families.family_of(model)


def model_tensors(hf, model):
    """Random tensors of a model by the names of Hugging Face."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shapes = hf.weights.export_shapes(model, kind_of(hf, model))
    return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def write(hf, folder, tensors, shard_bytes=10**9, dtype=None):
    import torch

    folder.mkdir(exist_ok=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return hf.model_files.write_files(
        folder, shapes, dtype or torch.float32, iter(tensors.items()), shard_bytes
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [1, 700, 10**9])
def test_files_are_those_of_the_safetensors_library(hf, tmp_path, dtype, shard_bytes):
    import torch
    from safetensors.torch import load_file

    kind = getattr(torch, dtype)
    tensors = model_tensors(hf, final(hf, PLAIN))
    paths = write(hf, tmp_path, tensors, shard_bytes, kind)
    assert (len(paths) == 1) == (shard_bytes == 10**9)
    found = {}
    for path in paths:
        held = load_file(path)
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= shard_bytes or len(held) == 1
        found |= held
    assert found.keys() == tensors.keys()
    assert all(found[name].equal(tensor.to(kind)) for name, tensor in tensors.items())
    if len(paths) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    files = hf.model_files.ModelFiles.open(tmp_path)
    assert all(files.read(name).equal(tensor.to(kind)) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", MODELS)
def test_pieces_are_made_of_theirs_and_fall_into_them(hf, tmp_path, name):
    import torch

    model = final(hf, MODELS[name])
    tensors = model_tensors(hf, model)
    write(hf, tmp_path, tensors, 2000)
    files = hf.model_files.ModelFiles.open(tmp_path)
    assert hf.weights.check_files(files, model, kind_of(hf, model)) == torch.float32
    pieces = list(hf.weights.import_pieces(files, model, kind_of(hf, model), torch.float32))
    key = "decoder.layers.self_attention.linear_qkv.weight"
    (qkv,) = (piece for piece in pieces if piece.key == key and piece.offset[0] == 1)
    expected, per_group = [], model.num_heads // model.num_kv_heads
    q, k, v = (tensors[f"model.layers.1.self_attn.{one}_proj.weight"] for one in "qkv")
    heads = [x.split(model.head_dim) for x in (q, k, v)]
    for group in range(model.num_kv_heads):
        expected += heads[0][group * per_group : (group + 1) * per_group]
        expected += [heads[1][group], heads[2][group]]
    assert qkv.tensor[0].equal(torch.cat(expected))
    for match in hf.weights.matches(model, kind_of(hf, model)):
        parts = match.split(match.join([tensors[one] for one in match.names])[: sum(match.rows)])
        assert all(p.equal(tensors[one]) for one, p in zip(match.names, parts, strict=True))


def test_a_checkpoint_of_an_import_has_a_row_for_each_id_and_no_other(hf):
    model = final(hf, replace(PLAIN, vocab_size=21, vocab_multiple=16))
    tensors = model_tensors(hf, model)
    first = next(iter(hf.weights.matches(model, kind_of(hf, model))))
    joined = first.join([tensors["model.embed_tokens.weight"]])
    assert joined.shape == (21, 8) and joined.equal(tensors["model.embed_tokens.weight"])


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def listed_elsewhere(path: Path) -> None:
    index = path.with_name("model.safetensors.index.json")
    other = next(p.name for p in path.parent.glob("*.safetensors") if p.name != path.name)
    document = json.loads(index.read_text())
    document["weight_map"]["model.norm.weight"] = other
    index.write_text(json.dumps(document))


def points_outside(path: Path) -> None:
    index = path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../x"}}))


def only_pickles(path: Path) -> None:
    for file in path.parent.glob("*.safetensors*"):
        file.unlink()
    (path.parent / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (Path.unlink, "is missing"),
        (shorten, "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (listed_elsewhere, "lacks model.norm.weight, which model.safetensors.index.json"),
        (points_outside, "is no index"),
        (lambda path: path.with_name("model.safetensors.index.json").write_text("x"), "no index"),
        (only_pickles, "its .bin files are pickles, which are not read"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(hf, tmp_path, harm, said):
    paths = write(hf, tmp_path, model_tensors(hf, final(hf, PLAIN)), 2000)
    assert len(paths) > 1
    harm(paths[-1])
    with pytest.raises(UserError, match=said) as refusal:
        hf.model_files.ModelFiles.open(tmp_path)
    assert "\n" not in str(refusal.value)


def test_tensors_are_those_of_the_config(hf, tmp_path):
    import torch

    model = final(hf, PLAIN)
    tensors = model_tensors(hf, model)
    norm, head = "model.norm.weight", "lm_head.weight"

    def check(name, model=model, dtype=None, **changes):
        wanted = {k: v for k, v in (tensors | changes.get("put", {})).items() if v is not None}
        write(hf, tmp_path / name, wanted, dtype=dtype)
        return hf.weights.check_files(
            hf.model_files.ModelFiles.open(tmp_path / name), model, kind_of(hf, model)
        )

    assert check("fp16", dtype=torch.float16) == torch.float32
    assert check("bf16", dtype=torch.bfloat16) == torch.bfloat16
    with pytest.raises(UserError, match="lacks model.norm.weight"):
        check("lacking", put={norm: None})
    with pytest.raises(UserError, match="norm.weight is 9 and 8 by config.json"):
        check("shape", put={norm: torch.ones(9)})
    with pytest.raises(UserError, match="x.weight has no place"):
        check("more", put={"x.weight": torch.ones(9)})
    check("table", put={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    check("copy", put={head: tensors["model.embed_tokens.weight"]})
    with pytest.raises(UserError, match="lm_head.weight is another matrix"):
        check("untied", put={head: tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match="is tie_word_embeddings to be true"):
        check("tied", model=replace(model, tied_embeddings=False))


def test_weights_of_other_types_are_refused(hf, tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = model_tensors(hf, final(hf, PLAIN))
    tensors["model.norm.weight"] = torch.ones(8, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight is I8; F32, BF16, F16 can be read"):
        hf.weights.check_files(hf.model_files.ModelFiles.open(tmp_path), final(hf, PLAIN), "llama")


TEXTS = ["def f(x):\n\treturn x\r\n", "Größe 漢字 \U0001f600\x00\x7f ", "", "a  b"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_corpus_gives_its_tokenizer(hf, tmp_path, kind):
    from transformers import AutoTokenizer

    from megascale.cli import main
    from megascale.corpus.tokenizers import load_tokenizer

    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(40) for text in TEXTS)
    )
    size = {"bytes": "", "bpe": ", vocab_size: 300"}[kind]
    (tmp_path / "recipe.yaml").write_text(
        f"name: x\nlicence: none\ninputs: [{{kind: jsonl, paths: [{tmp_path}/texts.jsonl]}}]\n"
        f"tokenizer: {{kind: {kind}{size}}}\n"
    )
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    assert main(["prepare", str(tmp_path / "recipe.yaml"), "--out", str(corpus)]) == 0
    out.mkdir()
    hf.tokenizer_folder.write_tokenizer(corpus, out, 64)
    ours, theirs = load_tokenizer(corpus), AutoTokenizer.from_pretrained(out)
    assert theirs.bos_token_id == theirs.eos_token_id == ours.eod_id
    assert math.isclose(theirs.model_max_length, 64)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == [ours.eod_id, *ours.encode(text).tolist()]
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_a_folder_without_a_tokenizer(hf, tmp_path):
    assert not hf.tokenizer_folder.copy_tokenizer(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no tokenizer there"):
        hf.tokenizer_folder.write_tokenizer(tmp_path, tmp_path, 64)
