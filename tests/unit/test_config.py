"""YAML and overrides to a run, and every way in which they can be wrong."""

import dataclasses
import json
import re
import typing

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config import RunConfig, dump_config, finalize, parse_config, validate
from megascale.config.layout import Layout
from megascale.config.load import whole_number
from megascale.errors import UserError

BASE = """
seed: 3
model: {num_layers: 2, hidden_size: 64, num_heads: 4}
data: {sources: {web: {path: corpora/web}}, context_tokens: 1Ki}
"""


def final(*overrides, text=BASE):
    return finalize(parse_config(text, overrides), {"web": 1000}, 257)


def test_a_resolved_config_rebuilds_the_same_run():
    config = final("train.tokens=20M", "model.moe.num_experts=4", "monitor.profile_steps=[2, 3]")
    again = parse_config(dump_config(config))
    assert again == config
    assert finalize(again, {"web": 1000}, 257) == config


def test_derived_values():
    config = final()
    assert config.data.context_tokens == 1024
    assert config.model.num_kv_heads == 4 and config.model.head_dim == 16
    assert config.model.ffn_hidden_size == 192
    assert config.model.vocab_size == 257
    assert config.planner.capacity_tokens == 1024
    assert [s.shape for s in config.optim.schedule] == ["linear", "cosine", "constant"]
    assert config.data.stages[0].blend == {"web": 1.0}


def test_defaults_go_with_the_optimizer():
    adamw, soap = final().optim, final("optim.name=soap").optim
    assert (adamw.beta1, adamw.schedule[0].lr) == (0.9, 3e-4)
    assert (soap.beta1, soap.schedule[0].lr) == (0.95, 3e-3)
    given = final("optim={name: soap, beta1: 0.8, lr: 1e-3}").optim
    assert (given.beta1, given.schedule[0].lr) == (0.8, 1e-3)


@pytest.mark.parametrize(
    "text, number",
    [
        ("7", 7),
        ("20M", 20_000_000),
        ("1.5K", 1500),
        ("8Ki", 8192),
        ("1_000", 1000),
        ("2T", 2 * 10**12),
    ],
)
def test_whole_numbers_with_suffixes(text, number):
    assert parse_config("", [f"train.tokens={text}"]).train.tokens == number


@pytest.mark.parametrize(
    "text, number", [("3e-4", 3e-4), ("1", 1.0), ("0.5", 0.5), ("1.5E-3", 1.5e-3)]
)
def test_numbers(text, number):
    assert parse_config("", [f"optim.lr={text}"]).optim.lr == number


