"""A checkpoint's model as lm-eval asks it."""

from __future__ import annotations

from typing import Any

from megascale.convert.score_text import TextScorer
from megascale.errors import UserError

MOST_TOKENS = 256
"""Of a continuation whose task says nothing, as lm-eval has it."""
LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which a task may say it; lm-eval takes the first that is there."""


def lm_eval_model(scorer: TextScorer) -> Any:
    """`scorer` as a model of lm-eval."""
    from lm_eval.api.model import LM

    class CheckpointModel(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            judged = scorer.continuations([request.args for request in requests])
            return [(one.log_likelihood, one.is_greedy) for one in judged]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return [scorer.whole(request.args[0]) for request in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return [_generate(scorer, *request.args) for request in requests]

    return CheckpointModel()


def _generate(scorer: TextScorer, prompt: str, options: dict[str, Any]) -> str:
    sampled = options.get("do_sample")
    if options.get("temperature") if sampled is None else sampled:
        raise UserError("a task asks for sampled text; megascale eval continues greedily only")
    stops = options.get("until") or []
    given = (options[name] for name in LENGTH_OPTIONS if options.get(name) is not None)
    most = int(next(given, MOST_TOKENS))
    return scorer.generate(prompt, [stops] if isinstance(stops, str) else stops, most)
