"""The options of a Megatron checkpoint's model, under the names of Megatron's arguments, of
`TransformerConfig` or of Megatron-Bridge."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megascale.checkpoint.pickles import Skipped
from megascale.convert.megatron.source import COMMON, RUN_CONFIG, Source
from megascale.errors import UserError

Values = tuple[Any, ...]
NONE: Values = (None,)
OFF: Values = (False, None)
REFUSED: dict[str, Values] = {
    "normalization": ("RMSNorm",),
    "apply_layernorm_1p": OFF,
    "layernorm_zero_centered_gamma": OFF,
    "add_bias_linear": OFF,
    "gated_linear_unit": (True,),
    "swiglu": (True,),
    "quick_geglu": OFF,
    "squared_relu": OFF,
    "openai_gelu": OFF,
    "glu_linear_offset": (0.0, None),
    "activation_func_clamp_value": NONE,
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": OFF,
    "rotary_seq_len_interpolation_factor": (None, 1),
    "seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": NONE,
    "window_attn_skip_freq": NONE,
    "multi_latent_attention": OFF,
    "experimental_attention_variant": NONE,
    "linear_attention_freq": NONE,
    "attention_output_gate": OFF,
    "softmax_type": ("vanilla",),
    "softmax_scale": NONE,
    "attn_logit_softcapping": NONE,
    "final_logit_softcapping": NONE,
    "qk_l2_norm": OFF,
    "apply_residual_connection_post_layernorm": OFF,
    "post_self_attn_layernorm": OFF,
    "post_mlp_layernorm": OFF,
    "use_mup": OFF,
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": NONE,
    "heterogeneous_block_specs": OFF,
    "is_hybrid_model": OFF,
    "hybrid_override_pattern": NONE,
    "hybrid_layer_pattern": NONE,
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None, 1),
    "moe_router_enable_expert_bias": OFF,
    "moe_router_num_groups": NONE,
    "moe_router_group_topk": NONE,
    "moe_latent_size": NONE,
}
"""Options of the model, and the values of them that our model has."""
SILU = ("silu", "swish")
_MISSING = object()


@dataclass
class Description:
    """Options by name, and the defaults taken for missing ones."""

    where: str
    """The files that they are from; begins errors."""
    values: Mapping[str, Any]
    assumed: dict[str, Any] = field(default_factory=dict)
    """Missing options, and the default taken for each."""

    @staticmethod
    def of(source: Source, by_hand: Mapping[str, Any] | None, path: str) -> Description:
        """The options of a checkpoint. Those of `by_hand`, a YAML from `path`, come first.

        Raises UserError where there are none.
        """
        parts: dict[str, Mapping[str, Any]] = {}
        if by_hand:
            parts[path] = _flat(by_hand)
        if source.run_config:
            parts[str(source.folder / RUN_CONFIG)] = _flat(source.run_config)
        arguments = source.common.get("args")
        if isinstance(arguments, Namespace):
            parts[f"args of {source.folder / COMMON}"] = vars(arguments)
        if not parts:
            raise UserError(
                f"{source.folder} does not say which architecture it has (no args in {COMMON}, "
                f"no {RUN_CONFIG}); write its options into a YAML under Megatron's names "
                "(num_layers, hidden_size, num_attention_heads, ...) and give it with "
                "--architecture FILE"
            )
        values: dict[str, Any] = {}
        for part in reversed(parts.values()):
            values |= {n: value for n, value in part.items() if not isinstance(value, Skipped)}
        return Description(" and ".join(parts), values)

    def has(self, name: str) -> bool:
        """Whether an option is there and is not null."""
        return self.values.get(name) is not None

    def get(self, *names: str, default: Any = _MISSING) -> Any:
        """The value of the first of `names` that is there and not null.

        Without one, `default`, which is noted. Raises UserError where there is no default.
        """
        for name in names:
            if self.has(name):
                return self.values[name]
        if default is _MISSING:
            raise UserError(
                f"{self.where}: {names[0]} is not there; write it into a YAML and give it with "
                "--architecture FILE"
            )
        self.assumed[names[0]] = default
        return default

    def number(self, *names: str, default: Any = _MISSING) -> int:
        """`get` of a whole number from 1 on. Raises UserError for anything else."""
        value = self.get(*names, default=default)
        if type(value) is not int or value < 1:
            raise UserError(f"{self.where}: {names[0]} = {str(value)[:40]} must be a whole number")
        return value

    def refuse_others(self) -> None:
        """Raise UserError for an option that our model lacks."""
        for name, allowed in REFUSED.items():
            if name in self.values and self.values[name] not in allowed:
                wanted = " or ".join(str(value) for value in allowed)
                raise UserError(
                    f"{self.where}: {name} = {str(self.values[name])[:60]} is not built; only "
                    f"{wanted} is"
                )
        activation = self.values.get("activation_func")
        if activation is not None and not _name_of(activation).endswith(SILU):
            raise UserError(
                f"{self.where}: activation_func = {_name_of(activation)[:60]} is not built; only "
                "silu is"
            )


def _flat(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A YAML with a section `model`: its options, and those of other sections that count."""
    model = document.get("model")
    if not isinstance(model, dict):
        return document
    names = {"train": ("global_batch_size",), "dataset": ("seq_length", "sequence_length")}
    others = {
        name: section[name]
        for key, wanted in names.items()
        if isinstance(section := document.get(key), dict)
        for name in wanted
        if name in section
    }
    return {**others, **model}


def _name_of(value: Any) -> str:
    """The name of a function, in a pickle or in a YAML of Megatron-Bridge."""
    if isinstance(value, dict):
        return str(value.get("_target_", value))
    return str(getattr(value, "__name__", value))
