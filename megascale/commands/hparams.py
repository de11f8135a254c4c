"""`megascale hparams`: what published laws say of a run, before it is configured."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megascale.config.load import whole_number
from megascale.errors import UserError


def add_steplaw_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale hparams steplaw`."""
    add = parser.add_argument
    parameters = "parameters without embedding and output head; of experts, all"
    add("--params", required=True, metavar="N", help=parameters)
    add("--tokens", required=True, metavar="D", help="tokens to train on")
    add("--moe", action="store_true", help="the model has experts")
    add("--json", action="store_true", help="print one JSON object instead")


def run_steplaw(args: argparse.Namespace) -> int:
    """Print the rates and the batch; returns the exit status. Raises UserError for bad input."""
    from megascale.optim import steplaw

    parameters = whole_number(args.params, "--params", 1)
    tokens = whole_number(args.tokens, "--tokens", 1)
    lr, batch = steplaw.peak_lr(parameters, tokens), steplaw.batch_tokens(tokens)
    fitted = steplaw.fitted_range(args.moe)
    if lr <= steplaw.FINAL_LR:
        raise UserError(
            f"--params {args.params} --tokens {args.tokens}: the law gives a peak of {lr:g}, no "
            f"higher than its last rate {steplaw.FINAL_LR:g}; it was fitted on {fitted}"
        )
    is_fitted = steplaw.is_fitted(parameters, tokens, args.moe)
    if args.json:
        value = {"parameters": parameters, "tokens": tokens, "lr": lr}
        value |= {"min_lr": steplaw.FINAL_LR, "global_batch_tokens": batch, "is_fitted": is_fitted}
        return _print_json(value)
    all_of = " of all experts" if args.moe else ""
    print(f"Step Law for {parameters:,} parameters{all_of} without vocabulary, {tokens:,} tokens")
    print(f"  optim.lr                  {lr:g} = 1.79 N^-0.713 D^0.307, the peak")
    print(f"  optim.min_lr              {steplaw.FINAL_LR:g} for every run, whatever its peak")
    print(f"  data.global_batch_tokens  {batch:,} = 0.58 D^0.571")
    print(f"  fitted on                 {fitted}")
    if not is_fitted:
        print("warning: outside of where it was fitted, this is an extrapolation")
    return 0


def add_growth_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale hparams growth`."""
    add = parser.add_argument
    nominal = "parameters of the model to grow to, as it is called: 7B"
    add("--target-params", required=True, metavar="N", help=nominal)
    add("--tokens", required=True, metavar="D", help="tokens that it would be trained on")
    add("--layers", metavar="L", help="its layers, to name those of the base")
    add("--json", action="store_true", help="print one JSON object instead")


def run_growth(args: argparse.Namespace) -> int:
    """Print what to stack from; returns the exit status. Raises UserError for bad input."""
    from megascale.optim import growth_law

    parameters = whole_number(args.target_params, "--target-params", 1)
    tokens, factor = whole_number(args.tokens, "--tokens", 1), growth_law.GROWTH_FACTOR
    base_tokens = growth_law.base_tokens(parameters, tokens)
    if base_tokens >= tokens:
        raise UserError(
            f"--target-params {args.target_params} --tokens {args.tokens}: the law asks for a base "
            f"trained on {base_tokens:.3g} tokens, no fewer than the target; it speaks of large "
            "runs, such as --target-params 410M --tokens 100B"
        )
    layers = None if args.layers is None else _base_layers(args.layers, factor)
    fitted = growth_law.fitted_growth_factor(parameters, tokens)
    flops = growth_law.compute_flops(parameters, tokens)
    if args.json:
        value = {"target_parameters": parameters, "target_tokens": tokens, "compute_flops": flops}
        value |= {"growth_factor": factor, "fitted_growth_factor": fitted}
        return _print_json(value | {"base_tokens": base_tokens, "base_layers": layers})
    depth = f"1/{factor} of the target's layers" if layers is None else f"{layers:,} layers"
    paid = base_tokens / factor
    print(f"G_stack to {parameters:,} parameters trained on {tokens:,} tokens")
    print(
        f"  growth factor         {factor}, for all sizes (a fit that the paper calls weak gives "
        f"{fitted:.3g})"
    )
    print(f"  depth of the base     {depth}, of the target's width")
    print(f"  tokens for the base   {base_tokens / 1e9:.4g}B, before its learning rate decays")
    print(f"  which costs           {paid / 1e9:.4g}B tokens of the target, {paid / tokens:.2%}")
    print(f"  compute               {flops:.4g} FLOPs, C = 6 N D")
    return 0


def _base_layers(text: str, factor: int) -> int:
    layers = whole_number(text, "--layers", 1)
    if layers % factor:
        works = max(1, round(layers / factor)) * factor
        raise UserError(f"--layers {text}: must be a multiple of {factor}; {works} is")
    return layers // factor


def _print_json(value: dict[str, Any]) -> int:
    print(json.dumps(value))
    return 0
