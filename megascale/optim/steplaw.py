"""Step Law: the learning rate and batch size that suit a model and a number of tokens.

Li et al., "Predictable Scale: Part I", arXiv 2503.04715. N is the number of parameters without
vocabulary (embedding and head), D that of training tokens. For experts N counts all of them: over
the 16 settings that the authors released, the loss at the law's rate and batch is then 0.16 % above
the best of their grid, against 1.00 % with the active ones.
"""

from __future__ import annotations

from dataclasses import replace

from megascale.config import DataConfig, OptimConfig, RunConfig, finalize
from megascale.errors import UserError
from megascale.model.counts import count_parameters

FINAL_LR = 1e-5
"""Last rate of every run that the law was fitted to; ending at a tenth of the peak shifts it."""
FITTED_PARAMETERS = (60e6, 1.1e9)
FITTED_EXPERT_PARAMETERS = (60e6, 2.2e9)
"""Of models with experts; those that the authors released are of 2.15e9."""
FITTED_TOKENS = (2e9, 1e11)


def peak_lr(parameters: int, tokens: int) -> float:
    """1.79 N^-0.713 D^0.307 to four digits, which is more than the law knows."""
    return float(f"{1.79 * parameters**-0.713 * tokens**0.307:.4g}")


def batch_tokens(tokens: int) -> int:
    """0.58 D^0.571, tokens of a global batch; at least 1."""
    batch: float = 0.58 * tokens**0.571
    return max(1, round(batch))


def fitted_range(has_experts: bool) -> str:
    """Where the law was fitted, in words."""
    least, most = map(_short, FITTED_EXPERT_PARAMETERS if has_experts else FITTED_PARAMETERS)
    fewest, longest = map(_short, FITTED_TOKENS)
    return f"{least} to {most} parameters and {fewest} to {longest} tokens"


def is_fitted(parameters: int, tokens: int, has_experts: bool) -> bool:
    """Whether N and D lie in that range."""
    least, most = FITTED_EXPERT_PARAMETERS if has_experts else FITTED_PARAMETERS
    return least <= parameters <= most and FITTED_TOKENS[0] <= tokens <= FITTED_TOKENS[1]


def _short(count: float) -> str:
    return f"{count / 1e9:g}B" if count >= 1e9 else f"{count / 1e6:g}M"


def resolve(config: RunConfig) -> RunConfig:
    """`config` with numbers where `optim.lr` and `data.global_batch_tokens` say `steplaw`.

    With the rate, `optim.min_lr` becomes 1e-5 unless it is given. Needs no corpus; `finalize`
    comes after. Raises UserError where the rest of the config cannot work.
    """
    optim, data, tokens = config.optim, config.data, config.train.tokens
    if isinstance(optim.lr, str):
        if optim.curve == "anneal":
            raise UserError(
                "optim.curve=anneal goes on from the rate of a constant phase, which the Step Law "
                "does not know; set optim.lr to the last rate of the checkpoint's run"
            )
        lr = peak_lr(_parameters(config), tokens)
        has_end = optim.curve != "constant"
        min_lr = FINAL_LR if optim.min_lr is None and has_end else optim.min_lr
        optim = replace(optim, lr=lr, min_lr=min_lr)
    if isinstance(data.global_batch_tokens, str):
        data = replace(data, global_batch_tokens=batch_tokens(tokens))
    return replace(config, optim=optim, data=data)


def _parameters(config: RunConfig) -> int:
    """N of the model, whose vocabulary need not be known."""
    batch = DataConfig.global_batch_tokens
    plain = replace(
        config, optim=OptimConfig(), data=replace(config.data, global_batch_tokens=batch)
    )
    ones = dict.fromkeys(config.data.sources, 1)
    return count_parameters(finalize(plain, ones, config.model.vocab_size or 1).model).non_embedding
