"""Checkpoints that plain megatron-core writes, as its users do, and what they hold."""

import multiprocessing
import queue
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROWS, IDS, TOKENS = 128, 100, 16
ADAM = {"lr": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "weight_decay": 0.1}
ITERATION, SAMPLES = 3, 6
SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}
RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
BY_NAME = {"singleton_local_shards": True}
"""Each layer and each expert under a name of its own."""


def batch():
    """(sequences, tokens + 1) of ids below `IDS`."""
    return np.random.default_rng(7).integers(0, IDS, (2, TOKENS + 1))


def arguments(options, rows, tied):
    """The options of its command line that Megatron-LM saves and an import reads."""
    shape = {"qk_layernorm": False, **SHAPE, **options}
    shape["num_experts"] = shape.pop("num_moe_experts", None)
    return Namespace(
        **shape,
        group_query_attention=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        swiglu=True,
        norm_epsilon=1e-5,
        padded_vocab_size=rows,
        untie_embeddings_and_output_weights=not tied,
        position_embedding_type="rope",
        rotary_base=10000,
        rotary_percent=1.0,
        seq_length=TOKENS,
        max_position_embeddings=TOKENS,
        iteration=ITERATION,
        consumed_train_samples=SAMPLES,
    )


class Trained:
    """A model of megatron-core and its optimizer, to be trained on `batch()`."""

    def __init__(self, tensor=1, pipeline=1, expert=1, rows=ROWS, tied=True, bf16=False, **options):
        import torch
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.module import Float16Module
        from megatron.core.transformer.transformer_config import TransformerConfig

        parallel_state.initialize_model_parallel(
            tensor, pipeline, expert_model_parallel_size=expert, expert_tensor_parallel_size=1
        )
        model_parallel_cuda_manual_seed(1)
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.options, self.rows, self.tied = options, rows, tied
        core = TransformerConfig(
            **SHAPE,
            **options,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=bf16,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=1,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            batch_p2p_comm=False,
            moe_token_dispatcher_type="alltoall",
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
        )
        first, last = (
            parallel_state.is_pipeline_first_stage(),
            parallel_state.is_pipeline_last_stage(),
        )
        torch.manual_seed(1)
        model = GPTModel(
            core,
            get_gpt_layer_local_spec(
                num_experts=options.get("num_moe_experts"),
                qk_layernorm=options.get("qk_layernorm", False),
                normalization="RMSNorm",
            ),
            rows,
            TOKENS,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
        )
        for name, weight in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        if bf16:
            model = Float16Module(core, model.bfloat16())
        reduction = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True
        )
        self.model = DistributedDataParallel(core, reduction, model)
        settings = OptimizerConfig(
            optimizer="adam",
            bf16=bf16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            clip_grad=0.0,
            **ADAM,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        for group in self.optimizer.param_groups:  # as Megatron-LM's scheduler of rates does
            group["weight_decay"] = ADAM["weight_decay"] * group["wd_mult"]

    def losses(self, steps, known=None):
        """Mean loss before each of `steps` steps, on the last pipeline stage; else None.

        With `known`, the softmax is over the first `known` ids alone.
        """
        found = []
        for _ in range(steps):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            found.append(self._pass(known))
            assert self.optimizer.step()[0]
        return found

    def _pass(self, known):
        import torch
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        ids = torch.from_numpy(batch())

        def forward(data, model):
            positions = torch.arange(TOKENS).expand(2, -1)
            mask = torch.ones(1, 1, TOKENS, TOKENS).triu(1).bool()
            tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            if known is None:
                out = model(tokens, positions, mask, labels=labels)
                return out, lambda losses: (losses.mean(), {"loss": losses.mean().detach()})
            out = model(tokens, positions, mask)
            return out, lambda logits: _masked(logits, labels, known)

        reports = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=None,
            model=[self.model],
            num_microbatches=1,
            seq_length=TOKENS,
            micro_batch_size=2,
            forward_only=False,
        )
        finalize_model_grads([self.model])
        return reports[0]["loss"].item() if reports else None

    def save(self, folder, args=True, **metadata):
        """Save as Megatron-LM does, in `folder` itself."""
        from megatron.core import dist_checkpointing

        metadata = {**RESHARDABLE, **metadata}
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {"model": self._network().sharded_state_dict(metadata=metadata)}
        state["optimizer"] = self.optimizer.sharded_state_dict(state["model"], metadata=metadata)
        state |= {"iteration": ITERATION, "checkpoint_version": 3.0}
        if args:
            state["args"] = arguments(self.options, self.rows, self.tied)
        with _may_have_children():
            dist_checkpointing.save(state, str(folder))

    def load(self, folder):
        """Load as Megatron-LM does, by the default strictness of megatron-core.

        Without Transformer Engine the optimizer has no state to load into before its first step.
        """
        from megatron.core import dist_checkpointing

        self.losses(1)
        for optimizer in self.optimizer.chained_optimizers:
            _keep_steps(optimizer)
        common = dist_checkpointing.load_common_state_dict(str(folder))
        metadata = (
            dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or RESHARDABLE
        )
        state = {"model": self._network().sharded_state_dict(metadata=metadata)}
        state["optimizer"] = self.optimizer.sharded_state_dict(
            state["model"], is_loading=True, metadata=metadata
        )
        loaded = dist_checkpointing.load(state, str(folder))
        self._network().load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        return loaded["iteration"], vars(loaded["args"])

    def _network(self):
        network = self.model.module
        return getattr(network, "module", network)


