"""megascale's planner in a loop on megatron-core alone.

    torchrun --nproc-per-node 2 tools/examples/megatron_core_loop.py

The model, the gradient buffers and the optimizer are megatron-core's. Only the attention of its
layers is replaced, by one that a ring of any ranks can share.
"""

import numpy as np
import torch
import torch.distributed as dist

from megascale.runtime.distributed import prepare_device

prepare_device("auto")  # so that megatron-core runs without CUDA too; before it is imported

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

import megascale  # noqa: E402
from megascale.mesh import HdpAxis, TokenSequence, micro_batches  # noqa: E402
from megascale.model import with_packed_attention  # noqa: E402

VOCABULARY, CAPACITY_TOKENS = 1024, 512


def documents(step: int) -> list[np.ndarray]:
    """Ids of the documents of a step, one long and many short; low ids are frequent."""
    draw = np.random.default_rng(step)
    lengths = (900, *draw.integers(8, 200, size=9))
    return [np.minimum(draw.zipf(1.5, n + 1), VOCABULARY) - 1 for n in lengths]


def make_model() -> DistributedDataParallel:
    """A small GPT, the same on every rank, whose gradients are sums over tokens."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    torch.manual_seed(0)
    # this attention rotates queries and keys itself, by each token's place in its document
    spec = with_packed_attention(get_gpt_layer_local_spec())
    model = GPTModel(config, spec, VOCABULARY, 1024, position_embedding_type="none")
    reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, reduction, model)


def train(steps: int) -> tuple[list[float], DistributedDataParallel]:
    """(loss of each step, the model); to be called on every rank of a process group."""
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    rank, world, axis = dist.get_rank(), dist.get_world_size(), HdpAxis.of()
    model = make_model()
    options = OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=0.0)
    optimizer = get_megatron_optimizer(options, [model], use_gloo_process_groups=False)
    losses = []
    for step in range(steps):
        sequences = [TokenSequence(ids[:-1], ids[1:]) for ids in documents(step)]
        lengths = [len(sequence.targets) for sequence in sequences]
        plan = megascale.plan(lengths, num_ranks=world, capacity_tokens=CAPACITY_TOKENS)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss_sum = torch.zeros(())
        with model.no_sync():
            for batch in micro_batches(plan, rank, sequences, axis=axis):
                positions, labels = batch.segments.positions_T[None], batch.targets_T[None]
                inputs = (batch.tokens_T[None], positions, None)
                loss_T = model(*inputs, labels=labels, packed_seq_params=batch.segments)
                loss = (loss_T.flatten() * batch.loss_mask_T).sum()
                loss.backward()
                loss_sum += loss.detach()
        finalize_model_grads([model])  # sums over ranks
        model.scale_gradients(1 / sum(lengths))  # divided once, by the tokens of the whole batch
        optimizer.step()
        dist.all_reduce(loss_sum)
        losses.append(loss_sum.item() / sum(lengths))
    return losses, model


if __name__ == "__main__":
    dist.init_process_group("gloo")
    curve, _ = train(steps=10)
    if dist.get_rank() == 0:
        print("loss", *(f"{loss:.4f}" for loss in curve))
    dist.destroy_process_group()
