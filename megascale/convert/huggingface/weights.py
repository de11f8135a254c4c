"""Which tensors of a Hugging Face model make up which of ours, and both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megascale.checkpoint.ranges import Shape
from megascale.checkpoint.tensors import Piece, Tensors
from megascale.config import ModelConfig
from megascale.convert.closed_layers import refuse_closed_layers
from megascale.convert.huggingface.families import FAMILIES
from megascale.convert.huggingface.model_files import ModelFiles
from megascale.convert.router_loads import even_loads
from megascale.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NOT_WEIGHTS = ".rotary_emb.inv_freq"
"""End of the names of tables that old versions of transformers saved too."""


@dataclass(frozen=True)
class Match:
    """A box of a tensor of ours, and the tensors of theirs that it is made of."""

    key: str
    names: tuple[str, ...]
    rows: tuple[int, ...]
    """Rows of each of theirs."""
    row: Shape
    """Shape of one row: () for vectors."""
    stack: Shape = ()
    """Our leading axes: layers, or layers and experts."""
    place: Shape = ()
    """Index of this box on them."""
    groups: int = 1
    """Ours takes the first part of every one of theirs, then the second, and so on: megatron-core
    keeps the queries, the key and the value of a group together."""
    parts: tuple[int, ...] = ()
    """Rows of what is put together so, where that is not each of their tensors (`fused`)."""

    def join(self, theirs: list[torch.Tensor]) -> torch.Tensor:
        """Ours from theirs."""
        parts = list(torch.cat(theirs).split(self.parts)) if self.parts else theirs
        grouped = [part.unflatten(0, (self.groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, joined: torch.Tensor) -> list[torch.Tensor]:
        """Theirs from ours."""
        sizes = [count // self.groups for count in self.parts or self.rows]
        grouped = joined.unflatten(0, (self.groups, -1)).split(sizes, dim=1)
        parts = [part.flatten(0, 1) for part in grouped]
        return list(torch.cat(parts).split(self.rows)) if self.parts else parts

    def shapes(self) -> dict[str, Shape]:
        """Shapes of theirs by name."""
        return {n: (count, *self.row) for n, count in zip(self.names, self.rows, strict=True)}

    def piece(self, joined: torch.Tensor) -> Piece:
        """The box of our checkpoint that holds what `join` gave."""
        shape = self.stack + tuple(joined.shape)
        offset = self.place + (0,) * joined.dim()
        return Piece(self.key, shape, offset, joined[(None,) * len(self.stack)])


def matches(model: ModelConfig, kind: str) -> Iterator[Match]:
    """All tensors of a finalized model of a family, in the order of its layers."""
    family, moe_names = FAMILIES[kind], _MOE_NAMES.get(kind)
    vocab, width = model.vocab_size or 0, (model.hidden_size,)
    key = "embedding.word_embeddings.weight"
    yield Match(key, (EMBEDDING,), (vocab,), width)
    for layer in range(model.num_layers):
        yield from _norms(model, layer)
        yield from _attention(model, layer, family.fused)
        if moe_names is None:
            yield from _dense(model, layer, family.fused)
        else:
            yield from _experts(model, layer, *moe_names)
    norm = ("model.norm.weight",)
    yield Match("decoder.final_layernorm.weight", norm, (model.hidden_size,), ())
    if not model.tied_embeddings:
        yield Match("output_layer.weight", (HEAD,), (vocab,), width)


_MOE_NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
"""By family: the part of a layer that holds the experts; gate, up and down of one expert."""


NORMS = {
    "before": {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
    },
    "after": {
        "attention_output_norm.weight": "post_attention_layernorm",
        "mlp_output_norm.weight": "post_feedforward_layernorm",
    },
}
"""By `norm_position`: our norms of a layer, and theirs."""


def _norms(model: ModelConfig, layer: int) -> Iterator[Match]:
    for ours, theirs in NORMS[model.norm_position].items():
        names, key = (f"model.layers.{layer}.{theirs}.weight",), f"decoder.layers.{ours}"
        yield Match(key, names, (model.hidden_size,), (), (model.num_layers,), (layer,))


def _attention(model: ModelConfig, layer: int, fused: bool) -> Iterator[Match]:
    size, groups, width = model.head_dim or 0, model.num_kv_heads or 0, model.hidden_size
    stack, place, heads = (model.num_layers,), (layer,), model.num_heads * size
    rows = (heads, groups * size, groups * size)
    ours, theirs = "decoder.layers.self_attention", f"model.layers.{layer}"
    query = f"{ours}.linear_qkv"
    for kind, row in (("weight", (width,)), ("bias", ())):
        if kind == "weight" or model.qkv_bias:
            parts = ("qkv",) if fused else ("q", "k", "v")
            names = tuple(f"{theirs}.self_attn.{one}_proj.{kind}" for one in parts)
            of_theirs, inside = ((sum(rows),), rows) if fused else (rows, ())
            yield Match(f"{query}.{kind}", names, of_theirs, row, stack, place, groups, inside)
    if model.qk_norm:
        for one, held in zip("qk", rows[:2], strict=True):
            names = (f"{theirs}.self_attn.{one}_norm.weight",)
            count = held if model.qk_norm_heads == "all" else size
            yield Match(f"{ours}.{one}_layernorm.weight", names, (count,), (), stack, place)
    names = (f"{theirs}.self_attn.o_proj.weight",)
    yield Match(f"{ours}.linear_proj.weight", names, (width,), (heads,), stack, place)


def _dense(model: ModelConfig, layer: int, fused: bool) -> Iterator[Match]:
    parts = ("gate_up", "down") if fused else ("gate", "up", "down")
    names = tuple(f"model.layers.{layer}.mlp.{part}_proj" for part in parts)
    stack, place, inner = (model.num_layers,), (layer,), model.ffn_hidden_size or 0
    yield from _swiglu("decoder.layers.mlp", names, model.hidden_size, inner, stack, place)


def _experts(model: ModelConfig, layer: int, block: str, parts: tuple[str, ...]) -> Iterator[Match]:
    moe, theirs = model.moe, f"model.layers.{layer}.{block}"
    assert moe is not None and moe.ffn_hidden_size is not None
    experts, width, inner = moe.num_experts, model.hidden_size, moe.ffn_hidden_size
    names: tuple[str, ...] = (f"{theirs}.gate.weight",)
    key, layers = "decoder.layers.mlp.router.weight", (model.num_layers,)
    yield Match(key, names, (experts,), (width,), layers, (layer,))
    if moe.shared_gate:
        shared = "decoder.layers.mlp.shared_experts"
        gate = (f"{theirs}.shared_expert_gate.weight",)
        yield Match(f"{shared}.gate_weight", gate, (1,), (width,), layers, (layer,))
        names = tuple(f"{theirs}.shared_expert.{part}" for part in parts)
        yield from _swiglu(shared, names, width, moe.shared_ffn_hidden_size, layers, (layer,))
    key, stack = "decoder.layers.mlp.experts.experts", (model.num_layers, experts)
    for expert in range(experts):
        names = tuple(f"{theirs}.experts.{expert}.{part}" for part in parts)
        yield from _swiglu(key, names, width, inner, stack, (layer, expert))


def _swiglu(
    key: str, names: tuple[str, ...], width: int, inner: int, stack: Shape, place: Shape
) -> Iterator[Match]:
    """`names`: of gate and up, together or apart, and of down."""
    *gated, down = (f"{name}.weight" for name in names)
    rows = (2 * inner // len(gated),) * len(gated)
    yield Match(f"{key}.linear_fc1.weight", tuple(gated), rows, (width,), stack, place)
    yield Match(f"{key}.linear_fc2.weight", (down,), (width,), (inner,), stack, place)


def import_pieces(
    files: ModelFiles, model: ModelConfig, kind: str, dtype: torch.dtype
) -> Iterator[Piece]:
    """The pieces of our checkpoint, one box of one layer at a time; `kind` is their family."""
    for match in matches(model, kind):
        yield match.piece(match.join([files.read(name) for name in match.names]).to(dtype))
    yield from even_loads(model)


def check_files(files: ModelFiles, model: ModelConfig, kind: str) -> torch.dtype:
    """The type that holds every tensor of the files without loss: bf16 where all are, else fp32.

    Raises UserError, naming a tensor, unless they hold what config.json speaks of, and no more.
    """
    wanted = {
        name: shape for match in matches(model, kind) for name, shape in match.shapes().items()
    }
    for name, shape in wanted.items():
        if name not in files.file_of:
            hint = "; is tie_word_embeddings to be true?" if name == HEAD else ""
            raise UserError(f"{files.folder} lacks {name}, which its config.json asks for{hint}")
        if files.shape(name) != shape:
            raise UserError(
                f"{files.folder / files.file_of[name]}: {name} is {_by(files.shape(name))} and "
                f"{_by(shape)} by config.json; copy both again from one model"
            )
    for name in sorted(files.file_of.keys() - wanted.keys()):
        if name == HEAD:
            _check_tied(files)
        elif not name.endswith(NOT_WEIGHTS):
            raise UserError(
                f"{files.folder / files.file_of[name]}: {name} has no place in a model of its "
                "config.json; copy both again from one model"
            )
    dtypes = {files.dtype(name) for name in wanted}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


def _check_tied(files: ModelFiles) -> None:
    """Some folders keep a copy of a tied output head; it must be one."""
    if not torch.equal(files.read(EMBEDDING), files.read(HEAD)):
        raise UserError(
            f"{files.folder}: tie_word_embeddings is true, but {HEAD} is another matrix than "
            f"{EMBEDDING}; set tie_word_embeddings to false in config.json"
        )


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))


def export_shapes(model: ModelConfig, kind: str) -> dict[str, Shape]:
    """Shapes of the tensors that `export_tensors` gives, by name and in its order."""
    return {name: shape for match in matches(model, kind) for name, shape in match.shapes().items()}


def export_tensors(
    stored: Tensors, model: ModelConfig, kind: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Their tensors by name, from the boxes of our checkpoint, one of one layer at a time.

    Raises UserError where the checkpoint is not of this model.
    """
    shapes = stored.shapes
    refuse_closed_layers(stored)
    for match in matches(model, kind):
        rows = sum(match.rows)
        held = shapes.get(match.key, ())
        fits = held[: len(match.stack)] == match.stack and held[len(match.stack) + 1 :] == match.row
        if not fits or held[len(match.stack)] < rows:
            raise UserError(
                f"checkpoint {stored.found.folder}: {match.key} is {_by(held) or 'absent'}, which "
                "is not of the model that its manifest speaks of"
            )
        box = (1,) * len(match.stack) + (rows,)
        joined = stored.read(match.key, match.place, box).reshape(rows, *match.row)
        yield from zip(match.names, match.split(joined), strict=True)