def test_overrides():
    config = parse_config(
        BASE, ["model.moe.top_k=1", "eval.sample_prompt=def ", "parallel.sequence_parallel=false"]
    )
    assert config.model.moe.top_k == 1
    assert config.eval.sample_prompt == "def"
    assert config.parallel.sequence_parallel is False
    assert parse_config("model: {moe: {top_k: 1}}", ["model.moe="]).model.moe is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("sed: 1", "did you mean 'seed'"),
        ("model: {num_layer: 3}", "unknown key 'model.num_layer'; did you mean 'num_layers'"),
        ("model: 3", "model must be a mapping"),
        ("seed: x", "seed must be a whole number"),
        ("seed: 1.5", "seed must be a whole number"),
        ("seed: true", "seed must be a whole number"),
        ("optim: {lr: .nan}", "optim.lr = nan must be a finite number"),
        ("optim: {lr: fast}", "optim.lr must be a number"),
        ("data: {sources: {a: {}}}", "data.sources.a.path is missing"),
        ("data: {stages: 3}", "data.stages must be a list"),
        ("monitor: {profile_steps: [1]}", "list of 2 values"),
        ("train: {precision: fp8}", "one of fp32, bf16"),
        ("train: {tokens: 1.5.2M}", "whole number such as"),
        ("train: {tokens: 0.5}", "whole number"),
        ("seed: 1\nseed: 2", "given twice"),
        ("seed: [", "not valid YAML"),
        ("- 1", "a config is a YAML mapping"),
        ("data: {sources: {1: {path: x}}}", "must be text"),
    ],
)
def test_bad_input_is_one_clear_line(text, message):
    with pytest.raises(UserError) as caught:
        parse_config(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


NUMBER, TOKENS = "a number such as 3e-4", "a whole number such as 20M"


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.tokens=[1]", f"train.tokens must be {TOKENS}, not a list [1]"),
        ("train.tokens={a: 1}", f"train.tokens must be {TOKENS}, not a mapping"),
        ("optim.lr=[1]", f"optim.lr must be {NUMBER}, not a list [1]"),
        ("model.qk_norm=[true]", "model.qk_norm must be true or false, not a list"),
        ("run_dir=[a]", "run_dir must be text, not a list ['a']"),
        ("train.precision=[bf16]", "train.precision must be one of fp32, bf16"),
        ("optim.schedule=5", "optim.schedule must be a list, not a whole number"),
        ("trian.tokens=5", "unknown key 'trian'; did you mean 'train'?"),
        ("train.tokenz=5", "unknown key 'train.tokenz'; did you mean 'tokens'?"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_override(override, said):
    with pytest.raises(UserError) as caught:
        parse_config(BASE, ["seed=1", override], "run.yaml")
    assert str(caught.value).startswith(f"run.yaml: {said}")
    named = override.split(".")[0] if "trian" in override else override
    assert ("(override" in str(caught.value)) == (named == override)
    assert "seed" not in str(caught.value)


def floats(kind, prefix=""):
    """Dotted names of the options of a section that are numbers with a fraction."""
    for name, hint in typing.get_type_hints(kind).items():
        parts = typing.get_args(hint) or (hint,)
        for part in parts:
            if dataclasses.is_dataclass(part) and typing.get_origin(hint) not in (tuple, dict):
                yield from floats(part, f"{prefix}{name}.")
        if float in parts and typing.get_origin(hint) not in (tuple, dict):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("text", [".nan", "nan", ".inf", "-.inf", "inf", "1e999"])
def test_no_option_is_infinite_or_no_number(text):
    from megascale.corpus.recipe import parse_recipe

    names = list(floats(RunConfig))
    assert len(names) > 20 and {"optim.lr", "model.moe.balance_weight"} < set(names)
    for name in names:
        with pytest.raises(UserError) as caught:
            parse_config(BASE, ["growth.at_tokens=5", f"{name}={text}"])
        assert re.search(f"(?:{NUMBER}|finite number|beyond all numbers)", str(caught.value)), name
    for blend in ("{web: .nan}", "{web: .inf}"):
        with pytest.raises(UserError, match="blend.web = .* must be a finite number"):
            parse_config(BASE, [f"data.stages=[{{blend: {blend}}}]"])
    with pytest.raises(UserError, match="heldout_fraction .*must be a|beyond all numbers"):
        parse_recipe("{name: a, inputs: [{kind: python_stdlib}]}", [f"heldout_fraction={text}"])


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "\x7f", "a\u2028b", "a\x85", "", " ", "a\tb"])
def test_names_have_no_control_characters(name):
    from megascale.corpus.recipe import parse_recipe

    sources = json.dumps({"data": {"sources": {name: {"path": "x"}}}})
    stages = json.dumps({"data": {"stages": [{"blend": {name: 1.0}}]}})
    for text in (sources, stages):
        with pytest.raises(UserError, match="the name .* is empty or has control characters"):
            parse_config(text)
    with pytest.raises(UserError, match="run_dir = .* is empty or has control characters"):
        final(f"run_dir={json.dumps(name)}")
    with pytest.raises(UserError, match="must do as the name of a folder"):
        parse_recipe(json.dumps({"name": name, "inputs": [{"kind": "python_stdlib"}]}))


@pytest.mark.parametrize("name", ["web", "caf\u00e9 2", "replay/web", "a+b", "\u6587"])
def test_plain_names_are_taken(name):
    config = parse_config(json.dumps({"data": {"sources": {name: {"path": "x"}}}}))
    assert list(config.data.sources) == [name]


