"""Layer specs: megatron-core's layers with our attention, norm and parallel block."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from megascale.config import LayerAttention, ModelConfig, RopeScalingConfig
from megascale.errors import UserError
from megascale.fused.recompute import recomputing
from megascale.model.attention import PackedAttention
from megascale.model.attention_experts import AttentionExperts
from megascale.model.balance import BalancedRouter
from megascale.model.dispatch import Dispatcher
from megascale.model.experts import GroupedExperts
from megascale.model.initialise import CLOSED_TOKENS
from megascale.model.norms import AllHeadsNorm, NormAfterLayer, RMSNorm


class RoutedLayer(TransformerLayer):  # type: ignore[misc]
    """megatron-core's layer, whose router knows which tokens of the pack count and whose they are.

    It is told anew in every pass, since recomputation and pipelines mix micro-batches.
    """

    def forward(
        self, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """What megatron-core's layer does."""
        self.mlp.router.segments = packed_seq_params
        output: tuple[torch.Tensor, Any] = super().forward(
            *args, packed_seq_params=packed_seq_params, **kwargs
        )
        return output


class GroupedLayer(RoutedLayer):
    """With the dispatcher that grouped experts want, in the place of megatron-core's alltoall."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.moe_token_dispatcher_type == "alltoall":
            mlp = self.mlp
            mlp.token_dispatcher = Dispatcher(config, mlp.num_local_experts, mlp.token_dispatcher)


class ParallelBlockLayer(TransformerLayer):  # type: ignore[misc]
    """y = x + MLP(LN x) + Attention(LN x), one norm shared (MegaScale section 3.1)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """(T, 1, hidden) -> (T, 1, hidden); the None is megatron-core's unused context."""
        normed = self.input_layernorm(hidden_states)
        attention, _bias = self.self_attention(
            normed, attention_mask=attention_mask, packed_seq_params=packed_seq_params
        )
        feed_forward, _bias = self.mlp(normed)
        return hidden_states + attention + feed_forward, None


