"""Memory of activations, counted without building the model or running it.

Counts are those of the CUDA path: fused RMSNorm and SwiGLU, flash attention. A test runs a small
model and counts what autograd keeps. All functions want a finalized config.
"""

from __future__ import annotations

from megascale.config import Layout, ModelConfig, RunConfig
from megascale.model.counts import (
    attentions,
    known,
    logits_per_token,
    loss_chunk_tokens,
    padded_vocab_size,
)

FP32_BYTES = 4


def activation_bytes(config: RunConfig, layout: Layout, stage: int) -> int:
    """Bytes of activations at the peak of a micro-batch of full capacity, by pipeline stage.

    Under 1F1B a stage holds one micro-batch for itself and one for each stage after it. Of each it
    keeps `layer_activation_bytes` in every layer, and `chunk_bytes`. With chunks every stage may
    hold what the first does, since also the last one holds all chunks of a wave. Beside these the
    larger of two counts: on the last stage the peak of the output head, `head_bytes`; then
    gradients in the backward pass of a layer, with recomputation and what the layer does not keep,
    which comes back.

    An 8B model (32 layers of 4096, 32 heads and 8 groups of 128, feed-forward 14336, 128,256
    ids) at 16,384 tokens in bf16: 139,400 bytes per token in each layer are 68.1 GiB, and the head
    takes 2.8. Under full recomputation 8,192 bytes per token in each layer are 4.0 GiB, and one
    layer that is computed again takes 3.1 with its gradients.
    """
    tokens = known(config.planner.capacity_tokens)
    num_layers = config.model.num_layers // layout.pipeline
    in_flight = layout.pipeline - (stage if config.planner.chunks == 1 else 0)
    per_token = layer_activation_bytes(config, layout) + chunk_bytes(config, layout)
    kept = in_flight * num_layers * per_token
    return tokens * kept + _beside_kept(config, layout, stage)


def _beside_kept(config: RunConfig, layout: Layout, stage: int) -> int:
    """The peak of what comes and goes beside what layers keep: the head's, or a layer's."""
    layer = _gradient_bytes(config, layout) + _recomputed_bytes(config, layout)
    head = head_bytes(config, layout) if stage == layout.pipeline - 1 else 0
    return max(head, known(config.planner.capacity_tokens) * layer)


def _recomputed_bytes(config: RunConfig, layout: Layout) -> int:
    """Per token, what recomputation makes again in one layer."""
    if config.train.recompute == "none":
        return 0
    kept = layer_activation_bytes(config, layout) if config.train.recompute == "selective" else 0
    return _layer_bytes(config, layout) - kept