@pytest.mark.parametrize("override", ["seed", "=1", "seed.x=1", "model.moe.x=[", "data.sources=3"])
def test_bad_overrides(override):
    with pytest.raises(UserError) as caught:
        parse_config("seed: 1", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("parallel.tensor=3", "does not divide model.num_heads = 4; 2 would"),
        ("parallel.pipeline=4", "does not divide model.num_layers = 2; 2 would"),
        ("model.num_kv_heads=3", "does not divide model.num_heads"),
        ("parallel.expert=2", "needs model.moe"),
        ("model.head_dim=15", "must be even"),
        ("planner={name: longest_first, capacity_tokens: 8}", "set planner.capacity_tokens=1024"),
        ("planner.budget_s=-1", "planner.budget_s = -1.0 must be at least 0"),
        ("planner={name: flexsp, rank_speeds: measured}", "measured needs planner.name=hybrid"),
        ("planner.chunks=4", "planner.chunks = 4 needs parallel.pipeline=2 or more"),
        ("planner={name: static, chunks: 4}", "planner.chunks = 4 needs planner.name=hybrid"),
        ("planner.chunks=0", "planner.chunks = 0 must be at least 1"),
        ("planner.chunks=300", "planner.chunks = 300 must be at most 256"),
        ("data.sources={}", "data.sources is empty"),
        ("data.stages=[{blend: {wb: 1}}]", "data.sources has: web"),
        ("data.stages=[{blend: {web: -1}}]", "at least 0"),
        ("data.stages=[{blend: {web: 0}}]", "blend is empty"),
        ("data.stages=[{blend: {web: 1}}, {blend: {web: 1}}]", "only the last stage"),
        ("optim.schedule=[{shape: cosine, lr: 1}]", "needs tokens"),
        ("optim.schedule=[{shape: linear, tokens: 5, lr: 1}]", "covers 5 tokens"),
        ("optim.beta1=1", "below 1"),
        ("optim.soap_refresh_steps=0", "optim.soap_refresh_steps = 0 must be at least 1"),
        ("optim.soap_max_dim=-1", "optim.soap_max_dim = -1 must be"),
        ("optim.name=sgd", "optim.name must be one of adamw, soap"),
        ("train.tokens=0", "at least 1"),
        ("optim.weight_decay=-1", "at least 0"),
        ("parallel.sequence_parallel=true", "needs parallel.tensor > 1"),
        ("monitor.profile_steps=[3, 2]", "[first, last]"),
        ("model.rope_scaling.factor=0.5", "must be at least 1, such as 8 and 8192"),
        ("model.rope_scaling.low_turns=4", "low_turns = 4 must be below high_turns = 4"),
        ("model.rope_scaling={kind: yarn, low_turns: 0}", "low_turns = 0 has no place in yarn"),
        ("model.rope_scaling={kind: yarn, attention_factor: 0}", "must be above 0"),
        ("model.rope_scaling={kind: ntk}", "must be one of llama3, yarn, linear"),
        ("model.attention_pattern=[sliding]", "set model.sliding_window, such as 4096"),
        ("model.local_rope_base=10000", "set model.rope_base alone"),
        ("model={sliding_window: 8, attention_pattern: [full]}", "has no sliding layer"),
        ("model.attention_pattern=[linear]", "must be one of full, sliding, full_nope"),
        ("model.qk_norm_heads=all", "goes with model.qk_norm; set it to true"),
        ("model={norm_position: after, parallel_block: true}", "set it to before"),
        ("growth={at_tokens: 0}", "growth.at_tokens = 0 must be at least 1"),
        ("growth={at_tokens: 100, factor: 1}", "growth.factor = 1 must be at least 2"),
        ("growth={at_tokens: 100, operator: random}", "needs growth.mask_tokens, over which"),
        ("growth={at_tokens: 100, mask_tokens: 5}", "goes with growth.operator = random, not st"),
    ],
)
def test_impossible_combinations_name_what_works(override, message):
    with pytest.raises(UserError) as caught:
        final(override)
    assert message in str(caught.value)


