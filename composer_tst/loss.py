"""Multi-hot cross-entropy: one position predicts the `s` tokens of a bag as a set.

The loss of Token-Superposition Training (Peng, Gigant, Quesnelle, arXiv 2605.06546) at the cost of one ordinary
cross-entropy: the `s` targets of a row share its log-sum-exp.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements upcast at a time: on CPU (2 MiB of float32) they stay in the cache, on a GPU (128 MiB) they fill it.
_CHUNK_ELEMENTS = {'cpu': 1 << 19, 'cuda': 1 << 25}


def multi_hot_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = 'mean',
) -> Tensor:
    """Cross-entropy of each row of logits with its bag of `s` targets.

    With `w = weights / sum(weights)`, the loss of row `n` is the sum over its valid targets `y[k]` (those that are
    not `ignore_index`) of `w[k] * (logsumexp(logits[n]) - logits[n, y[k]])`. A token that occurs twice in a bag
    counts twice. Whatever the dtype of the logits, all is summed in float32 (in float64 for float64).

    Args:
        logits: (N, V), any floating dtype and strides; never modified.
        targets: (N, s) int64, each in [0, V) or `ignore_index`.
        weights: (s,) non-negative, not all zero; uniform if None. They receive no gradient.
        ignore_index: the target that counts for nothing.
        reduction: 'none' for the (N,) losses of the rows, 'sum' for their sum, 'mean' for their sum divided by
            the sum of the weights of all valid targets. Without any valid target the mean is 0 and so is its
            gradient, not NaN: a microbatch of nothing but padding must not poison the step it is part of.

    Returns:
        The loss in nats, float32 (float64 for float64 logits): (N,) for 'none', else a scalar.

    Raises:
        ValueError: a wrong shape, unusable weights (values are checked on CPU only, where that costs no
            synchronisation), or an unknown reduction.
        RuntimeError: on CPU, a target outside [0, V) that is not `ignore_index`.
    """
    if logits.ndim != 2:
        raise ValueError(f'logits must be (N, V), but have shape {tuple(logits.shape)}.')
    if targets.ndim != 2 or targets.shape[0] != logits.shape[0] or targets.shape[1] == 0:
        raise ValueError(
            f'targets must be ({logits.shape[0]}, s) with s >= 1, but have shape {tuple(targets.shape)}.'
        )
    if reduction not in ('none', 'sum', 'mean'):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', not {reduction!r}.")
    valid = targets != ignore_index
    target_weights = valid * _normalised(weights, targets.shape[1], logits)
    losses = _MultiHotCrossEntropy.apply(logits, targets.masked_fill(~valid, 0), target_weights)
    if reduction == 'none':
        return losses
    if reduction == 'sum':
        return losses.sum()
    total = target_weights.sum()
    return losses.sum() / total.where(total > 0, 1)


def _normalised(weights: Sequence[float] | Tensor | None, bag_size: int, logits: Tensor) -> Tensor:
    """Weights of sum 1, (s,), on the device of the logits and in the dtype to sum in."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if weights is None:
        return torch.full((bag_size,), 1 / bag_size, device=logits.device, dtype=dtype)
    given = torch.as_tensor(weights, dtype=dtype).detach()
    if given.shape != (bag_size,):
        raise ValueError(f'weights must be ({bag_size},), one per target, but are {tuple(given.shape)}.')
    if given.device.type == 'cpu' and not torch.compiler.is_compiling():
        values = given.tolist()
        if not (min(values) >= 0 and 0 < sum(values) < math.inf):
            raise ValueError(f'weights must be finite, not negative and not all zero, but are {values}.')
    return (given / given.sum()).to(logits.device, non_blocking=True)


class _MultiHotCrossEntropy(torch.autograd.Function):
    """(N, V) logits, (N, s) targets in [0, V) and (N, s) weights, 0 where ignored, to (N,) losses."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        lse = weights.new_empty(logits.shape[0])
        for rows in _chunks(logits):
            lse[rows] = logits[rows].to(weights.dtype).logsumexp(-1)
        # (N, s). A logit may be -inf (a masked token); with weight 0 it still counts for nothing.
        nats = lse[:, None] - logits.gather(1, targets).to(weights.dtype)
        ctx.save_for_backward(logits, targets, weights, lse, nats)
        return (weights * nats.masked_fill(weights == 0, 0)).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, weights, lse, nats = ctx.saved_tensors
        scale = (grad_output * weights.sum(-1))[:, None]
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in _chunks(logits):
            probs = (logits[rows].to(weights.dtype) - lse[rows, None]).exp_()
            grad[rows] = probs.mul_(scale[rows])
        # The columns of the targets get their whole value at once, in float32: the probability less the weights of
        # all targets of the row that are this one. A token that occurs twice is written twice, with one value; so
        # is column 0, which stands in for ignored targets.
        same = targets[:, :, None] == targets[:, None, :]  # (N, s, s)
        hits = (same * weights[:, None, :]).sum(-1)
        at_targets = scale * (-nats).exp() - grad_output[:, None] * hits
        return grad.scatter_(1, targets, at_targets.to(grad.dtype)), None, None


def _chunks(logits: Tensor) -> list[slice]:
    """Runs of rows that cover (N, V) logits; one, if the compiler fuses the upcast into what follows."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    rows, vocabulary = logits.shape
    step = max(1, _CHUNK_ELEMENTS.get(logits.device.type, 1 << 25) // max(1, vocabulary))
    return [slice(start, start + step) for start in range(0, rows, step)]
