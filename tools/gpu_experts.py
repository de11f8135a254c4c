"""A mixture of 64 experts on one GPU, as the model runs it, against experts one by one."""

from __future__ import annotations

from typing import Any

import torch
from gpu_rows import Rows
from gpu_scene import SMALL_TOKENS, config_of, learning, micro_batch, run, seconds, step
from gpu_training import MICRO_BATCHES, add_utilisation, experts_model
from torch.autograd import DeviceType
from torch.nn.functional import linear, silu
from torch.profiler import ProfilerActivity, profile


def experts_step(rows: Rows) -> None:
    """Training step of 64 experts."""
    tokens = num_tokens(rows)
    with learning(config_of(experts_model(rows, 4), tokens)) as learner:
        config, device = learner.config, learner.ranks.device
        batches = [micro_batch(config, device, [tokens]) for _ in range(MICRO_BATCHES)]
        taken = seconds(lambda: step(learner, batches), device, repeats=3)
    add_utilisation(rows, "64 experts, 8 a token", config, tokens, taken, 30)


def launches(rows: Rows) -> None:
    """Kernels of a layer of 64 experts."""
    few, many = (kernels_of(rows, layers) for layers in (2, 4))
    least = None if rows.small else 1
    rows.add("64 experts: kernels of a layer", (many - few) / 2, "", least, 120, True)


def kernels_of(rows: Rows, layers: int) -> int:
    """Kernels that a micro-batch starts on the device, forward and backward."""
    tokens = num_tokens(rows)
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with learning(config_of(experts_model(rows, layers), tokens)) as learner:
        batches = [micro_batch(learner.config, learner.ranks.device, [tokens])]
        run(learner, batches)
        with profile(activities=kinds) as profiler:
            run(learner, batches)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        events = profiler.events() or ()
        return sum(
            event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
            for event in events
        )


def grouped_against_single(rows: Rows) -> None:
    """Experts of the model against experts one by one."""
    tokens = num_tokens(rows)
    with learning(config_of(experts_model(rows, 2), tokens)) as learner:
        config, device = learner.config, learner.ranks.device
        assert learner.model.balance is not None
        learner.model.balance.begin(1, tokens)
        (layer,) = learner.model.offloader.layers[:1]
        layer.mlp.router.segments = micro_batch(config, device, [tokens]).segments
        width = config.model.hidden_size
        dtype = next(layer.mlp.experts.parameters()).dtype
        given = torch.randn(tokens, 1, width, device=device, dtype=dtype, requires_grad=True)

        def both_passes() -> None:
            output, _ = layer.mlp(given)
            output.sum().backward()
            given.grad = None

        ours = seconds(both_passes, device)
        layer.mlp.experts = OneByOne(config.model, device, dtype)
        single = seconds(both_passes, device)
    rows.add("64 experts one by one, forward and backward", 1e3 * single, "ms")
    rows.add("speed of the model's experts over one by one", single / ours, "times", 4, None, True)


class OneByOne(torch.nn.Module):
    """SwiGLU experts as a loop with two products each, in the place of the model's."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        width, inner = model.hidden_size, model.moe.ffn_hidden_size

        def weights(rows: int, columns: int) -> torch.nn.ParameterList:
            return torch.nn.ParameterList(
                torch.randn(rows, columns, device=device, dtype=dtype) / columns**0.5
                for _ in range(model.moe.num_experts)
            )

        self.up, self.down = weights(2 * inner, width), weights(width, inner)

    def forward(
        self, tokens_ND: torch.Tensor, per_expert: torch.Tensor, weights_N: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, None]:
        """The interface of megatron-core's experts: tokens in the order of experts, how many each
        expert has, and the weight of each token; (N, D), and no bias."""
        outputs, counts = [], per_expert.tolist()
        parts = zip(tokens_ND.split(counts), weights_N.flatten().split(counts), strict=True)
        for (tokens, scale), up, down in zip(parts, self.up, self.down, strict=True):
            first, second = linear(tokens, up).chunk(2, dim=-1)
            gated = silu(first) * second * scale[:, None].to(tokens.dtype)
            outputs.append(linear(gated, down))
        return torch.cat(outputs), None


def num_tokens(rows: Rows) -> int:
    """Of a micro-batch."""
    return SMALL_TOKENS if rows.small else 8192