def test_all_ranks_together_hold_the_longest_sequence():
    config = final("planner.capacity_tokens=256")
    assert Layout.of(config, 4).hdp == 4
    with pytest.raises(UserError, match="data.context_tokens = 1024 does not fit the 3 ranks"):
        Layout.of(config, 3)
    offload = final(
        "planner={capacity_tokens: 256, host_copy_bytes_per_s: 1e9}", "model.num_layers=8"
    )
    assert Layout.of(offload, 1).hdp == 1
    with pytest.raises(UserError, match="planner.capacity_tokens=512 or above"):
        Layout.of(config, 2)


def test_growth_begins_from_nothing():
    with pytest.raises(UserError, match="growth trains a small model from its beginning"):
        final("growth={at_tokens: 100}", "start.checkpoint=x")


def test_experts_must_divide():
    with pytest.raises(UserError, match="does not divide model.moe.num_experts = 8; 2 would"):
        final("model.moe.num_experts=8", "parallel.expert=3")
    with pytest.raises(UserError, match="top_k"):
        final("model.moe.num_experts=2", "model.moe.top_k=3")


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "balance_weight: -1",
            "model.moe.balance_weight = -1.0 must be a finite number, at least 0",
        ),
        ("balance_weight: .inf", "balance_weight = inf must be a finite number"),
        ("balance_weights: [0.1]", "has 1 values; give one for each of the 2 layers"),
        (
            "balance_weights: [0.1, -0.1]",
            "balance_weights[1] = -0.1 must be a finite number, at least 0",
        ),
        ("balance: even", "must be one of global, micro"),
        ("balance: micro, micro_share: 0.1", "goes with model.moe.balance=global, not micro"),
        ("balance: sequence, estimate: exact", "goes with model.moe.balance=global, not sequence"),
        ("bias_rate: 0.1", "bias_rate = 0.1 goes with model.moe.balance=loss_free, not global"),
        ("balance: loss_free, balance_weight: 0.1", "or none, not loss_free; leave it out, or at "),
        ("z_loss_coeff: -0.1", "model.moe.z_loss_coeff = -0.1 must be a finite number, at least 0"),
    ],
)
def test_balances_that_cannot_be(words, message):
    with pytest.raises(UserError) as caught:
        final(f"model.moe={{num_experts: 4, {words}}}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "words, message",
    [
        ("num_experts: 0", "model.moe.num_experts = 0 must be at least 1"),
        ("num_experts: 4, top_k: 0", "model.moe.top_k = 0 must be from 1 to"),
        ("ffn_hidden_size: 0", "model.moe.ffn_hidden_size = 0 must be at least 1"),
        ("shared_ffn_hidden_size: -1", "= -1 must be a finite number, at least 0"),
    ],
)
def test_experts_that_cannot_be(words, message):
    with pytest.raises(UserError) as caught:
        final(f"model.moe={{{words}}}")
    assert message in str(caught.value)


def test_layers_may_have_balance_weights_of_their_own():
    moe = final("model.moe={num_experts: 4, balance_weights: [0.1, 0.2]}").model.moe
    assert [moe.layer_weight(layer) for layer in (1, 2)] == [0.1, 0.2]
    moe = final("model.moe={num_experts: 4, balance_weight: 0.3}").model.moe
    assert [moe.layer_weight(layer) for layer in (1, 2)] == [0.3, 0.3]


def test_a_schedule_and_a_peak_are_one_too_many():
    with pytest.raises(UserError, match="both set"):
        final("optim.lr=1e-3", "optim.schedule=[{lr: 1.0}]")


