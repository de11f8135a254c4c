"""How long to train a small model before stacking it into a large one.

Du et al., "Stacking Your Transformers", arXiv 2405.15319, section 4. N is the nominal number of the
target's parameters (7e9 for a 7B model), D that of its training tokens, C = 6 N D its compute.
"""

from __future__ import annotations

import math

GROWTH_FACTOR = 4
"""Target layers over base layers. The paper found 2 to 4 best and takes 4 for all sizes."""


def compute_flops(parameters: int, tokens: int) -> float:
    """C = 6 N D, the usual estimate of the operations of a training run."""
    return 6.0 * parameters * tokens


def base_tokens(parameters: int, tokens: int) -> float:
    """d = 10^(0.88 log10 N + 163.27 / log10 C - 5.74): tokens to train the base on."""
    compute = math.log10(compute_flops(parameters, tokens))
    return float(10 ** (0.88 * math.log10(parameters) + 163.27 / compute - 5.74))


def fitted_growth_factor(parameters: int, tokens: int) -> float:
    """g = 10^(1.01 log10 N - 29.88 / log10 C - 7.36), which the paper calls weak."""
    compute = math.log10(compute_flops(parameters, tokens))
    return float(10 ** (1.01 * math.log10(parameters) - 29.88 / compute - 7.36))
