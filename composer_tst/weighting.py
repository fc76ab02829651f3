"""How much each of the s targets in a bag counts."""

import math
from collections.abc import Sequence

import torch

Weighting = str | Sequence[float]

# Weight of the k-th target, k from 1, before normalising (arXiv 2605.06546).
_RULES = {
    'uniform': lambda k: 1.0,
    'power_law': lambda k: 1.0 / k,
    'exponential': lambda k: math.exp(-k),
    'first': lambda k: 1.0 if k == 1 else 0.0,
}


def target_weights(weighting: Weighting, bag_size: int) -> torch.Tensor:
    """Weights of the targets in one bag, normalised to sum to one.

    Args:
        weighting: ``uniform``, ``power_law`` (``1/k``), ``exponential`` (``exp(-k)``), ``first``, or a
            sequence of ``bag_size`` numbers.
        bag_size: Targets in a bag, ``s``.

    Returns:
        torch.Tensor: Float32 of shape ``(s,)``, on the CPU.

    Raises:
        ValueError: If the name is unknown, or the sequence has the wrong length, a negative or non-finite
            number, or sums to zero.
    """
    if isinstance(weighting, str):
        if weighting not in _RULES:
            raise ValueError(f'weighting is {weighting!r}: use one of {", ".join(_RULES)}, or a list of numbers.')
        values = [_RULES[weighting](k) for k in range(1, bag_size + 1)]
    else:
        try:
            values = [float(w) for w in weighting]
        except (TypeError, ValueError):
            raise ValueError(
                f'weighting is {weighting!r}: use one of {", ".join(_RULES)}, or a list of numbers.'
            ) from None
        if len(values) != bag_size:
            raise ValueError(
                f'weighting has {len(values)} numbers but bag_size is {bag_size}: give one number for each target.'
            )
        if any(not math.isfinite(w) or w < 0 for w in values) or sum(values) == 0:
            raise ValueError(f'weighting is {values}: give finite numbers that are not negative and do not all vanish.')
    weights = torch.tensor(values, dtype=torch.float64)
    return (weights / weights.sum()).float()
