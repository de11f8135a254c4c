"""A GPT, dense or MoE, built on megatron-core from the config, for this rank."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megascale.config import MoeConfig, RunConfig
from megascale.config.optimizers import OPTIMIZERS
from megascale.fused import swiglu, weight_gradient
from megascale.mesh.offload import Offloader
from megascale.model.balance import Balance
from megascale.model.counts import padded_vocab_size
from megascale.model.experts import groups_experts
from megascale.model.gathers import Gathers
from megascale.model.gpt import Gpt
from megascale.model.initialise import initialise
from megascale.model.layers import LayerMask, final_norm, layer_spec, use_transformer_engine
from megascale.model.model import Model
from megascale.model.timing import ComputeTimer
from megascale.model.vocabulary import exclude_padding
from megascale.runtime.distributed import Ranks

CUDA_TOKENS = 128
"""Lengths of micro-batches on CUDA are multiples of it: the tiles of matrix products are full, and
the allocator sees fewer sizes."""


def build_model(config: RunConfig, ranks: Ranks) -> Model:
    """This rank's part of the model, with initial weights, wrapped for gradient reduction.

    The weights depend on `seed` and their name alone, not on the layout of the ranks. Padded rows
    of the vocabulary are in no softmax (`vocabulary.exclude_padding`).
    Gradients are summed over ranks, never averaged.
    """
    core = transformer_config(config, ranks)
    if core.bias_activation_fusion:
        swiglu.use_in_megatron()
    if core.gradient_accumulation_fusion:
        weight_gradient.use_in_megatron()
    network = Gpt(
        config=core,
        transformer_layer_spec=_block_spec(config, core, ranks),
        vocab_size=padded_vocab_size(config.model, config.parallel.tensor),
        max_sequence_length=config.data.context_tokens,
        pre_process=ranks.is_first_stage,
        post_process=ranks.is_last_stage,
        share_embeddings_and_output_weights=config.model.tied_embeddings,
        position_embedding_type="none",
        parallel_output=True,
    )
    assert config.model.vocab_size is not None  # it is finalized
    exclude_padding(network, config.model.vocab_size, ranks.device)
    initialise(network, config.model, config.seed)
    network = network.to(ranks.device)
    gpt, layers = network, network.decoder.layers
    if config.train.precision == "bf16":
        network = Float16Module(core, network)
    reduction = _reduction(config, ranks)
    wrapped = DistributedDataParallel(core, reduction, network)
    gathers = Gathers([wrapped] if reduction.overlap_param_gather else [])
    for layer in layers:
        gathers.wait_before(layer, layer.parameters(), wrapped)
    if ranks.is_last_stage:  # the loss takes the weight of the head
        gathers.wait_before(gpt.decoder.final_layernorm, gpt.output_layer.parameters(), wrapped)
    core.no_sync_func = wrapped.no_sync  # gradients are reduced after the last micro-batch only
    return Model(
        chunks=[wrapped],
        offloader=Offloader(layers, ranks.device),
        balance=_balance(config, layers),
        timer=ComputeTimer(layers, ranks.device),
        masked_layers=[layer for layer in layers if isinstance(layer, LayerMask)],
        gathers=gathers,
        overlaps=reduction.overlap_grad_reduce,
    )


def _balance(config: RunConfig, layers: Sequence[Any]) -> Balance | None:
    if config.model.moe is None:
        return None
    routers = {layer.layer_number: layer.mlp.router for layer in layers}
    return Balance(routers, config.model.moe, config.model.num_layers, len(config.data.sources))


def transformer_config(config: RunConfig, ranks: Ranks) -> TransformerConfig:
    """megatron-core's description of the model."""
    model, cut = config.model, config.parallel
    bf16 = config.train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    on_cuda = ranks.device.type == "cuda"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        # megatron-core sums gradients of these norms over tensor ranks, which all have the same
        # weights; norms over all heads are cut
        qk_layernorm=model.qk_norm and model.qk_norm_heads == "each",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        use_cpu_initialization=not on_cuda,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        tensor_model_parallel_size=cut.tensor,
        pipeline_model_parallel_size=cut.pipeline,
        expert_model_parallel_size=cut.expert,
        sequence_parallel=bool(cut.sequence_parallel),
        calculate_per_token_loss=True,
        variable_seq_lengths=not config.pads_to_capacity,
        batch_p2p_comm=on_cuda,
        bias_activation_fusion=on_cuda or bool(config.recomputed_parts & {"swiglu", "experts"}),
        gradient_accumulation_fusion=on_cuda,
        masked_softmax_fusion=False,
        **_recompute_options(config),
        **_moe_options(model.moe, use_transformer_engine(model)),
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    """Initial weights come from `initialise`; megatron-core must still run its own step, which
    marks the weights that are cut over tensor ranks."""
    return weight


def pack_multiple(config: RunConfig, device: torch.device) -> int:
    """Micro-batches are padded to a multiple of this many tokens.

    Sequence parallelism needs a multiple of the tensor ranks. On CUDA it is a multiple of
    CUDA_TOKENS too. The allgather dispatcher needs the same number of tokens on all ranks of an
    expert group: the whole capacity.
    """
    tensor = config.parallel.tensor
    multiple = lcm(tensor, CUDA_TOKENS) if device.type == "cuda" else tensor
    if not config.pads_to_capacity:
        return multiple
    return -(-(config.planner.capacity_tokens or 1) // multiple) * multiple


def _recompute_options(config: RunConfig) -> dict[str, Any]:
    if config.train.recompute != "full":
        return {}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def _moe_options(moe: MoeConfig | None, grouped: bool) -> dict[str, Any]:
    if moe is None:  # megatron-core checks its default dispatcher even in dense models
        return {"moe_token_dispatcher_type": "alltoall"}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        # one weight alone would be 1, whatever it is
        "moe_router_pre_softmax": moe.top_k == 1 or not moe.normalize_top_k,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_token_dispatcher_type": moe.dispatcher,
        "moe_router_load_balancing_type": "none",  # our router has losses of its own
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": grouped,
    }


def _block_spec(config: RunConfig, core: TransformerConfig, ranks: Ranks) -> ModuleSpec | Any:
    grouped = groups_experts(config, ranks.device)
    spec = layer_spec(config.model, grouped, config.recomputed_parts)
    norm = final_norm(config.model)
    if norm is None:
        return spec
    layers = [spec] * get_num_layers_to_build(core)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def can_overlap(device: torch.device) -> bool:
    """Whether communication runs beside computation."""
    return device.type == "cuda"


def _reduction(config: RunConfig, ranks: Ranks) -> DistributedDataParallelConfig:
    """Overlap with computation pays on CUDA.

    Experts without tokens have no gradient to announce, so a MoE model without grouped experts
    reduces at the end. `Model.overlap_reductions` says step by step whether reductions overlap.
    """
    whole = config.model.moe is None or use_transformer_engine(config.model)
    whole = whole or groups_experts(config, ranks.device)
    overlap = config.parallel.overlap and can_overlap(ranks.device) and whole
    flat = config.optim.distributed_optimizer and OPTIMIZERS[config.optim.name].is_flat
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and flat,
        align_param_gather=True,  # a forward pass begins no gather; see Gathers
        use_distributed_optimizer=flat,
    )
