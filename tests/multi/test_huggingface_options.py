"""Every option of a config.json: read, ignored or refused, as `transformers` itself treats it."""

import json
import re

import numpy as np
import pytest
from test_huggingface_models import EXPERTS, LLAMA_3, SHAPE
from test_train import command

WINDOW = {"sliding_window": 16}
USED = WINDOW | {"use_sliding_window": True, "max_window_layers": 0}
SLIDING = ["sliding_attention"] * 2
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NEEDED = {
    "mixtral": EXPERTS,
    "qwen2_moe": QWEN_MOE | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": QWEN_MOE,
}
"""What a small model of a family needs."""
ALL_IGNORE = {
    "attention_multiplier": 3.0,
    "residual_multiplier": 0.2,
    "embedding_multiplier": 5.0,
    "logits_scaling": 7.0,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 1.0,
    "query_pre_attn_scalar": 2,
    "clip_qkv": 0.01,
    "qk_layernorm": True,
    "parallel_attn": True,
    "pretraining_tp": 2,
    "partial_rotary_factor": 0.5,  # of angles that are not scaled
    "attention_chunk_size": 8,
    "no_rope_layers": [0, 0],
    "attention_dropout": 0.5,
    "use_cache": False,
    "hidden_act": "swish",  # another name of silu
    "pad_token_id": 3,
}
"""Options of other families, of training, and other names: nothing changes for any of ours."""
IGNORE = {
    "llama": WINDOW
    | {"use_sliding_window": True, "max_window_layers": 0, "layer_types": SLIDING, "qkv_bias": True}
    | {"norm_topk_prob": False, "num_experts": 4, "mlp_only_layers": [0]},
    "mistral": {"attention_bias": True, "mlp_bias": True, "qkv_bias": True, "num_experts": 4}
    | {"sliding_window": None, "use_sliding_window": True},
    "qwen2": WINDOW | {"attention_bias": True, "mlp_bias": True, "qkv_bias": False},
    "qwen3": WINDOW | {"mlp_bias": True, "qkv_bias": True, "decoder_sparse_step": 2},
    "mixtral": {"attention_bias": True, "qkv_bias": True, "norm_topk_prob": False}
    | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}
    | {"decoder_sparse_step": 2, "router_jitter_noise": 0.5, "use_sliding_window": True},
    "qwen2_moe": WINDOW | {"attention_bias": True, "mlp_bias": True, "mlp_only_layers": [7]},
    "qwen3_moe": WINDOW
    | {"shared_expert_intermediate_size": 24, "qkv_bias": True, "mlp_only_layers": [7]}
    | {"layer_types": SLIDING, "max_window_layers": 0},
}
MIXED = {"layer_types": ["full_attention", "sliding_attention"]}
READ = {
    "llama": [
        {"rope_scaling": LLAMA_3},
        {
            "rope_scaling": {"type": "llama3"}
            | {k: v for k, v in LLAMA_3.items() if k != "rope_type"}
        },
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rope_theta": 5e5},
        {"original_max_position_embeddings": 16, "rope_parameters": LLAMA_3},
    ],
    "mistral": [
        WINDOW,
        WINDOW | MIXED | {"head_dim": 8},
        {"sliding_window": 1},
        {"sliding_window": 300, "num_hidden_layers": 1},
    ],
    "qwen2": [USED, WINDOW | {"use_sliding_window": True, "layer_types": SLIDING}]
    + [USED | {"max_window_layers": 1}, USED | MIXED]
    + [USED | {"max_window_layers": 2}, USED | {"layer_types": ["full_attention"] * 2}],
    "qwen3": [USED, USED | {"max_window_layers": 2}, {"head_dim": 4}],
    "mixtral": [WINDOW, {"num_local_experts": 3}, {"sliding_window": 5, "head_dim": 4}],
    "qwen2_moe": [
        {"qkv_bias": False},
        {"norm_topk_prob": True},
        {"num_experts_per_tok": 1},
        USED,
        WINDOW | {"use_sliding_window": True, "layer_types": SLIDING},
        USED | {"max_window_layers": 1, "num_hidden_layers": 1},
    ],
    "qwen3_moe": [USED, USED | {"layer_types": ["full_attention"] * 2, "max_window_layers": 9}]
    + [{"norm_topk_prob": False, "num_experts_per_tok": 1}, {"norm_topk_prob": True}],
}
"""Options that a family has; every family also has those of `ALL_READ`."""
ALL_READ = [
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 2, "truncate": False}}
    | {"head_dim": 8},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 8},
    {"num_key_value_heads": 4, "head_dim": 6, "tie_word_embeddings": True, "rms_norm_eps": 0.3},
    {"rope_theta": 50.0, "num_key_value_heads": 1, "vocab_size": 101},
]
REFUSED = {
    "llama": [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
    "mistral": [
        ({"sliding_window": 0}, "sliding_window = 0"),
    ],
    "qwen2": [({"layer_types": SLIDING}, "need sliding_window and use_sliding_window")],
    "qwen3": [({"attention_bias": True}, "attention_bias")],
    "mixtral": [({"num_experts_per_tok": 1}, "one expert per token")],
    "qwen2_moe": [
        ({"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\] .* layers \[1\]"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0 must be at least 1"),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step = 2 leave layers \[0\]"),
        ({"norm_topk_prob": True, "num_experts_per_tok": 1}, "one expert per token"),
        ({"layer_types": SLIDING}, "need sliding_window"),
    ],
    "qwen3_moe": [({"attention_bias": True}, "attention_bias"), ({"mlp_only_layers": [0]}, "[0]")],
}
ALL_REFUSED = [
    ({"hidden_act": "gelu"}, "hidden_act = gelu"),
    ({"is_causal": False}, "is_causal = False"),
    ({"rope_theta": None}, "rope_theta = None"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.5}}, "mscale = 1.5"),
    ({"rope_parameters": LLAMA_3, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config"),
    ({"num_experts_per_tok": 5, "num_experts": 4, "model_type": "qwen3_moe"}, "top_k = 5"),
]


def write_model(folder, kind, options):
    """A random model whose config.json says `options`, in the words of a user."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    stated = {"model_type": kind} | SHAPE | NEEDED.get(kind, {}) | options
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(stated))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight, 1.0, 0.5)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(stated))


def their_difference(first, second, tokens):
    """Largest difference of two model folders by `transformers` alone, over `tokens` tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.as_tensor(np.random.default_rng(5).integers(0, 96, (1, tokens)))
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(x).eval()(ids).logits for x in (first, second)
        )
    return (one - other).abs().max().item()


def imported(folder, kind, cases):
    """For each case: what the check says of the import, and how far the export is off."""
    import torch

    from megascale.checkpoint.load import find_at
    from megascale.convert.compare_logits import compare_logits

    found = []
    for place, options in enumerate(cases):
        hf, ours, back = (folder / f"{place}" / name for name in ("hf", "ours", "back"))
        write_model(hf, kind, options)
        said = [
            command("import", hf, ours, "--no-check"),
            command("export", ours, back, "--no-check"),
        ]
        assert [status for status, _ in said] == [0, 0], (options, said)
        difference = compare_logits(hf, find_at(ours), torch.float32)
        apart = their_difference(hf, back, difference.tokens)
        exported = json.loads((back / "config.json").read_text())
        stated = json.loads((hf / "config.json").read_text())
        lost = {k for k in stated if exported.get(k, "lost") != stated[k]}
        found.append((difference.relative, difference.tokens, apart, lost))
    return found


@pytest.mark.parametrize("kind", READ)
def test_options_of_a_family_are_read_and_those_of_others_ignored(ranks, tmp_path, kind):
    cases = [ALL_IGNORE | IGNORE[kind], *ALL_READ, *READ[kind]]
    ((*found,),) = ranks(1, imported, tmp_path, kind, cases, timeout_s=600)
    for options, (relative, tokens, apart, lost) in zip(cases, found, strict=True):
        assert relative < 1e-3, (options, relative)  # a wrong one is off by 0.1 and more
        assert apart == 0.0, (options, apart)
        window = options.get("sliding_window") or 0
        assert tokens > max(window, 95), options
        assert not lost, (options, lost)


def refusals(folder, kind, cases):
    from megascale.convert.huggingface.config import model_of, read_config
    from megascale.errors import UserError

    said = []
    for options in cases:
        stated = {"model_type": kind} | SHAPE | NEEDED.get(kind, {}) | options
        (folder / "config.json").write_text(json.dumps(stated))
        try:
            said.append(f"read as {model_of(read_config(folder), folder / 'config.json')}")
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("kind", REFUSED)
def test_options_that_our_model_cannot_be_are_refused(ranks, tmp_path, kind):
    cases = ALL_REFUSED + REFUSED[kind]
    ((*said,),) = ranks(1, refusals, tmp_path, kind, [options for options, _ in cases])
    for (options, wanted), text in zip(cases, said, strict=True):
        assert text.startswith(str(tmp_path)) and "\n" not in text, (options, text)
        assert re.search(wanted, text), (options, text)


def check_with(folder, changes, most_tokens=None):
    """The check of an import whose model folder says something else by now."""
    import torch

    from megascale.checkpoint.load import find_at
    from megascale.convert.compare_logits import compare_logits

    config = folder / "hf/config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | changes))
    try:
        difference = compare_logits(
            folder / "hf", find_at(folder / "ours"), torch.float32, most_tokens
        )
    finally:
        config.write_text(before)
    return difference.relative, difference.tokens, str(difference)


def checks(folder):
    """The import's own check, one with another window, with none, one that is too short, scaled."""
    write_model(folder / "hf", "mistral", {"sliding_window": 200, "max_position_embeddings": 512})
    status, said = command("import", folder / "hf", folder / "ours")
    assert status == 0 and "sequences of 250 tokens" in said, said
    changes = [{}, {"sliding_window": 180}, {"sliding_window": None}, {"sliding_window": 300}]
    scaled = LLAMA_3 | {"original_max_position_embeddings": 2048}
    changes += [{"rope_parameters": scaled, "rope_theta": 1e4}]
    found = [check_with(folder, change) for change in changes]
    return found, check_with(folder, {"sliding_window": None}, 150)


def test_the_check_reaches_beyond_windows_and_the_context_of_rope(ranks, tmp_path):
    ((found, short),) = ranks(1, checks, tmp_path, timeout_s=300)
    right, smaller, none, larger, scaled = found
    assert right[0] < 1e-4 and right[1] == 250 and "not checked" not in right[2]
    assert all(relative > 0.1 for relative, *_ in (smaller, none, larger))
    assert (smaller[1], none[1], larger[1], scaled[1]) == (250, 250, 375, 2560)
    assert scaled[0] > 0.1
    assert short[0] < 1e-4 and short[1] == 150  # a short check is blind, and says so
    assert "not checked beyond a sliding window of 200 tokens, --check-tokens 250 is" in short[2]


def bounds():
    from megascale.config import ModelConfig
    from megascale.convert.compare_logits import affordable_tokens

    large = ModelConfig(num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8)
    small = ModelConfig(num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=2)
    from dataclasses import replace

    from megascale.config import RunConfig
    from megascale.config.complete import complete

    def model(config, vocab):
        return complete(RunConfig(model=replace(config, vocab_size=vocab))).model

    return [
        affordable_tokens(model(large, 128_000), "cpu"),
        affordable_tokens(model(small, 128_000), "cpu"),
        affordable_tokens(model(large, 128_000), "cuda"),
    ]


def test_the_check_is_bounded_by_time_and_memory(ranks):
    ((large, small, on_cuda),) = ranks(1, bounds)
    assert 8192 * 1.25 < large < 32_768  # 7 billion parameters, beyond Llama 3's first context
    assert small == 16 * 2**30 // (4 * 128_000)  # the logits
    assert on_cuda == 5792  # 32 heads of scores in fp32
