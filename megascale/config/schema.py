"""Every option of a run, with its meaning, its unit and the reason for its default.

Whole-number fields also take a suffix: `20M` is 20,000,000 and `8Ki` is 8,192.
A field whose default is None is derived (see `derive.finalize`) unless its docstring says
that None switches something off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from megascale.config.optimizers import OPTIMIZERS

ByLawFloat = Annotated[float, "steplaw"]
ByLawInt = Annotated[int, "steplaw"]
"""A number, or the word `steplaw` for it until `optim.steplaw.resolve` has put the number there."""
ByDeviceInt = Annotated[int, "auto"]
"""A number, or the word `auto` for it until `run.auto_capacity` has put the number there, once the
layout and the device are known."""


class NameOf:
    """In an annotation of text: it must be a name of this table."""

    def __init__(self, table: Mapping[str, object]) -> None:
        self.table = table


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts in place of the dense feed-forward part of every layer."""

    num_experts: int = 8
    """Experts per layer. Must be divisible by `parallel.expert`."""
    top_k: int = 2
    """Experts that each token visits. With 1 the expert is weighted by its probability (as in
    Switch Transformer), because otherwise only the balance loss would train the router."""
    normalize_top_k: bool = True
    """The weights of a token's experts sum to 1. If false, they are probabilities over all experts,
    as in Qwen2-MoE."""
    ffn_hidden_size: int | None = None
    """Hidden size of one expert. Default: the dense `ffn_hidden_size` over `top_k`, so that a
    token costs what it costs in the dense model."""
    shared_ffn_hidden_size: int = 0
    """Hidden size of the expert that every token visits; 0 means none."""
    shared_gate: bool = False
    """Weigh the shared expert by a sigmoid that each token computes (Qwen2-MoE)."""
    attention_experts: int = 1
    """Attentions per layer, all of which see every token; their outputs are mixed by a router
    (BAM, arXiv 2408.08274). 1 is plain attention."""
    dispatcher: Literal["allgather", "alltoall"] = "alltoall"
    """How tokens reach their experts. `alltoall` moves only the routed tokens."""
    balance: Literal["global", "micro", "sequence", "loss_free", "none"] = "global"
    """What is balanced over the experts. `global`: their use over the global batch, so that experts
    may specialise, and the result does not depend on how the batch was cut. `micro`: their use
    over every micro-batch. `sequence`: their use over every sequence, or over each of its
    chunks. `loss_free`: no loss; a bias of each expert steers the choice. `none`: nothing."""
    balance_weight: float = 0.008
    """Weight of the balance loss. The loss is 1 where use is even. The default is the paper's."""
    balance_weights: tuple[float, ...] | None = None
    """Weight of the balance loss in each layer, a list. None: `balance_weight` in all layers."""
    micro_share: float = 0.0
    """With `balance: global`, the weight of an additional balance loss over every micro-batch, as a
    part of `balance_weight`. The paper has 0.01, which evens out the time that experts take."""
    estimate: Literal[
        "trend", "previous", "previous_corrected", "buffer", "buffer_corrected", "exact"
    ] = "trend"
    """The load of the whole global batch is known only after all of it was routed. This says which
    load is used until then. `previous`: the load of the batch before. `trend`: `previous` plus its
    change from the batch before that, so that the next step makes up for what this step does not
    know. `buffer`: the load of this rank's micro-batches so far (the paper's way, without the
    message per micro-batch, which ranks with unequal numbers of micro-batches cannot exchange).
    `previous_corrected` and `buffer_corrected`: the last micro-batch makes up for what earlier
    micro-batches did not know. `exact`: the load from a pass without gradients before, which costs
    about a third more time.

    Why `trend`: besides `previous` and `exact`, only `trend` does not depend on the plan, and it
    needs no message. A rank's own counts are near while the rank sees many sequences (0.01 of the
    gradient on 2 ranks). With one or two short sequences in a micro-batch, as where a thousand
    ranks share a batch, they are off by 0.6 to 1.4 once experts specialise, always in the same
    direction. The mean of 10 steps is off by 0.6 to 1.8, that of `previous` by 0.27 and that of
    `trend` by 0.09 (131,072 tokens, step 240). Trained under `trend`, use is also nearer to the use
    under `exact`. With small batches and in the first steps of a high learning rate `trend` is off
    by more than `previous` in a single step (1.2 to 0.8 and 0.9).
    `python tools/bench.py estimates`, `configs/results/balance_estimates.json`."""
    bias_rate: float = 1e-3
    """With `balance: loss_free`, the change of a bias in a step."""
    z_loss_coeff: float = 0.0
    """Weight of the router z-loss, which keeps router logits small."""

    def layer_weight(self, layer: int) -> float:
        """Weight of the balance loss in a layer, which are numbered from 1."""
        if self.balance_weights is None:
            return self.balance_weight
        return self.balance_weights[layer - 1]


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Slower rotary angles for contexts longer than those of pretraining.

    `llama3` (Llama 3.1): pairs that turn more than `high_turns` times in the original context stay
    as they are, those that turn less than `low_turns` times turn `factor` times more slowly, and
    between the two the change is gradual in turns. `yarn` (arXiv 2309.00071): the same, gradual in
    the number of the pair, and cosines and sines are multiplied by `attention_factor`, which
    sharpens attention. `linear`: all pairs turn `factor` times more slowly (arXiv 2306.15595).
    """

    kind: Literal["llama3", "yarn", "linear"] = "llama3"
    """Which pairs are slowed."""
    factor: float = 8.0
    """How many times more slowly pairs turn."""
    low_turns: float = 1.0
    """Turns below which a pair is slowed by the whole factor. `linear` has no use for it."""
    high_turns: float | None = None
    """Turns above which a pair is not slowed. Default: 4 for `llama3`, 32 for `yarn`."""
    original_tokens: int = 8192
    """The context in which turns are counted."""
    attention_factor: float | None = None
    """For `yarn`: factor of cosines and sines. Default: 0.1 ln(`factor`) + 1."""
    whole_pairs: bool = True
    """For `yarn`: the change begins and ends at a whole number of a pair."""

    @property
    def kept_turns(self) -> float:
        """`high_turns`, or its default."""
        if self.high_turns is not None:
            return self.high_turns
        return 32.0 if self.kind == "yarn" else 4.0

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0


AttentionKind = Literal["full", "sliding", "full_nope", "sliding_nope"]


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer."""

    window: int | None
    """Tokens that a query sees, itself included; None means the whole past."""
    rotary: tuple[float, RopeScalingConfig | None] | None
    """Base of the rotary angles, and their scaling; None means no rotary embedding."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer."""

    num_layers: int = 4
    """Transformer layers. Must be divisible by `parallel.pipeline`."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_heads: int = 4
    """Query heads. Must be divisible by `parallel.tensor`."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention). Default: `num_heads`."""
    head_dim: int | None = None
    """Size of one head; even, because rotary embeddings turn pairs.
    Default: `hidden_size / num_heads`."""
    ffn_hidden_size: int | None = None
    """Hidden size of the SwiGLU part. Default: 8/3 of `hidden_size`, up to a multiple of 64."""
    vocab_size: int | None = None
    """Token ids the model knows. Default: the largest vocabulary among the corpora."""
    vocab_multiple: int = 128
    """The embedding has a multiple of this (and of `parallel.tensor`) of rows, which suits matrix
    units. The added rows belong to no id: they have probability 0 in every softmax, and are not
    saved. So this changes no model, and may change at a resume."""
    tied_embeddings: bool = True
    """Share the input embedding with the output head; saves parameters in small models."""
    rope_base: float = 10000.0
    """Base of the rotary angles; raise it for long contexts."""
    rope_scaling: RopeScalingConfig | None = None
    """Slower angles for longer contexts. None: as `rope_base` says."""
    local_rope_base: float | None = None
    """Base of the rotary angles of layers with a sliding window, which have no `rope_scaling`
    then (as in Gemma 3 and OLMo 3). None: the same angles in all layers."""
    attention_pattern: tuple[AttentionKind, ...] = ()
    """Attention of the layers in turn, from the first on, again and again: `full`, `sliding`, and
    with `_nope` the same without rotary embedding. SmolLM3 is `[full, full, full, full_nope]`.
    Default: `sliding` where `sliding_window` is set, else `full`."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    qk_norm: bool = False
    """Normalise queries and keys before the rotary embedding (as Qwen3 does)."""
    qk_norm_heads: Literal["each", "all"] = "each"
    """Over what `qk_norm` goes: each head, or all heads together (as in OLMo 2)."""
    norm_position: Literal["before", "after"] = "before"
    """Where the two norms of a layer are: before attention and feed-forward part, or after them,
    on what they add to the residual stream (as in OLMo 2). `after` needs a dense model."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values (as Qwen2 does)."""
    parallel_block: bool = False
    """y = x + MLP(LN x) + Attention(LN x), one norm per layer (MegaScale section 3.1)."""
    sliding_window: int | None = None
    """Tokens that a query sees, itself included; None means the whole past. With
    `attention_pattern`, those of its layers with a window."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections are scaled by 1/sqrt(2 layers)."""
    moe: MoeConfig | None = None
    """Mixture of experts; None means dense."""
    mask_tokens: int | None = None
    """Tokens over which the layers that `megascale grow --operator random` has added open. Each is
    y = x + m (layer(x) - x), where m goes from 0 to 1. The checkpoint has the value of m, so that
    resumes and branches go on from it. None: no layer is masked. This option comes with the
    checkpoint. It has no effect on a model that begins with random weights."""
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers of megatron-core's own (`local`) or Transformer Engine's; `auto` takes the latter
    on CUDA where it is installed."""

    def attention_kind(self, layer: int) -> AttentionKind:
        """The kind of attention of a layer, which are numbered from 1."""
        if self.attention_pattern:
            return self.attention_pattern[(layer - 1) % len(self.attention_pattern)]
        return "full" if self.sliding_window is None else "sliding"

    def attention_of(self, layer: int) -> LayerAttention:
        """The attention of a layer, which are numbered from 1."""
        kind = self.attention_kind(layer)
        slides = kind.startswith("sliding")
        window = self.sliding_window if slides else None
        if kind.endswith("_nope"):
            return LayerAttention(window, None)
        if slides and self.local_rope_base is not None:
            return LayerAttention(window, (self.local_rope_base, None))
        return LayerAttention(window, (self.rope_base, self.rope_scaling))


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is cut over ranks; all ranks left over form the HDP axis."""

    tensor: int = 1
    """Ranks that share each matrix."""
    pipeline: int = 1
    """Pipeline stages."""
    expert: int = 1
    """Ranks of the HDP axis over which the experts of a layer are spread."""
    sequence_parallel: bool | None = None
    """Split norms and residuals over the tensor ranks. Default: on when `tensor` > 1."""
    overlap: bool = True
    """On CUDA, reduce gradients during the backward pass of each rank's last micro-batch, in steps
    where no rank ends with a ring, and gather weights during the forward pass. CPU ranks do not
    overlap. False: reduce and gather between steps."""


