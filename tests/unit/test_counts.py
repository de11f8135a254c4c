"""Counts of parameters, operations and bytes against brute force and against megatron-core."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.config import (
    DataConfig,
    Layout,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    finalize,
)
from megascale.model.counts import (
    batch_flops,
    count_parameters,
    count_rank_parameters,
    default_cost,
    flops_per_token,
    padded_vocab_size,
    visible_pairs,
)
from megascale.optim.rank_memory import memory_per_rank

DENSE = ModelConfig(num_layers=2, hidden_size=8, num_heads=4, ffn_hidden_size=12, vocab_multiple=8)
MOE = replace(DENSE, moe=MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=6))
MODELS = {
    "dense": DENSE,
    "grouped": replace(DENSE, num_kv_heads=2, head_dim=6, qk_norm=True),
    "untied": replace(DENSE, tied_embeddings=False, sliding_window=3),
    "pattern": replace(DENSE, sliding_window=3, attention_pattern=("sliding", "full_nope")),
    "biased": replace(DENSE, num_kv_heads=2, qkv_bias=True),
    "parallel": replace(DENSE, parallel_block=True),
    "norms": replace(
        DENSE, num_kv_heads=2, qk_norm=True, qk_norm_heads="all", norm_position="after"
    ),
    "moe": MOE,
    "shared": replace(MOE, moe=replace(MOE.moe, shared_ffn_hidden_size=10)),
    "gated": replace(MOE, moe=replace(MOE.moe, shared_ffn_hidden_size=10, shared_gate=True)),
    "attentions": replace(MOE, qk_norm=True, moe=replace(MOE.moe, attention_experts=3)),
}
EVERY_MODEL = pytest.mark.parametrize("name", list(MODELS))


def run_config(model: ModelConfig, **parts: object) -> RunConfig:
    data = DataConfig(sources={"web": SourceConfig(path="web")}, context_tokens=64)
    config = RunConfig(model=model, data=data, **parts)
    return finalize(config, {"web": 1000}, vocab_size=11)


def final(name: str) -> ModelConfig:
    return run_config(MODELS[name]).model


def attentions(model: ModelConfig) -> int:
    return model.moe.attention_experts if model.moe else 1


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, written down from the layers of a LLaMA-like model."""
    hidden, head, moe = model.hidden_size, model.head_dim, model.moe
    found = {"embedding": (padded_vocab_size(model), hidden), "final_norm": (hidden,)}
    if not model.tied_embeddings:
        found["head"] = (padded_vocab_size(model), hidden)
    for layer in range(model.num_layers):
        own = {"norm": (hidden,)} | ({} if model.parallel_block else {"mlp_norm": (hidden,)})
        for one in range(attentions(model)):
            own[f"{one}.out"] = (hidden, model.num_heads * head)
            own[f"{one}.qkv"] = ((model.num_heads + 2 * model.num_kv_heads) * head, hidden)
            if model.qkv_bias:
                own[f"{one}.qkv_bias"] = own[f"{one}.qkv"][:1]
            if model.qk_norm:
                q_heads, k_heads = model.num_heads, model.num_kv_heads
                if model.qk_norm_heads == "each":
                    q_heads = k_heads = 1
                own |= {f"{one}.q_norm": (q_heads * head,), f"{one}.k_norm": (k_heads * head,)}
        if attentions(model) > 1:
            own["attention_router"] = (attentions(model), hidden)
        feeds = {"mlp": model.ffn_hidden_size}
        if moe:
            own["router"] = (moe.num_experts, hidden)
            feeds = {f"expert{i}": moe.ffn_hidden_size for i in range(moe.num_experts)}
            feeds |= {"shared": moe.shared_ffn_hidden_size}
            own |= {"gate": (1, hidden)} if moe.shared_gate else {}
        for feed, size in feeds.items():
            own |= {f"{feed}.fc1": (2 * size, hidden), f"{feed}.fc2": (hidden, size)}
        found |= {f"{layer}.{key}": shape for key, shape in own.items()}
    return found