def _keep_steps(optimizer):
    """PyTorch's AdamW has a tensor `step` for each weight, which megatron-core does not save and
    still asks for. Transformer Engine's, which its users have, has none."""
    load, states = (
        optimizer._set_main_param_and_optimizer_states,
        optimizer._get_main_param_and_optimizer_states,
    )
    optimizer._set_main_param_and_optimizer_states = lambda weight, tensors: load(
        weight, {**states(weight), **tensors}
    )


def _masked(logits, labels, known):
    import torch

    rows = logits[..., :known].float().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(rows, labels.flatten())
    return loss, {"loss": loss.detach()}


@contextmanager
def _may_have_children():
    """megatron-core starts processes to write; the ranks of tests are daemons, which may not.

    Its results pass through a queue of this process, without the process of its manager.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    settings = multiprocessing.current_process()._config
    was = settings.get("daemon")
    settings["daemon"] = False
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        settings["daemon"] = was
        filesystem_async._results_queue = None


@contextmanager
def ranks_of_megatron():
    """This rank, in a world of gloo."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def write(folder, known=None, saves=None, **options):
    """Train two steps and save; returns the losses of the next two.

    `saves`: {folder below `folder`: options of `Trained.save`}; one save into `folder` by default.
    """
    from megatron.core import parallel_state

    try:
        trained = Trained(**options)
        trained.losses(2)
        for name, words in (saves or {"": {}}).items():
            trained.save(Path(folder, name), **words)
        return trained.losses(2, known)
    finally:
        parallel_state.destroy_model_parallel()


def continue_from(folder, steps, again, known=None, **options):
    """Load a checkpoint, save it as `again` and train; iteration, arguments and losses."""
    from megatron.core import parallel_state

    with ranks_of_megatron():
        try:
            trained = Trained(**options)
            iteration, found = trained.load(folder)
            trained.save(again)
            return iteration, found, trained.losses(steps, known)
        finally:
            parallel_state.destroy_model_parallel()


def write_all(cases):
    """`write` for each {folder: options}; the losses of each, one start of the ranks for all."""
    with ranks_of_megatron():
        return {folder: write(folder, **options) for folder, options in cases.items()}


def tensors_of(folder):
    """All tensors of a checkpoint by name, as megatron-core reads them."""
    from megatron.core import dist_checkpointing

    with ranks_of_megatron():
        return dist_checkpointing.load_plain_tensors(str(folder))