ORDER_VERSION = 1
"""Of the order in which a run reads documents (`corpus.shuffle`, `corpus.pieces`). A change of that
order must raise it, so that no run is resumed, replayed or continued in another order."""


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """What one run has read of a source: the first pieces of what earlier runs had left, shuffled.
    A reading of 0 pieces stands for `start.data: restart`: later readings were made as if nothing
    had been read before. Written by megascale, not by hand.
    """

    name: str
    """The run's name of the source. The order of reading depends on it."""
    seed: int
    """Seed of the run."""
    context_tokens: int
    """`data.context_tokens` of the run, which decides where documents were cut."""
    pieces: int
    """Pieces of documents that the run read."""
    order: int = 1
    """`ORDER_VERSION` of the megascale that read them."""


@dataclass(frozen=True, kw_only=True)
class EarlierConfig:
    """All that earlier runs have read of a source. Written by megascale, not by hand."""

    reads: tuple[ReadConfig, ...]
    """The readings, the first run first."""
    tokens: int
    """Loss tokens of these readings."""
    held: str
    """The content of the source then. If it holds other text now, it is not continued or
    replayed."""


@dataclass(frozen=True, kw_only=True)
class FillInMiddleConfig:
    """Reading documents as prefix, suffix and then middle, so that a model learns to fill in."""

    rate: float = 0.5
    """Share of the blocks that are transformed, from 0 to 1. A block is at most `block_tokens` of
    one document. Blocks of fewer than 8 tokens never are, and held-out documents never are."""
    spm: float = 0.5
    """Share of the transformed blocks in the order suffix, prefix, middle (SPM), from 0 to 1. The
    others have prefix, suffix, middle (PSM)."""
    block_tokens: int | None = None
    """Most tokens of a block, with its three sentinels. Default: `data.context_tokens`."""
    prefix_id: int | None = None
    """Id of the sentinel before the prefix. None: that of the tokenizer. The three ids are given
    together or left out together."""
    suffix_id: int | None = None
    """Id of the sentinel before the suffix."""
    middle_id: int | None = None
    """Id of the sentinel before the middle."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One prepared corpus."""

    path: str
    """Folder made by `megascale prepare`, or the prefix of a Megatron `.bin` / `.idx` pair."""
    heldout: str | None = None
    """Prefix of held-out shards for evaluation, only for Megatron prefixes. A prepared folder has
    its own. None, with a Megatron prefix: this source is not evaluated."""
    vocab_size: int | None = None
    """Vocabulary of a bare Megatron prefix, which does not store one; a prepared folder does."""
    eod_id: int | None = None
    """Id of the end-of-document token of a bare Megatron prefix; a prepared folder stores it."""
    bos_id: int | None = None
    """Id that is the input before the first token of every document of a bare Megatron prefix. It
    is not stored there and is no target. None: `eod_id`. A prepared folder stores its own."""
    min_document_tokens: int = 0
    """Shorter training documents of this corpus are not read. Several sources may read documents of
    other lengths from the same corpus, so that a blend decides the shares of short and long
    documents."""
    max_document_tokens: int | None = None
    """Longer training documents of this corpus are not read. None: there is no limit. Held-out
    documents of every length are evaluated, once where sources share them."""
    fim: FillInMiddleConfig | None = None
    """Fill-in-the-middle, for code. None: documents are read as they are."""
    earlier: EarlierConfig | None = None
    """What the runs before `start.checkpoint` have read of the source. This run reads what they
    have left, and then all of it again. Written by megascale, not by hand."""
    begin: int = 0
    """Pieces, in this run's order, that these earlier runs have read too. Written by megascale."""
    replay: bool = False
    """Read only what `earlier` lists. megascale adds such sources, `replay/NAME`. Their share is
    `data.replay_fraction`."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stretch of training with one blend of sources."""

    tokens: int | None = None
    """Loss tokens of this stage. It lasts to the end of the step that reaches them. None, allowed
    in the last stage only: to the end of the run."""
    blend: dict[str, float] = field(default_factory=dict)
    """Share of the stage's tokens per source name; normalised to sum to 1."""