def multiply_adds(model: ModelConfig, lengths: list[int]) -> int:
    """Run every product of a forward pass as loops over single multiply-adds, and count them."""
    count = 0

    def product(num_out: int, num_in: int) -> None:
        nonlocal count
        for _ in itertools.product(range(num_out), range(num_in)):
            count += 1

    matrices = {key: shape for key, shape in shapes(model).items() if len(shape) == 2}
    head = "embedding" if model.tied_embeddings else "head"
    matrices[head] = (model.vocab_size, model.hidden_size)  # no logits of padded rows
    experts = [f".expert{i}." for i in range(model.moe.top_k, model.moe.num_experts)] \
        if model.moe else []  # fmt: skip
    for length in lengths:
        for query in range(length):
            for key, (rows, columns) in matrices.items():
                if key != "embedding" and not any(expert in key for expert in experts):
                    product(rows, columns)
            if model.tied_embeddings:
                product(*matrices["embedding"])
            for seen, layer in itertools.product(range(query + 1), range(model.num_layers)):
                window = model.sliding_window
                if model.attention_pattern:
                    kind = model.attention_pattern[layer % len(model.attention_pattern)]
                    window = window if kind.startswith("sliding") else None
                if window is None or query - seen < window:
                    for _head in range(attentions(model) * model.num_heads):
                        product(1, model.head_dim)  # score of query and key
                        product(model.head_dim, 1)  # value times probability
    return count


@EVERY_MODEL
def test_parameters_are_the_sum_of_all_shapes(name: str) -> None:
    model = final(name)
    sizes = {key: math.prod(shape) for key, shape in shapes(model).items()}
    counts = count_parameters(model)
    assert counts.total == sum(sizes.values())
    assert counts.embedding == sizes["embedding"] + sizes.get("head", 0)
    idle = [".expert2.", ".expert3."] if model.moe else []
    used = {k: size for k, size in sizes.items() if not any(one in k for one in idle)}
    assert counts.active == sum(used.values())
    assert counts.non_embedding == counts.total - counts.embedding


@EVERY_MODEL
def test_operations_are_the_brute_force_count(name: str) -> None:
    model, lengths = final(name), [3, 1, 5]
    assert batch_flops(model, lengths) == 3 * 2 * multiply_adds(model, lengths)


def test_tensor_ranks_compute_logits_of_padded_rows_too() -> None:
    model = final("dense")
    assert (model.vocab_size, padded_vocab_size(model, 3)) == (11, 24)
    added = flops_per_token(model, 3) - flops_per_token(model)
    assert added == 2 * (24 - 11) * model.hidden_size


@given(st.lists(st.integers(1, 40), max_size=5), st.none() | st.integers(1, 50))
def test_visible_pairs_are_the_brute_force_count(lengths: list[int], window: int | None) -> None:
    pairs = sum(
        key <= query and (window is None or query - key < window)
        for length in lengths
        for query in range(length)
        for key in range(length)
    )
    assert visible_pairs(lengths, window) == pairs


def test_visible_pairs_of_a_giant_do_not_overflow() -> None:
    assert visible_pairs([4_000_000] * 1000) == 1000 * 4_000_000 * 4_000_001 // 2


@pytest.mark.parametrize(
    ("vocab", "multiple", "tensor", "rows"),
    [(257, 128, 1, 384), (257, 128, 4, 384), (256, 128, 2, 256), (257, 128, 3, 384), (5, 1, 2, 6)],
)
def test_padded_vocabulary(vocab: int, multiple: int, tensor: int, rows: int) -> None:
    model = ModelConfig(vocab_size=vocab, vocab_multiple=multiple)
    assert padded_vocab_size(model, tensor) == rows


