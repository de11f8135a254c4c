"""A model that was pretrained with a beginning-of-text token is continued with it."""

import json

import pytest
import tokenizer_files as made
import yaml
from test_train import command

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 128,
}  # fmt: skip
VOCAB = 384  # a multiple of 128: no padded rows
TEXTS = [f"the {i} cats sat on {i * 7} mats; the dog did not" for i in range(60)]


def make_llama(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)
    made.save(made.byte_bpe(), folder, bos_token=made.BEGIN)


def their_loss(model_folder, corpus, first_id):
    """Mean loss of `transformers` over the held-out documents, each after `first_id`."""
    import torch
    from transformers import AutoModelForCausalLM

    from megascale.corpus.shards import Shard

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    shard, total = Shard.open(corpus / "heldout"), 0.0
    for i in range(shard.num_documents):
        ids = torch.tensor([[first_id, *shard.read(i).tolist()]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    return total / shard.num_tokens


def eval_tokens(folder):
    """What `megascale eval` puts before a text: by the run's corpus, and by --tokenizer."""
    from megascale.checkpoint.load import find_at
    from megascale.convert.one_rank import run_config
    from megascale.run.checkpoint_tokenizer import text_tokens

    found = find_at(folder / "run")
    config = run_config(found)
    chosen = (None, str(folder / "ours" / "tokenizer"))
    return [text_tokens(found, config, one).first_id for one in chosen]


@pytest.fixture(scope="module")
def branch(rank_pools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bos")
    rank_pools.run(1, make_llama, folder / "hf")
    ((status, said),) = rank_pools.run(1, command, "import", folder / "hf", folder / "ours")
    assert status == 0, said
    tokenizer = folder / "ours" / "tokenizer"
    for name, bos in (("corpus", "auto"), ("without", "none")):
        prepared = made.prepare_texts(folder / name, TEXTS, tokenizer, heldout=0.2, bos=bos)
        config = {
            "data": {
                "sources": {"cats": {"path": str(prepared.folder)}},
                "context_tokens": 128,
                "global_batch_tokens": 256,
            },
            "optim": {"lr": 1e-4},
            "train": {"tokens": 512, "precision": "fp32", "threads": 1},
            "eval": {"every_steps": 1, "tokens": 100000, "sample_prompt": "the cat"},
            "monitor": {"tensorboard": False},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def begin(rank_pools, branch, name, run, world=1):
    words = ("branch", branch / "ours", branch / f"{name}.yaml", f"run_dir={branch / run}")
    answers = rank_pools.run(world, command, *words)
    assert [status for status, _ in answers] == [0] * world, answers
    rows = map(json.loads, (branch / run / "metrics.jsonl").read_text().splitlines())
    return answers[0][1], next(row["eval"]["cats"] for row in rows if "eval" in row)


def test_losses_are_those_of_transformers_after_bos(rank_pools, branch):
    _, score = begin(rank_pools, branch, "corpus", "run")
    corpus = branch / "corpus" / "corpus"
    facts = json.loads((corpus / "corpus.json").read_text())
    bos_id, eod_id = facts["tokenizer"]["bos_id"], facts["tokenizer"]["eod_id"]
    right = their_loss(branch / "hf", corpus, bos_id)
    assert score["loss"] == pytest.approx(right, rel=1e-5)
    assert abs(their_loss(branch / "hf", corpus, eod_id) - right) > 1e-3 * right
    assert rank_pools.run(1, eval_tokens, branch) == [[bos_id, bos_id]]


def test_a_corpus_without_it_is_warned_of(rank_pools, branch):
    said, score = begin(rank_pools, branch, "without", "other")
    facts = json.loads((branch / "without" / "corpus" / "corpus.json").read_text())
    right = their_loss(branch / "hf", branch / "without/corpus", facts["tokenizer"]["eod_id"])
    assert score["loss"] == pytest.approx(right, rel=1e-5)
    assert "trained with another tokenizer than source 'cats' was made by (ids before" in said
