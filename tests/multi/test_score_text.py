"""Scores of text against lm-eval's own backend for `transformers` models, on the same weights."""

import json
import shutil

import numpy as np
import pytest
from test_huggingface_models import make, write_tasks
from test_train import command

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # which that backend needs

CONTEXT = 32
LENGTHS = [0, 1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 101, 128, 300]
"""Around every multiple of the context."""


def make_both(folder):
    """A random model with a tokenizer of bytes in `hf`, and its import in `ours`."""
    from megascale.convert.huggingface.tokenizer_folder import write_tokenizer

    lines = [json.dumps({"text": f"Some text, line {i}."}) for i in range(20)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(
        f"name: x\nlicence: none\ninputs: [{{kind: jsonl, paths: [{folder}/texts.jsonl]}}]\n"
        "tokenizer: {kind: bytes}\n"
    )
    assert command("prepare", folder / "recipe.yaml", "--out", folder / "corpus")[0] == 0
    make(folder / "hf", "llama", vocab_size=257, max_position_embeddings=CONTEXT)
    write_tokenizer(folder / "corpus", folder / "hf", CONTEXT)
    assert command("import", folder / "hf", folder / "ours", "--no-check")[0] == 0


@pytest.fixture(scope="module")
def folder(rank_pools, tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    rank_pools.run(1, make_both, made, timeout_s=300)
    return made


def ask(folder, kind, arguments, batch_size=1, add_bos_token=None, context=CONTEXT):
    """What our model and lm-eval's, with its options, answer to requests of one `kind`."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from megascale.checkpoint.load import find_at
    from megascale.convert.lm_eval_model import lm_eval_model
    from megascale.convert.one_rank import open_model, run_config
    from megascale.convert.score_text import TextScorer
    from megascale.run.checkpoint_tokenizer import text_tokens

    requests = [Instance(kind, {}, words, i) for i, words in enumerate(arguments)]
    found = find_at(folder / "ours")
    tokens = text_tokens(found, run_config(found), None)
    with open_model(found, "fp32") as model:
        ours = getattr(lm_eval_model(TextScorer(model, tokens)), kind)(requests)
    options = {"device": "cpu", "batch_size": batch_size, "add_bos_token": add_bos_token}
    judge = HFLM(str(folder / "hf"), **options)
    assert judge.max_length == context
    return ours, getattr(judge, kind)(requests)


def letters(count, seed=0):
    return "".join(chr(i) for i in np.random.default_rng(seed).integers(97, 123, count))


def test_documents_of_any_length(ranks, folder):
    """`add_bos_token=False`: the exported tokenizer would begin texts twice."""
    texts = [(letters(count, count),) for count in LENGTHS]
    ((ours, theirs),) = ranks(1, ask, folder, "loglikelihood_rolling", texts, 3, False)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[0] == 0 and all(score < 0 for score in ours[1:])
    ((_, begun_twice),) = ranks(1, ask, folder, "loglikelihood_rolling", texts[1:])
    assert all(abs(was - now) > 0.01 for was, now in zip(theirs[1:], begun_twice))


def test_choices_after_any_context(ranks, folder):
    """With lm-eval's defaults; some contexts lose their beginning, or their last spaces."""
    contexts = ["", "short", *(letters(n, n) for n in LENGTHS[1:])]
    choices = [" odd.", "e", letters(CONTEXT - 1, 1), letters(CONTEXT, 2)]
    pairs = [(context, choice) for choice in choices for context in contexts]
    pairs += [(context, choice) for choice in choices[:2] for context in (" ", "at the end  ")]
    ((ours, theirs),) = ranks(1, ask, folder, "loglikelihood", pairs, 5)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    ((again, _),) = ranks(1, ask, folder, "loglikelihood", pairs[::-1])
    assert [one[0] for one in again[::-1]] == pytest.approx([one[0] for one in ours], rel=1e-5)


def test_text_goes_on_after_any_prompt(ranks, folder):
    options = {"until": ["q"], "max_gen_toks": 6}
    prompts = [letters(n, n) for n in (1, 5, CONTEXT - 7, CONTEXT - 6, CONTEXT, 3 * CONTEXT)]
    ((ours, theirs),) = ranks(
        1, ask, folder, "generate_until", [(prompt, options) for prompt in prompts]
    )
    assert ours == theirs and all(ours)
    options = {"until": [], "max_new_tokens": 4, "do_sample": False, "temperature": 0.7}
    ((ours, theirs),) = ranks(1, ask, folder, "generate_until", [(prompts[1], options)])
    assert ours == theirs


def test_what_is_likeliest(ranks, folder):
    letters_and_signs = [chr(i) for i in range(32, 127)]
    pairs = [(letters(n, n), one) for n in range(1, 13) for one in letters_and_signs]
    ((ours, theirs),) = ranks(1, ask, folder, "loglikelihood", pairs, 64)
    greedy = [greedy for _, greedy in ours]
    assert greedy == [greedy for _, greedy in theirs] and any(greedy) and not all(greedy)


def judge_windows(folder, context, choice):
    """lm-eval's windows of a choice after the end of a context; it takes none that is so long."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    judge = HFLM(str(folder / "hf"), device="cpu", batch_size=1)
    windows = get_rolling_token_windows([*choice.encode()], context.encode()[-1], CONTEXT, 1)
    requests = [(None, *make_disjoint_window(window)) for window in windows]
    return sum(score for score, _ in judge._loglikelihood_tokens(requests))


def ask_us(folder, pairs):
    from megascale.checkpoint.load import find_at
    from megascale.convert.one_rank import open_model, run_config
    from megascale.convert.score_text import TextScorer
    from megascale.run.checkpoint_tokenizer import text_tokens

    found = find_at(folder / "ours")
    tokens = text_tokens(found, run_config(found), None)
    with open_model(found, "fp32") as model:
        scorer = TextScorer(model, tokens)
        return scorer.continuations(pairs), scorer.whole(pairs[0][1])


def test_a_choice_longer_than_the_context_is_scored_whole(ranks, folder):
    choice, context = letters(2 * CONTEXT + 5, 3), "some words"
    ((scored, whole),) = ranks(1, ask_us, folder, [("", choice), (context, choice), ("a", "")])
    assert scored[0].log_likelihood == pytest.approx(whole, rel=1e-6)
    (expected,) = ranks(1, judge_windows, folder, context, choice)
    assert scored[1].log_likelihood == pytest.approx(expected, rel=1e-4)
    assert (scored[2].log_likelihood, scored[2].is_greedy) == (0.0, True)


ENDS = [2, 5]
SETTINGS = {"eos_token_id": ENDS, "bos_token_id": 1, "pad_token_id": 3, "temperature": 0.6}


def make_ending(folder):
    """A model with two ids that end a text, both likely; its tokenizer names the second."""
    from safetensors.torch import load_file, save_file
    from test_huggingface_export import write_original

    # the cache of `transformers` applies a window that its Llama ignores
    options = {"tie_word_embeddings": False, "sliding_window": None}
    write_original(folder / "hf", eos_token_id=ENDS, **options)
    (folder / "hf/generation_config.json").write_text(json.dumps(SETTINGS))
    path = folder / "hf/model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][ENDS] *= 2.5
    save_file(weights, path, {"format": "pt"})
    assert command("import", folder / "hf", folder / "ours", "--no-check")[0] == 0


def end_ids(folder, tokenizer=None):
    from megascale.checkpoint.load import find_at
    from megascale.convert.one_rank import run_config
    from megascale.run.checkpoint_tokenizer import text_tokens

    found = find_at(folder)
    return text_tokens(found, run_config(found), tokenizer).end_ids


@pytest.fixture(scope="module")
def ending(rank_pools, tmp_path_factory):
    made = tmp_path_factory.mktemp("ending")
    rank_pools.run(1, make_ending, made, timeout_s=300)
    return made


def greedy_ends(folder, prompts, most):
    """The id that `transformers` stops at for each prompt; None: it does not stop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    last = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, temperature=None, max_new_tokens=most)
        last.append(int(out[0, -1]) if int(out[0, -1]) in ENDS else None)
    return last


def test_text_ends_at_every_id_that_an_import_has_kept(ranks, ending):
    prompts = [letters(n, n) for n in range(1, 20)]
    stopped = ranks(1, greedy_ends, ending, prompts, 12)[0]
    assert set(stopped) >= {*ENDS}  # each of them ends some text
    options = {"until": ["no such text"], "max_gen_toks": 12}
    words = [(prompt, options) for prompt in prompts]
    ((ours, theirs),) = ranks(1, ask, ending, "generate_until", words, 1, None, 128)
    assert ours == theirs and len(set(map(len, ours))) > 3


def test_ids_that_end_a_text(ending, folder, tmp_path):
    """Lists of config.json and of generation_config.json, and the end of documents."""
    assert end_ids(folder / "ours") == {2, 256}  # 2 is the default of a Llama's config
    shutil.copytree(ending / "ours", tmp_path / "ours")
    kept = tmp_path / "ours/imported"
    for name, ends in (("config.json", [2, 7, 900]), ("generation_config.json", 9)):
        document = json.loads((kept / name).read_text())
        (kept / name).write_text(json.dumps(document | {"eos_token_id": ends}))
    assert end_ids(tmp_path / "ours") == {2, 5, 7, 9}
    assert end_ids(tmp_path / "ours", str(ending / "hf")) == {2, 5, 7, 9}
    # with another tokenizer the ids of the import mean nothing
    assert end_ids(tmp_path / "ours", str(folder / "corpus")) == {256}


@pytest.mark.parametrize("task, is_named", [("odd_generate", True), ("odd_choice", False)])
def test_settings_without_effect_are_named(ranks, ending, tmp_path, task, is_named):
    write_tasks(tmp_path / "tasks", ["a"] * 4)
    words = ("eval", ending / "ours", "--tasks", task, "--include", tmp_path / "tasks")
    status, said = ranks(1, command, *words, timeout_s=300)[0]
    assert status == 0, said
    note = "these settings have no effect here: temperature = 0.6\n"
    assert said.endswith(note) == is_named and ("no effect" in said) == is_named