@EVERY_MODEL
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_ranks_hold_everything_once_and_copies_of_what_is_not_cut(
    name: str, tensor: int, pipeline: int
) -> None:
    model, expert = final(name), 2 if MODELS[name].moe else 1
    layout = Layout(tensor * pipeline * expert, tensor, pipeline, expert, expert)
    ranks = [count_rank_parameters(model, layout, stage) for stage in range(pipeline)]
    held = sum(one.dense * tensor + one.expert * tensor * expert for one in ranks)
    vectors = {
        key: math.prod(s)
        for key, s in shapes(model).items()
        if (len(s) == 1 and "bias" not in key) or "rout" in key or "gate" in key
    }
    if model.qk_norm_heads == "all":
        vectors = {key: size for key, size in vectors.items() if "q_norm" not in key}
        vectors = {key: size for key, size in vectors.items() if "k_norm" not in key}
    copies = (tensor - 1) * sum(vectors.values())
    if model.tied_embeddings and pipeline > 1:
        copies += padded_vocab_size(model) * model.hidden_size
    assert held == count_parameters(model).total + copies


def test_memory_of_weights_gradients_and_optimizer() -> None:
    layout = Layout(world=4, tensor=1, pipeline=1, expert=1, hdp=4)
    bf16 = run_config(DENSE)
    size = count_parameters(bf16.model).total
    found = memory_per_rank(bf16, layout)
    assert (found.weights, found.gradients, found.optimizer) == (2 * size, 4 * size, 3 * size)
    fp32 = memory_per_rank(replace(bf16, train=TrainConfig(precision="fp32")), layout)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * size, 4 * size, 2 * size)
    whole = replace(bf16, optim=replace(bf16.optim, distributed_optimizer=False))
    assert memory_per_rank(whole, layout).optimizer == 12 * size
    assert found.total == 9 * size + found.activations + found.rings


def test_experts_share_their_optimizer_state_with_fewer_ranks() -> None:
    config = run_config(MOE, parallel=ParallelConfig(expert=2), optim=OptimConfig())
    layout = Layout(world=4, tensor=1, pipeline=1, expert=2, hdp=4)
    held = count_rank_parameters(config.model, layout, 0)
    expected = 12 * (-(-held.dense // 4) + -(-held.expert // 2))
    assert memory_per_rank(config, layout).optimizer == expected


@given(st.integers(1, 3000))
def test_default_cost_is_proportional_to_the_operations(length: int) -> None:
    model = final("dense")
    unit = default_cost(model).compute_s([1000]).sum() / batch_flops(model, [1000])
    assert default_cost(model).compute_s([length]).sum() == pytest.approx(
        unit * batch_flops(model, [length]), rel=1e-9
    )


def test_default_cost_of_a_window_is_linear_and_exact_far_beyond_it() -> None:
    model = final("untied")
    one, two = default_cost(model).compute_s([10**6, 2 * 10**6])
    assert two == pytest.approx(2 * one)
    assert two / one == pytest.approx(
        batch_flops(model, [2 * 10**6]) / batch_flops(model, [10**6]), rel=1e-5
    )


def test_known_model_has_its_known_size() -> None:
    """LLaMA-7B: 6,738,415,616 parameters; six operations per parameter and token, about."""
    llama = ModelConfig(
        num_layers=32, hidden_size=4096, num_heads=32, ffn_hidden_size=11008, vocab_size=32000,
        tied_embeddings=False,
    )  # fmt: skip
    model = run_config(llama).model
    assert count_parameters(model).total == 6_738_415_616
    assert 3 * flops_per_token(model) == pytest.approx(6 * 6_738_415_616, rel=0.03)


BUILD = """
import json, sys
import megascale.config as schema
from megascale.model.build import build_model
from megascale.runtime.distributed import start, stop

sizes, ranks = {}, None
for name, text in json.load(sys.stdin).items():
    config = schema.parse_config(text)
    ranks = ranks or start(config)
    sizes[name] = sum(weight.numel() for weight in build_model(config, ranks).parameters())
stop()
print(json.dumps(sizes))
"""


def test_megatron_core_builds_as_many_parameters() -> None:
    """The real models, built in a process of their own because start-up is per process."""
    from megascale.config import dump_config

    configs = {name: run_config(model) for name, model in MODELS.items()}
    texts = json.dumps({name: dump_config(config) for name, config in configs.items()})
    done = subprocess.run(
        [sys.executable, "-c", BUILD], input=texts, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {name: count_parameters(config.model).total for name, config in configs.items()}
    assert json.loads(done.stdout.splitlines()[-1]) == expected
