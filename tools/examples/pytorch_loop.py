"""megascale's planner in a plain PyTorch loop, with a Llama of `transformers`.

    torchrun --nproc-per-node 2 tools/examples/pytorch_loop.py

Every step draws documents of very different lengths. Each rank makes the same plan, runs its own
micro-batches, and shares the long document with the other ranks.
"""

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import megascale
from megascale.mesh import HdpAxis, TokenSequence, micro_batches, use_in_transformers

VOCABULARY, CAPACITY_TOKENS = 1000, 512


def documents(step: int) -> list[np.ndarray]:
    """Ids of the documents of a step, one long and many short; low ids are frequent."""
    draw = np.random.default_rng(step)
    lengths = (900, *draw.integers(8, 200, size=9))
    return [np.minimum(draw.zipf(1.5, n + 1), VOCABULARY) - 1 for n in lengths]


def make_model(attention: str) -> LlamaForCausalLM:
    """A small Llama, the same on every rank."""
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=VOCABULARY)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation=attention))


def train(steps: int) -> tuple[list[float], LlamaForCausalLM]:
    """(loss of each step, the model); to be called on every rank of a process group."""
    rank, world, axis = dist.get_rank(), dist.get_world_size(), HdpAxis.of()
    model = make_model(use_in_transformers())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        sequences = [TokenSequence(ids[:-1], ids[1:]) for ids in documents(step)]
        lengths = [len(sequence.targets) for sequence in sequences]
        plan = megascale.plan(lengths, num_ranks=world, capacity_tokens=CAPACITY_TOKENS)
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        loss_sum = torch.zeros(())
        for batch in micro_batches(plan, rank, sequences, axis=axis):
            positions = batch.segments.positions_T[None]
            inputs = dict(input_ids=batch.tokens_T[None], position_ids=positions)
            logits = model(**inputs, segments=batch.segments, use_cache=False).logits[0]
            loss_T = torch.nn.functional.cross_entropy(logits, batch.targets_T, reduction="none")
            loss = (loss_T * batch.loss_mask_T).sum()
            loss.backward()
            loss_sum += loss.detach()
        for summed in (loss_sum, *(weight.grad for weight in model.parameters())):
            dist.all_reduce(summed)
            summed /= sum(lengths)  # divided once, by the tokens of the whole batch
        optimizer.step()
        losses.append(loss_sum.item())
    return losses, model


if __name__ == "__main__":
    dist.init_process_group("gloo")
    curve, _ = train(steps=10)
    if dist.get_rank() == 0:
        print("loss", *(f"{loss:.4f}" for loss in curve))
    dist.destroy_process_group()
