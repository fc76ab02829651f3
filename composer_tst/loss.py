"""Multi-hot cross-entropy: one position predicts the `s` tokens of a bag as a set.

The loss of Token-Superposition Training (Peng, Gigant, Quesnelle, arXiv 2605.06546) at the cost of one ordinary
cross-entropy: the log-sum-exp over the vocabulary is shared by the `s` targets.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Float32 elements worked on at a time (2 MiB): an upcast chunk of rows stays in the cache.
_CHUNK_ELEMENTS = 1 << 19


def multi_hot_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = 'mean',
) -> Tensor:
    """Cross-entropy of each row of logits with a bag of `s` targets.

    With `w = weights / sum(weights)` and the sum over the valid targets (those that are not `ignore_index`), the
    loss of row `n` is `sum_k w[k] * (logsumexp(logits[n]) - logits[n, targets[n, k]])`. A target that occurs
    twice in a bag counts twice. All sums are in float32, whatever the dtype of the logits (float64 stays float64).

    Args:
        logits: (N, V), any floating dtype; never modified.
        targets: (N, s) int64, each in [0, V) or `ignore_index`.
        weights: (s,) non-negative, not all zero; uniform if None.
        ignore_index: the target value that counts for nothing.
        reduction: 'none' for the (N,) row losses, 'sum' for their sum, 'mean' for their sum divided by the summed
            weights of all valid targets. The mean over no valid target is 0 with zero gradient, not NaN: an
            all-padding microbatch must not poison the gradients of the others in its step.

    Returns:
        The loss, float32 (float64 for float64 logits), nats; (N,) for 'none', else a scalar.

    Raises:
        ValueError: a wrong shape, unusable weights, or an unknown reduction.
    """
    if logits.ndim != 2:
        raise ValueError(f'logits must be (N, V), but have shape {tuple(logits.shape)}.')
    if targets.ndim != 2 or targets.shape[0] != logits.shape[0]:
        raise ValueError(f'targets must be ({logits.shape[0]}, s), but have shape {tuple(targets.shape)}.')
    if reduction not in ('none', 'sum', 'mean'):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', not {reduction!r}.")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = _normalised(weights, targets.shape[1], logits.device, dtype)
    valid = targets != ignore_index
    target_weights = valid * weights  # (N, s)
    losses = _MultiHotCrossEntropy.apply(logits, targets.masked_fill(~valid, 0), target_weights)
    if reduction == 'none':
        return losses
    if reduction == 'sum':
        return losses.sum()
    total = target_weights.sum()
    return losses.sum() / total.where(total > 0, 1)


def _normalised(
    weights: Sequence[float] | Tensor | None, bag_size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    if weights is None:
        return torch.full((bag_size,), 1 / bag_size, device=device, dtype=dtype)
    weights = torch.as_tensor(weights, device=device, dtype=dtype)
    if weights.shape != (bag_size,):
        raise ValueError(
            f'weights must be ({bag_size},), one per target, but have shape {tuple(weights.shape)}.'
        )
    if not torch.compiler.is_compiling() and (weights.min() < 0 or weights.sum() <= 0):
        raise ValueError(f'weights must be non-negative and not all zero, but are {weights.tolist()}.')
    return weights / weights.sum()


class _MultiHotCrossEntropy(torch.autograd.Function):
    """(N, V) logits, (N, s) targets in [0, V), (N, s) weights, 0 where ignored, to (N,) row losses."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        lse = torch.empty(logits.shape[0], device=logits.device, dtype=weights.dtype)
        for rows in _chunks(logits):
            torch.logsumexp(logits[rows].to(weights.dtype), dim=-1, out=lse[rows])
        target_logits = logits.gather(1, targets).to(weights.dtype)
        ctx.save_for_backward(logits, targets, weights, lse, target_logits)
        return (weights * (lse[:, None] - target_logits)).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        logits, targets, weights, lse, target_logits = ctx.saved_tensors
        scale = (grad_output * weights.sum(-1))[:, None]
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in _chunks(logits):
            probabilities = (logits[rows].to(weights.dtype) - lse[rows, None]).exp_()
            grad[rows] = probabilities.mul_(scale[rows])
        # The s columns with a target get their whole value at once. A target that occurs twice in a bag gets the
        # same value, the weight of both, twice: nothing is ever accumulated in the dtype of the logits.
        same = targets[:, :, None] == targets[:, None, :]  # (N, s, s)
        hits = (same * weights[:, None, :]).sum(-1)
        at_targets = scale * (target_logits - lse[:, None]).exp() - grad_output[:, None] * hits
        grad.scatter_(1, targets, at_targets.to(grad.dtype))
        return grad, None, None


def _chunks(logits: Tensor) -> list[slice]:
    """Runs of rows that cover (N, V) logits."""
    rows, vocabulary = logits.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, vocabulary))
    return [slice(start, start + step) for start in range(0, rows, step)]