class RecomputingLayer(torch.nn.Module):
    """Over a layer: its backward pass computes the outputs of `recomputed_parts` again."""

    def __init__(
        self, config: Any, *args: Any, recomputed_parts: frozenset[str], **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.recomputed_parts = recomputed_parts

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """What the layer does."""
        with recomputing(self.recomputed_parts):
            output: tuple[torch.Tensor, Any] = super().forward(*args, **kwargs)
        return output


class LayerMask(torch.nn.Module):
    """Over a layer: y = x + m (layer(x) - x), where m goes from 0 to 1 with the tokens trained on.

    Random new layers open so without changing the model's function at first (G_random of arXiv
    2405.15319; the mask's linear way as in Masked Structural Growth, arXiv 2305.02869).
    """

    def __init__(self, config: Any, *args: Any, mask_tokens: int, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.mask_tokens = mask_tokens
        device = next(self.parameters()).device
        # whole numbers: exact however they are added up, and no precision converts them
        self.register_buffer(CLOSED_TOKENS, torch.zeros(1, dtype=torch.int64, device=device))

    def open_by(self, tokens: int) -> None:
        """Count the tokens of a step."""
        self.closed_tokens.sub_(tokens).clamp_(min=0)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """(T, 1, hidden) -> (T, 1, hidden), and what the layer returns beside."""
        output, beside = super().forward(hidden_states, *args, **kwargs)
        mask = (1 - self.closed_tokens.double() / self.mask_tokens).clamp(min=0)
        return torch.lerp(hidden_states, output, mask.to(output.dtype)), beside  # exact at 0 and 1


def use_transformer_engine(model: ModelConfig) -> bool:
    """Whether layers come from Transformer Engine.

    Raises UserError when it is asked for but missing, or cannot build the block.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if model.implementation == "transformer_engine":
        if not installed:
            raise UserError(
                "model.implementation = transformer_engine, which is not installed; "
                "set model.implementation=local"
            )
        if only_local := _only_local(model):
            raise UserError(f"{only_local} needs model.implementation=local")
        return True
    cuda = torch.cuda.is_available()
    return model.implementation == "auto" and installed and cuda and not _only_local(model)


def _only_local(model: ModelConfig) -> str:
    """An option that Transformer Engine's layers do not have; empty without one."""
    options = {
        "model.parallel_block": model.parallel_block,
        "model.norm_position = after": model.norm_position == "after",
        "model.qk_norm_heads = all": model.qk_norm_heads == "all",
    }
    return next((name for name, is_set in options.items() if is_set), "")


def layer_spec(
    model: ModelConfig, grouped: bool = False, recomputed_parts: frozenset[str] = frozenset()
) -> ModuleSpec:
    """The spec of one transformer layer of `model`.

    With `grouped` its experts are multiplied together where Transformer Engine does not do it.
    Outputs of `recomputed_parts` are computed again in the backward pass. Raises UserError where
    Transformer Engine would have to do that.
    """
    spec = _open_layer_spec(model, grouped)
    if recomputed_parts:
        if use_transformer_engine(model):
            raise UserError("train.recompute=selective needs model.implementation=local")
        spec = _over(spec, RecomputingLayer, recomputed_parts=recomputed_parts)
    if model.mask_tokens is not None:
        spec = _over(spec, LayerMask, mask_tokens=model.mask_tokens)
    return spec


def _over(spec: ModuleSpec, cover: type, **options: Any) -> ModuleSpec:
    """A layer whose class has the methods of `cover` over its own."""
    module = type(f"{cover.__name__}{spec.module.__name__}", (cover, spec.module), {})
    return replace(spec, module=module, params={**spec.params, **options})


def _open_layer_spec(model: ModelConfig, grouped: bool) -> ModuleSpec:
    num_experts = model.moe.num_experts if model.moe else None
    if use_transformer_engine(model):
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=True, qk_layernorm=model.qk_norm
        )
        return _routed(model, _with(spec, _attention(model, spec)))
    spec = get_gpt_layer_local_spec(
        num_experts=num_experts, qk_layernorm=model.qk_norm, normalization="RMSNorm"
    )
    q_norm, k_norm = (_qk_norm(model, heads) for heads in (model.num_heads, model.num_kv_heads))
    attention = _attention(model, spec, q_layernorm=q_norm, k_layernorm=k_norm)
    after = model.norm_position == "after"
    norm = IdentityOp if after else RMSNorm
    pre_mlp_norm = IdentityOp if model.parallel_block else norm
    spec = _with(spec, attention, input_layernorm=norm, pre_mlp_layernorm=pre_mlp_norm)
    spec = _routed(model, spec, grouped)
    if after:
        return replace(spec, module=NormAfterLayer)
    return replace(spec, module=ParallelBlockLayer) if model.parallel_block else spec


def _qk_norm(model: ModelConfig, heads: int | None) -> Any:
    if not model.qk_norm:
        return IdentityOp
    if model.qk_norm_heads == "each":
        return RMSNorm
    return ModuleSpec(module=AllHeadsNorm, params={"heads": heads})


def _routed(model: ModelConfig, spec: ModuleSpec, grouped: bool = False) -> ModuleSpec:
    """With our router, and with `grouped` our experts, where there are experts."""
    if model.moe is None:
        return spec
    mlp, parts = spec.submodules.mlp, {"router": partial(BalancedRouter, moe=model.moe)}
    if grouped:
        parts["experts"] = GroupedExperts
    if isinstance(mlp, partial):  # megatron-core 0.19
        submodules = replace(mlp.keywords["submodules"], **parts)
        mlp = partial(mlp.func, **{**mlp.keywords, "submodules": submodules})
    else:
        mlp = replace(mlp, submodules=replace(mlp.submodules, **parts))
    module = GroupedLayer if grouped else RoutedLayer
    return replace(spec, module=module, submodules=replace(spec.submodules, mlp=mlp))


def final_norm(model: ModelConfig) -> type | None:
    """The norm before the output head; None means megatron-core's own choice."""
    return None if use_transformer_engine(model) else RMSNorm


def with_packed_attention(
    spec: ModuleSpec,
    rope_base: float = 10_000.0,
    window: int | None = None,
    rope_scaling: RopeScalingConfig | None = None,
    layers: Sequence[LayerAttention] = (),
) -> ModuleSpec:
    """A layer spec of megatron-core whose attention is `PackedAttention`.

    Its model takes the `segments` of a micro-batch as `packed_seq_params`, has no position
    embedding of its own (`position_embedding_type="none"`), and may share sequences with any ranks.
    `layers`: the attention of each layer of the whole model, where they differ; it comes in the
    place of the other options.
    """
    options: dict[str, Any] = {"rope_base": rope_base, "window": window}
    options |= {"rope_scaling": rope_scaling, "layers": tuple(layers)}
    core = ModuleSpec(module=PackedAttention, params=options)
    attention = spec.submodules.self_attention
    submodules = replace(attention.submodules, core_attention=core)
    return _with(spec, replace(attention, submodules=submodules))


def _attention(model: ModelConfig, spec: ModuleSpec, **changes: Any) -> ModuleSpec:
    layers = [model.attention_of(layer) for layer in range(1, model.num_layers + 1)]
    attention = with_packed_attention(spec, layers=layers).submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, **changes))
    if model.moe is None or model.moe.attention_experts == 1:
        return attention
    several = {"expert": attention, "num_experts": model.moe.attention_experts}
    return ModuleSpec(module=AttentionExperts, params=several)


def _with(spec: ModuleSpec, attention: ModuleSpec, **changes: Any) -> ModuleSpec:
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention, **changes))