@pytest.mark.parametrize(
    "optim, message",
    [
        ("curve: infinit", "optim.curve must be one of cosine, infinite, wsd, constant, anneal"),
        ("curve: wsd, schedule: [{lr: 1}]", "optim.curve and optim.schedule are both set"),
        ("anneal_tokens: 5, schedule: [{lr: 1}]", "optim.anneal_tokens and optim.schedule"),
        ("constant_lr: 1e-4", "has no meaning for optim.curve=cosine; leave it out"),
        ("cooldown_tokens: 5", "(optim.cooldown_tokens= clears it), or set optim.curve to one of: "
         "infinite"),
        ("curve: constant, min_lr: 1e-5", "to one of: cosine, infinite, wsd, anneal"),
        ("curve: anneal, lr: 1e-4, warmup_tokens: 5", "optim.warmup_tokens has no meaning"),
        ("curve: anneal", "optim.curve=anneal needs optim.lr"),
        ("lr: -1", "optim.lr = -1.0 must be a finite number"),
        ("lr: .inf", "optim.lr = inf must be a finite number"),
        ("warmup_tokens: -1", "optim.warmup_tokens = -1 must be at least 0"),
        ("min_lr: 1e-3", "optim.min_lr = 0.001 is above optim.lr = 0.0003; 3e-05 works"),
        ("curve: infinite, constant_lr: 1", "must lie between optim.min_lr = 3e-05 and optim.lr = "
         "0.0003; 0.000165 works"),
        ("curve: infinite, min_lr: 0", "set optim.anneal_shape=linear"),
        ("curve: wsd, anneal_tokens: 9999999", "set optim.anneal_tokens=9900000, or lengthen"),
        ("lr: steplaw", "optim.lr or data.global_batch_tokens is steplaw where a number is needed"),
        ("schedule: [{shape: exponential, tokens: 20M, lr: 1}]", "cannot go from 0 to lr = 1"),
        ("schedule: [{lr: 1, tokens: 9}, {shape: exponential, tokens: 20M}]", "optim.schedule[1]: "
         "an exponential segment cannot go from 1 to lr = 0"),
        ("schedule: [{shape: inverse_sqrt, tokens: 20M, lr: 1, timescale: 0}]", "from 0.001 to"),
        ("schedule: [{shape: linear, tokens: 20M, lr: 1, timescale: 5}]", "goes with shape: inv"),
    ],
)  # fmt: skip
def test_curves_that_cannot_be(optim, message):
    with pytest.raises(UserError) as caught:
        final(f"optim={{{optim}}}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_an_error_says_would_work_does():
    for words in (
        ["optim={min_lr: 3e-5}"],
        ["optim={curve: infinite, constant_lr: 0.000165}"],
        ["optim={curve: infinite, min_lr: 0, anneal_shape: linear}"],
        ["optim={curve: wsd, anneal_tokens: 9900000}"],
        ["optim={curve: anneal, lr: 1e-4, warmup_tokens: 5}", "optim.warmup_tokens="],
    ):
        assert final(*words).optim.schedule


def test_a_word_stands_for_a_number_where_one_is_allowed():
    config = parse_config(BASE, ["optim.lr=steplaw", "data.global_batch_tokens=steplaw"])
    assert (config.optim.lr, config.data.global_batch_tokens) == ("steplaw", "steplaw")
    assert parse_config(dump_config(config)) == config
    assert parse_config(BASE, ["data.global_batch_tokens=8Ki"]).data.global_batch_tokens == 8192
    with pytest.raises(UserError, match="optim.min_lr must be a number"):
        parse_config(BASE, ["optim.min_lr=steplaw"])


def test_layouts():
    config = final("parallel.tensor=2", "parallel.pipeline=2")
    layout = Layout.of(config, 12)
    assert (layout.hdp, layout.mode) == (3, "aligned")
    with pytest.raises(UserError, match="start 4 ranks"):
        Layout.of(config, 6)
    moe = final("model.moe.num_experts=4", "parallel.expert=2")
    assert Layout.of(moe, 4).mode == "lockstep"
    with pytest.raises(UserError, match="must divide the HDP axis of 3"):
        Layout.of(moe, 3)
    assert Layout.of(final(), 5).mode == "free"


def test_every_default_is_valid_but_the_sources():
    with pytest.raises(UserError, match="data.sources is empty"):
        validate(finalize(RunConfig(), {}, 257))


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [f.name for f in dataclasses.fields(RunConfig)] + ["moe", "lr", "path", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(TREES)
def test_any_tree_is_a_config_or_a_user_error(tree):
    accepts_or_explains(yaml.safe_dump(tree))


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_any_text_is_a_config_or_a_user_error(text):
    accepts_or_explains(text)


@settings(max_examples=200)
@given(st.text(max_size=30))
def test_any_override_is_taken_or_explained(text):
    try:
        parse_config(BASE, [text])
    except UserError as error:
        assert "\n" not in str(error)


def accepts_or_explains(text):
    try:
        config = parse_config(text)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert parse_config(dump_config(config)) == config
    try:
        finalize(config, {"web": 10}, 257)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text, number",
    [
        ("1e9", 10**9),
        ("2.5e3", 2500),
        ("1E+6", 10**6),
        ("1e9 ", 10**9),
        ("3.0", 3),
        ("'1E3'", 1000),
    ],
)
def test_a_whole_number_may_be_written_with_an_exponent(text, number):
    """On the command line, in YAML, and in options of verbs."""
    assert parse_config("", [f"train.tokens={text}"]).train.tokens == number
    config = parse_config(f"train: {{tokens: {text}}}\ndata: {{context_tokens: {text}}}")
    assert config.train.tokens == config.data.context_tokens == number
    assert type(config.train.tokens) is int
    if "." not in text or "e" in text:
        assert whole_number(text.strip("'"), "--ranks") == number


@pytest.mark.parametrize("text", ["1.5", "1.5e0", "1e-3", ".inf", "-.inf", ".nan", "1e40"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(UserError, match="train.tokens must be a whole number"):
        parse_config("", [f"train.tokens={text}"])


def cut(heads, kv_heads, layers, *overrides):
    model = f"model: {{num_heads: {heads}, num_kv_heads: {kv_heads}, num_layers: {layers}, "
    model += f"hidden_size: {heads * 8}, ffn_hidden_size: 240, vocab_size: 100}}\n"
    text = model + "data: {sources: {web: {path: none}}, context_tokens: 8}\ntrain: {tokens: 1000}"
    return finalize(parse_config(text, overrides), {"web": 1000}, 100)


@pytest.mark.parametrize(
    "option, value, works",
    [("tensor", 8, 6), ("tensor", 4, 3), ("tensor", 5, 6), ("tensor", 48, 6), ("pipeline", 7, 8)],
)
def test_the_nearest_size_that_works_is_suggested(option, value, works):
    """Tensor parallelism cuts 12 heads, 6 of keys and values, and 240 units: 1, 2, 3 or 6."""
    with pytest.raises(UserError, match=f"parallel.{option} = {value} does not divide") as error:
        cut(12, 6, 8, f"parallel.{option}={value}")
    assert f"; {works} would work" in str(error.value)
    cut(12, 6, 8, f"parallel.{option}={works}")


@pytest.mark.parametrize(
    "ranks, sizes, suggestion",
    [(6, (4, 1), "parallel.tensor=3"), (2, (4, 1), "parallel.tensor=2"), (5, (4, 1), "tensor=1"),
     (4, (4, 8), "parallel.tensor=1 parallel.pipeline=4"), (8, (1, 3), "parallel.pipeline=2")],
)  # fmt: skip
def test_a_layout_that_fits_the_ranks_is_suggested(ranks, sizes, suggestion):
    words = [f"parallel.tensor={sizes[0]}", f"parallel.pipeline={sizes[1]}"]
    config = parse_config("model: {num_heads: 12, num_layers: 8}", words)
    with pytest.raises(UserError, match=f"must divide the {ranks} ranks") as error:
        Layout.of(config, ranks)
    assert str(error.value).endswith(suggestion)
    words += str(error.value).split("or set ")[1].split()
    Layout.of(parse_config("model: {num_heads: 12, num_layers: 8}", words), ranks)


@pytest.mark.parametrize(
    "curve, name", [("infinite", "cooldown"), ("wsd", "anneal"), ("wsd", "warmup")]
)
def test_a_part_that_is_longer_than_the_run_is_named(curve, name):
    words = [f"optim.curve={curve}", f"optim.{name}_tokens=5000"]
    with pytest.raises(UserError, match=f"optim.{name}_tokens = 5000 is above train.tokens = 1000"):
        cut(4, 4, 2, *words)