def _gradient_bytes(config: RunConfig, layout: Layout) -> int:
    """Gradients at the peak of a layer's backward pass, per token: of SwiGLU's two inputs and of
    the residual stream; with experts also of the tokens that they get. The gradient of SwiGLU's
    output takes the place that the output has left."""
    model, element = config.model, _element_bytes(config)
    if model.moe is None:
        inner = 2 * known(model.ffn_hidden_size)
    else:
        routed = 2 * known(model.moe.ffn_hidden_size) + model.hidden_size
        inner = max(model.moe.top_k * routed, 2 * model.moe.shared_ffn_hidden_size)
    residual = model.hidden_size // _hidden_cut(config, layout)
    return (inner // layout.tensor + residual) * element


def layer_activation_bytes(config: RunConfig, layout: Layout) -> int:
    """Bytes that one layer keeps per token between forward and backward.

    Under full recomputation that is its input alone. Else see `_layer_bytes`.
    """
    if config.train.recompute == "full":
        return _element_bytes(config) * (config.model.hidden_size // _hidden_cut(config, layout))
    return _layer_bytes(config, layout, config.recomputed_parts)


def chunk_bytes(config: RunConfig, layout: Layout) -> int:
    """Bytes that one layer keeps per token for later chunks of a sequence, beside its activations.

    The sum of the gradients of keys and values, in fp32. Under full recomputation also these
    themselves, which are not among the activations then, unless they wait in host memory. 0 where
    plans have no chunks. With 8 groups of 128 in bf16 under full recomputation: 12,288 bytes.
    """
    if config.planner.chunks == 1:
        return 0
    kept = FP32_BYTES
    if config.train.recompute == "full" and config.planner.chunk_cache == "device":
        kept += _element_bytes(config)
    model = config.model
    groups, size = known(model.num_kv_heads), known(model.head_dim)
    return attentions(model) * 2 * groups * size * kept // layout.tensor


def head_bytes(config: RunConfig, layout: Layout) -> int:
    """Bytes at the peak of the output head, while the loss of a full micro-batch is computed.

    Per token: input and output of the last norm, and the gradient of the output. The last two are
    whole on every tensor rank, so sequence parallelism gathers an output beside its own part. Per
    token of a chunk: logits, whose place their gradient takes, and the output times the loss mask.
    Once: the gradient of the output weights in fp32. See `model.linear_cross_entropy`.
    """
    model, element, cut = config.model, _element_bytes(config), _hidden_cut(config, layout)
    width = model.hidden_size
    hidden = (2 * width // cut + (2 if cut > 1 else 1) * width) * element
    logits = logits_per_token(model, layout.tensor) // layout.tensor
    tokens = known(config.planner.capacity_tokens)
    chunk = min(tokens, loss_chunk_tokens(logits, element))
    weights = padded_vocab_size(model, layout.tensor) // layout.tensor * width * FP32_BYTES
    return tokens * hidden + chunk * (logits + width) * element + weights


def ring_peak_bytes(config: RunConfig, layout: Layout, stage: int) -> int:
    """What rings add to the peak of `activation_bytes`.

    Their buffers come in the backward pass of attention. The head's memory is free by then, and so
    is what the feed-forward part of the layer kept. For most dense models that is more than the
    buffers, and rings add nothing.
    """
    buffers = ring_buffer_bytes(config, layout)
    if not buffers:
        return 0
    model, element = config.model, _element_bytes(config)
    free = _feed_forward_bytes(model, element, frozenset()) // layout.tensor
    gradients = 2 * model.hidden_size * element  # of the residual stream and of attention's output
    layer = _recomputed_bytes(config, layout) + gradients - free
    peak = buffers + known(config.planner.capacity_tokens) * layer
    return max(0, peak - _beside_kept(config, layout, stage))


def ring_buffer_bytes(config: RunConfig, layout: Layout) -> int:
    """Bytes of buffers in which one layer's backward pass over a full share of a ring adds up.

    Per token: the gradient of queries in fp32 and a hop's part of it; four buffers of the
    gradients of keys and values in fp32 (own, this hop's, coming, going); keys and values twice
    (at hand, coming). A chunk has the keys and values of the chunks before it there too: as many
    tokens as a rank holds at a time. With 32 heads and 8 groups of 128 in bf16 these are 65,536
    bytes, 0.5 GiB per 8,192 tokens. 0 where no sequence is shared and plans have no chunks.
    """
    has_chunks = config.planner.chunks > 1
    if config.planner.name == "longest_first" or (layout.hdp == 1 and not has_chunks):
        return 0
    model, element = config.model, _element_bytes(config)
    queries = model.num_heads * (FP32_BYTES + element)
    keys_and_values = known(model.num_kv_heads) * (4 * 2 * FP32_BYTES + 2 * 2 * element)
    keys_and_values *= layout.pipeline if has_chunks else 1
    per_token = (queries + keys_and_values) * known(model.head_dim) // layout.tensor
    return known(config.planner.capacity_tokens) * per_token


def _layer_bytes(
    config: RunConfig, layout: Layout, recomputed: frozenset[str] = frozenset()
) -> int:
    """What the operations of one layer keep per token for their backward pass.

    Outputs of the parts in `recomputed` are not kept: of norms, and of SwiGLU.

    In elements of the precision: inputs and outputs of the norms, 4 hidden (2 in a parallel
    block); queries and keys after the rotary embedding, values and output, (2 heads + 2 groups) of
    a head's size; SwiGLU's two inputs and its output, 3 feed-forward. Norms of queries and keys
    keep queries before them, and for the keys the product that has the values too: another (2 heads
    + groups). Norms over all heads keep their inputs in fp32, (heads + 2 groups), and their outputs
    before the weights, (heads + groups). Beside these in bytes: a norm's and a head's fp32 scalars.
    The rotary tables are those of the micro-batch.
    """
    model, element = config.model, _element_bytes(config)
    norms = 1 if model.parallel_block else 2
    states = norms if "norms" in recomputed else 2 * norms
    hidden = states * model.hidden_size * element + norms * FP32_BYTES
    heads, groups, size = model.num_heads, known(model.num_kv_heads), known(model.head_dim)
    attention = 2 * (heads + groups) * size * element + heads * FP32_BYTES
    if model.qk_norm and model.qk_norm_heads == "each":
        attention += (2 * heads + groups) * size * element + (heads + groups) * FP32_BYTES
    elif model.qk_norm:
        attention += ((heads + 2 * groups) * FP32_BYTES + (heads + groups) * element) * size
    cut = attentions(model) * attention + _feed_forward_bytes(model, element, recomputed)
    whole = _router_bytes(model, element)
    return hidden // _hidden_cut(config, layout) + cut // layout.tensor + whole


def _feed_forward_bytes(
    model: ModelConfig, element: int, recomputed: frozenset[str] = frozenset()
) -> int:
    """SwiGLU of a dense layer, or of a token's experts with the tokens that they get."""
    plain, of_experts = (2 if part in recomputed else 3 for part in ("swiglu", "experts"))
    if model.moe is None:
        return plain * known(model.ffn_hidden_size) * element
    routed = model.moe.top_k * (of_experts * known(model.moe.ffn_hidden_size) + model.hidden_size)
    return (routed + plain * model.moe.shared_ffn_hidden_size) * element


def _router_bytes(model: ModelConfig, element: int) -> int:
    """Scores, probabilities and masks of all experts; numbers, weights and places of the chosen.

    A gate of the shared expert keeps this expert's output and its weight. Several attentions keep
    their outputs, and what mixes them in fp32.
    """
    moe = model.moe
    if moe is None:
        return 0
    kept = 9 * moe.num_experts + 24 * moe.top_k
    if moe.shared_gate:
        kept += (model.hidden_size + 1) * element
    if moe.attention_experts > 1:
        kept += moe.attention_experts * model.hidden_size * element
        kept += moe.attention_experts * (FP32_BYTES + element) + model.hidden_size * FP32_BYTES
    return kept


def _element_bytes(config: RunConfig) -> int:
    return 2 if config.train.precision == "bf16" else FP32_BYTES


def _hidden_cut(config: RunConfig, layout: Layout) -> int:
    return layout.tensor if config.parallel.sequence_parallel else 1
