"""The experts of a layer as two weights, multiplied together.

megatron-core runs experts one by one without Transformer Engine: 796 kernels in a layer of 64
experts. Checkpoints do not tell the two ways apart: each expert's matrices have a place of their
own in the same global tensors.

Shape suffixes: N rows (a token for each of its experts) in the order of experts, E experts on this
rank, D hidden size, F size of an expert on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule

from megascale.config import RunConfig
from megascale.config.optimizers import OPTIMIZERS
from megascale.fused.grouped import ALIGNED_BYTES, grouped_linear
from megascale.fused.swiglu import swiglu

OLDEST_CAPABILITY = (9, 0)
"""Older devices run the groups one by one too, and wait for their sizes."""


def groups_experts(config: RunConfig, device: torch.device) -> bool:
    """Whether experts are multiplied together where Transformer Engine does not do it.

    That takes bf16 on CUDA, and sizes that the kernel takes. An optimizer of whole weights is to
    have each expert's weights apart, because it deals them out over ranks.
    """
    moe = config.model.moe
    if moe is None or device.type != "cuda" or config.train.precision != "bf16":
        return False
    widths = (config.model.hidden_size, (moe.ffn_hidden_size or 0) // config.parallel.tensor)
    return (
        OPTIMIZERS[config.optim.name].is_flat
        and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
        and all(2 * width % ALIGNED_BYTES == 0 for width in widths)
    )


class GroupedExperts(MegatronModule):  # type: ignore[misc]
    """In the place of megatron-core's SequentialMLP, with SwiGLU and without biases."""

    def __init__(
        self, num_local_experts: int, config: Any, pg_collection: Any, name: str | None = None
    ) -> None:
        """`name` is for newer versions of megatron-core, which name modules."""
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        rows_of = {
            "weight1": (2 * width, config.hidden_size),
            "weight2": (config.hidden_size, width),
        }
        for key, (rows, columns) in rows_of.items():
            setattr(
                self, key, self._weight(num_local_experts * rows, columns, cut=key == "weight1")
            )

    def _weight(self, rows: int, columns: int, cut: bool) -> torch.nn.Parameter:
        """The matrices of all experts on top of each other; `cut`: tensor ranks share the rows of
        a matrix, else its columns."""
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        empty = torch.empty(rows, columns, dtype=self.config.params_dtype, device=device)
        weight = torch.nn.Parameter(empty)
        set_tensor_model_parallel_attributes(weight, True, 0 if cut else 1, 1)
        weight.allreduce = self.ep_group.size() == 1  # type: ignore[attr-defined]
        return weight

    def forward(
        self, tokens_ND: torch.Tensor, counts_E: torch.Tensor, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """(N, D) of each expert's output times its weight; the None is megatron-core's bias.

        `counts_E` is how many rows each expert has. With tensor ranks it is this rank's part.
        """
        counts_E = counts_E.to(tokens_ND.device, non_blocking=True)
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gates_N2F = grouped_linear(tokens_ND, self.weight1, ends_E)
        hidden_NF = swiglu(gates_N2F, weights_N)
        return grouped_linear(hidden_NF, self.weight2, ends_E), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The tensors that sequential experts have, each made of the parts of all experts."""
        state = {}
        for name, key, halves in (("weight1", "linear_fc1", 2), ("weight2", "linear_fc2", 1)):
            state[f"{prefix}{name}"] = ShardedTensorFactory(
                f"{prefix}experts.{key}.weight",
                getattr(self, name),
                lambda *given, halves=halves: list(self._parts(*given, halves, sharded_offsets)),
                torch.cat,
                (0, 0, self.dp_group.rank()),
            )
        return state

    def _parts(
        self,
        key: str,
        weight: torch.Tensor,
        replica: Any,
        flattened_range: None,
        halves: int,
        layers: tuple[Any, ...],
    ) -> Iterator[ShardedTensor]:
        """Gate and up matrices of each expert (two halves), or the matrix back (one half)."""
        first, total = self.ep_group.rank() * self.num_local_experts, self.config.num_moe_experts
        tensor_rank, tensor = self.tp_group.rank(), self.tp_group.size()
        for number, matrix in enumerate(weight.chunk(self.num_local_experts)):
            expert = (*layers, (len(layers), first + number, total))
            for half, part in enumerate(matrix.chunk(halves)):
                place = (len(expert), half * tensor + tensor_rank, halves * tensor)
                if halves == 1:  # the columns are cut
                    place = (len(expert) + 1, tensor_rank, tensor)
                yield ShardedTensor.from_rank_offsets(
                    key, part, *expert, place, replica_id=replica, prepend_axis_num=len(expert)
                )