@dataclass(frozen=True, kw_only=True)
class BatchRampConfig:
    """Batches that grow at the beginning of a run, in proportion to the tokens it has seen."""

    start_tokens: int
    """Loss tokens of the first step, to within one sequence per source."""
    over_tokens: int
    """Loss tokens of the run after which a step has `data.global_batch_tokens`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, in which proportion, cut how."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """The corpora, by a name of your choice."""
    earlier: dict[str, SourceConfig] = field(default_factory=dict)
    """Other corpora that the runs before `start.checkpoint` have read. Written by megascale."""
    stages: tuple[StageConfig, ...] = ()
    """Blends in order. Default: one stage with all sources in proportion to their tokens."""
    context_tokens: int = 1024
    """Longest sequence the model sees; longer documents are split, never dropped."""
    global_batch_tokens: ByLawInt = 32768
    """Loss tokens of one optimizer step, to within one sequence per source. A step takes at least
    one sequence, even if that has more tokens. `steplaw`: the Step Law's value for
    `train.tokens`."""
    batch_ramp: BatchRampConfig | None = None
    """Smaller batches at first: they train as well there, in more steps. The rate follows
    `optim.schedule`, which counts tokens and not steps. None: all batches are equal."""
    replay_fraction: float = 0.0
    """Part of every batch's tokens that is drawn again from what the runs before
    `start.checkpoint` have read, so that less is forgotten. The other sources give that much
    less. 0.05 for similar data, 0.25 for another language (arXiv 2403.08763, section 5.3)."""
    allow_different_tokenizers: bool = False
    """Allow sources of different tokenizers, for example where one tokenizer only adds ids to the
    other. If false, that is an error: the same ids would mean other text."""
    max_epochs: int | None = None
    """Passes allowed over any source. A run that may need more is refused before it starts. None:
    no limit."""


PLANNERS = (
    "hybrid",
    "bytescale",
    "bytescale_naive",
    "flexsp",
    "longest_first",
    "static",
    "static_balanced",
    "static_best",
)
"""Names that `planner.name` may have, apart from those of a user's own planners."""


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """How each step's sequences are laid out on ranks."""

    name: str = "hybrid"
    """`hybrid`: rings of any size, by time and memory. No other planner is as near to the lower
    bound. `longest_first`: whole sequences to the least busy rank. The others are baselines:
    `bytescale`, `bytescale_naive` and `flexsp` are ByteScale's and FlexSP's planners; `static`,
    `static_balanced` and `static_best` are static context parallelism. `module:function` is a
    planner of your own, in a module of the working directory or on the Python path: a function at
    its top that takes a `megascale.planner.Problem` and returns a `StepPlan`."""
    capacity_tokens: ByDeviceInt | None = None
    """Most tokens one rank holds in one micro-batch; longer sequences are spread over ranks.
    Default: `context_tokens`. `auto`: as many as the device holds, by the memory model of
    `megascale plan --device`, up to an even share of a batch, or the context if that is more. The
    device is that of the run, which must be a GPU, or that of `--device`. A resumed run keeps the
    number."""
    cost: str | None = None
    """Path of a COST.json, as `megascale calibrate` writes it: times of micro-batches measured on
    the machine that trains. None: estimated from the model's shape at an assumed speed."""
    budget_s: float | None = None
    """Seconds that a planner may spend on improving a plan. None: a fixed number of tries, so
    that equal inputs give equal plans. With a number, plans depend on the machine's speed, and
    a resumed run is no longer bit-equal."""
    chunks: int = 1
    """Most chunks into which `hybrid` cuts a micro-batch of a pipeline, where that is faster by
    prediction. Chunks fill a pipeline faster. A later chunk attends to the keys and
    values of the earlier ones. 1: sequences stay whole. More needs `parallel.pipeline` of 2 or
    more."""
    host_copy_bytes_per_s: float | None = None
    """Bytes per second that a rank copies between device and host memory while it computes, in the
    slower direction. With a number, plans may keep part of the activations of long sequences in
    host memory. None: no plan does."""
    chunk_cache: Literal["device", "host"] = "device"
    """Where keys and values of a chunk of sequences wait for the later chunks of these. `host`: in
    host memory. The device then has room for longer sequences, and every later chunk copies them
    back in its forward and in its backward pass."""
    ahead_steps: int = 2
    """Steps that are planned ahead, in a process beside rank 0, while earlier steps train. The
    default is 2, so that training seldom waits for a plan that takes longer than a step."""
    timeout_s: float = 30.0
    """Seconds that one plan may take. After that a faster planner makes the plan, with a
    warning."""
    rank_speeds: Literal["equal", "measured"] = "equal"
    """`measured`: `hybrid` gives less work to a rank that is slow for its work (see
    `monitor.compare_ranks_every_steps`). Plans, and so the rounding of losses, then depend on
    measured speeds. These are saved, so a resumed run plans as the run would have until new
    measurements change them."""


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """One segment of the learning-rate curve."""

    shape: Literal["linear", "cosine", "inverse_sqrt", "exponential", "constant"] = "constant"
    """Shape of the curve from the rate at the previous segment's end (0 at first) to `lr`."""
    tokens: int | None = None
    """Loss tokens of this segment. None, allowed in the last segment only: to the end of the
    run."""
    lr: float = 0.0
    """Rate at the end of the segment. A `constant` segment has this rate throughout."""
    timescale: float = 10.0
    """The constant a of an `inverse_sqrt` segment, which moves as 1/sqrt(1 + a x) while x goes from
    0 to 1. With a larger a the rate moves more early in the segment. The paper has 10."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Annotated[str, NameOf(OPTIMIZERS)] = "adamw"
    """`soap`: Adam in the eigenbasis of Shampoo's preconditioner. It takes fewer steps, and more
    time and memory for each. Its matrices are the weights as one rank holds them: SwiGLU's two
    apart; queries, keys and values as one. So `parallel.tensor` changes what is learned, and a
    resume must keep it."""
    curve: Literal["cosine", "infinite", "wsd", "constant", "anneal"] | None = None
    """The learning rate over tokens seen, by name. `cosine`, the default: warm-up, then half a wave
    to `min_lr`; in a new run that starts from trained weights this re-warms them. `infinite`:
    warm-up, cooldown to `constant_lr`, constant, anneal at the end; a checkpoint of the constant
    phase can go on to any length, or to other data. `wsd`: warm-up, stable at `lr`, anneal at the
    end. `constant`: warm-up, then `lr` for ever. `anneal`: from `lr` straight to `min_lr`, for a
    run that starts from a checkpoint of a constant phase."""
    lr: ByLawFloat | None = None
    """Peak learning rate of the curve. `steplaw`: the Step Law's value for the model and
    `train.tokens`; give a number instead if the run may be lengthened. Default: 3e-4, and 3e-3
    for SOAP. For an `anneal` that starts from a checkpoint: the last rate of the checkpoint's
    run."""
    min_lr: float | None = None
    """Last learning rate of the curve. Default: a tenth of `lr`, or 1e-5 where `lr` is
    `steplaw`, whose authors held it fixed."""
    warmup_tokens: int | None = None
    """Linear warm-up of the curve from 0. Default: 1 % of `train.tokens`."""
    constant_lr: float | None = None
    """Rate of the constant phase of `infinite`. Default: midway between `lr` and `min_lr`."""
    cooldown_tokens: int | None = None
    """Tokens in which `infinite` goes from `lr` to `constant_lr`. Default: 60 % of `train.tokens`.
    If the run may be lengthened, give a number here and for `warmup_tokens`."""
    cooldown_shape: Literal["cosine", "inverse_sqrt"] | None = None
    """Shape of this cooldown. Default: `cosine`."""
    anneal_tokens: int | None = None
    """Last tokens of `train.tokens`, in which `infinite` and `wsd` go to `min_lr`. 0: they stay
    constant. Default: 14 % of `train.tokens` for `infinite`, 10 % for `wsd`."""
    anneal_shape: Literal["exponential", "linear", "cosine"] | None = None
    """Shape of this anneal, and of the curve `anneal`. Default: `exponential`; for `wsd`
    `linear`."""
    schedule: tuple[SegmentConfig, ...] = ()
    """The learning rate as segments over tokens seen, in place of `curve` and its options. Default:
    those of the curve."""
    beta1: float | None = None
    """Decay of the mean of gradients. Default: 0.9, and 0.95 for SOAP."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients, and of SOAP's averages. 0.95 is usual for language
    models."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay; not applied to norms and biases."""
    clip_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches it off."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the HDP axis (ZeRO-1): AdamW's in equal parts, SOAP's by whole
    weights. One rank updates each weight for all ranks."""
    soap_refresh_steps: int = 10
    """Steps of SOAP between two refreshes of its bases."""
    soap_max_dim: int = 10000
    """Dimensions larger than this, such as a vocabulary, get no basis of SOAP. 0: plain Adam for
    all."""
    max_skipped_steps: int = 10
    """Consecutive steps with a non-finite loss or gradient norm after which the run stops."""


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What is done at a loss spike."""

    action: Literal["warn", "skip", "rollback"] = "warn"
    """`warn`: print a warning. `skip`: leave out the update of such a step, so that its data does
    no harm; after `patience_steps` spikes in a row the new losses count as usual. `rollback`: as
    `skip` for single steps. After `patience_steps` spikes (or non-finite losses) in a row, weights,
    optimizer and the record of usual losses go back to a checkpoint before the first of them. If as
    many spikes come again before a newer checkpoint is written, they go back to the checkpoint
    before that one, and so on. Where there is none, the run stops with an error. The data goes on,
    so that the data of the spikes is not read again. No regular checkpoint is written in a step
    with a spike, nor in the `patience_steps` after a rollback."""
    window_steps: int = 100
    """Earlier steps whose losses say what is usual. Spikes are not among them, and a new blend of
    `data.stages` begins a new record. 0: no watch."""
    deviations: float = 8.0
    """A loss is a spike if it lies this many standard deviations above the median of the window.
    The deviation is robust: it comes from the median absolute deviation."""
    patience_steps: int = 10
    """Spikes in a row after which `skip` or `rollback` acts."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and precision of the run."""

    tokens: int = 10_000_000
    """Loss tokens to train on. The last step is the step that reaches this number."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute precision. bf16 keeps fp32 master weights, moments and gradient sums."""
    recompute: Literal["none", "selective", "full"] = "none"
    """`full` keeps only layer inputs and runs each layer again in the backward pass. `selective`
    computes the outputs of cheap operations again (`recompute_parts`); a dense layer keeps about
    two thirds."""
    recompute_parts: tuple[Literal["norms", "swiglu", "experts"], ...] | None = None
    """What `recompute=selective` computes again: `norms` (RMSNorm before attention and feed-forward
    part), `swiglu` (of dense layers and shared experts), `experts` (SwiGLU of routed experts).
    Default: all that the model has."""
    deterministic: bool = False
    """On CUDA use only operations that give the same bits every time, so that a resume is
    bit-equal, as it always is on CPU. Some operations, such as the backward pass of attention, are
    slower. An operation that has no such form is an error."""
    threads: int | None = None
    """CPU threads per rank. Default: cores over ranks on the machine. Ignored on CUDA."""
    stop_after_steps: int | None = None
    """Stop (with a checkpoint) after this step, without a change of the schedule; for smoke tests
    and debugging. None: run to `tokens`."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """What is done at a loss spike."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out loss during training."""

    every_steps: int = 100
    """Steps between evaluations; 0: only at the end."""
    tokens: int = 200_000
    """Held-out tokens that are scored per source, the same tokens at every evaluation. If the
    held-out set has no more, all of it is scored; else parts of documents from all over the set,
    cut at `data.context_tokens` as in training. A part begins and ends where the tokenizer cuts
    neither a character nor a window, so up to one character or window per part is left out: of 10
    tokens that are bytes, 8 are scored if the characters have 4 bytes. 0: none."""
    forgetting_alarm: float | None = None
    """A run with `start.checkpoint` warns if the held-out loss of a source rises by more than this,
    in nats per token, above its value at the start of the run. None: no warning."""
    sample_prompt: str | None = None
    """Text that the trained model continues at the end of the run. None: no sample."""
    sample_tokens: int = 200
    """Length of that sample."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and for how long."""

    save_every_steps: int = 200
    """Steps between checkpoints; 0: only at the end or on a signal."""
    keep_last: int = 2
    """Most recent checkpoints that are kept."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this step are kept for ever. 0: none."""
    async_save: bool = True
    """Copy to host memory, then write in the background while training goes on."""
    emergency_dir: str | None = None
    """Folder on the own disk of every node, or in its memory (/dev/shm/NAME), for a copy of the
    latest state of the node's ranks and of a neighbour's ranks. So the state of a lost node is not
    lost. A resume takes such a copy if it is whole and newer than the last checkpoint. Each node
    keeps two, so it needs 4 times its share of a checkpoint. None: no copies."""
    emergency_every_steps: int = 20
    """Steps between two such copies."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is recorded."""

    log_every_steps: int = 10
    """Steps between console lines. `metrics.jsonl` gets every step."""
    compare_ranks_every_steps: int = 10
    """Steps between two comparisons of how fast the ranks compute. Slow ranks are named, and
    `ranks.jsonl` records the comparisons. 0: none."""
    heartbeats: bool = True
    """Each rank reports its state to the launcher that started it (`megascale launch`), so that a
    hang is noticed. Without a launcher nothing reads the reports."""
    tensorboard: bool = True
    """Write TensorBoard events beside `metrics.jsonl`."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Further trackers. Each package must be installed (`megascale[trackers]`). Threads of their
    own send rows to them; a failure there is one warning. A resumed run continues its run in the
    tracker, by the id in `trackers/` of the run folder. The config is sent as parameters."""
    profile_steps: tuple[int, int] | None = None
    """First and last step recorded with torch.profiler, as a Chrome trace in the run folder.
    None: no profile."""
    memory_snapshot: bool = False
    """Write a CUDA memory snapshot when the run ends or fails; CUDA only."""


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """What a new run begins with. A resumed run goes on from its own checkpoint instead."""

    checkpoint: str | None = None
    """A run_dir (its latest checkpoint) or the folder of one checkpoint, as `megascale grow`
    and `megascale import` write them. The run begins with its weights, in any layout and
    precision. Values that `model` leaves out are taken from it. None: random weights."""
    optimizer: Literal["reset", "keep"] = "reset"
    """What becomes of the checkpoint's optimizer state. `reset`: it is left behind, as in continual
    pretraining between data sets (arXiv 2403.08763). `keep`: it is kept, for runs in which the
    same data and a smooth schedule go on."""
    data: Literal["continue", "restart"] = "continue"
    """Where sources begin that the runs before the checkpoint have read too. `continue`: where
    those runs stopped, so that nothing is read twice before everything has been read. `restart`: at
    their beginning."""


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """A model that begins small and grows (Stacking Your Transformers, arXiv 2405.15319).

    `model` is trained in the run_dir `RUN-base` with this run's schedule, undecayed as in the
    paper, and grown; the run proper then trains the grown model for `train.tokens`, with its
    schedule from the beginning, a new optimizer, and the data that comes next.
    """

    at_tokens: int
    """Loss tokens that `model` is trained on before it grows; `megascale hparams growth` gives
    the paper's advice."""
    operator: Literal["stack", "interpolate", "zero", "random", "width"] = "stack"
    """As in `megascale grow`, whose other operators need a branch: they change what is read, or
    learn on one process."""
    factor: int = 4
    """How many times the layers, or the width."""
    noise: float = 0.0
    """Random part mixed into the matrices of a deepened model."""
    mask_tokens: int | None = None
    """Tokens over which the new layers open. `random` needs a number."""
    optimizer: Literal["drop", "grow"] = "drop"
    """AdamW's moments. `drop`: left behind, as in the paper. `grow`: grown with the weights and
    kept."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    run_dir: str = "runs/default"
    """Folder that holds everything the run writes."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where a device exists."""
    start: StartConfig = field(default_factory=StartConfig)
    """What the run begins with."""
    growth: GrowthConfig | None = None
    """Begin with a smaller model and grow it. None: `model` is trained from the first step."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is cut over ranks."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data that the run reads."""
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    """How a step is laid out."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and precision of the run."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Held-out loss during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved, and for how long."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What is recorded."""

    @property
    def has_auto_capacity(self) -> bool:
        """Whether `planner.capacity_tokens` is still the word `auto`."""
        return isinstance(self.planner.capacity_tokens, str)

    @property
    def pads_to_capacity(self) -> bool:
        """Whether every micro-batch has `planner.capacity_tokens` tokens, which the allgather
        dispatcher of experts needs."""
        return self.model.moe is not None and self.model.moe.dispatcher == "allgather"

    @property
    def recomputable_parts(self) -> frozenset[str]:
        """The values of `train.recompute_parts` that this model has."""
        moe = self.model.moe
        if moe is None:
            return frozenset({"norms", "swiglu"})
        shared = {"swiglu"} if moe.shared_ffn_hidden_size else set()
        return frozenset({"norms", "experts"} | shared)

    @property
    def recomputed_parts(self) -> frozenset[str]:
        """Parts of layers whose outputs the backward pass computes again."""
        if self.train.recompute != "selective":
            return frozenset()
        return frozenset(self.train.recompute_parts or self.recomputable_parts)

    @property
    def run_dirs(self) -> tuple[str, ...]:
        """Folders that the run writes: that of the small model where it grows, then its own."""
        base = (f"{self.run_dir.rstrip('/')}-base",) if self.growth is not None else ()
        return (*base, self.run_dir)
