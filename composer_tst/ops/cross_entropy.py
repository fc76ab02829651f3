"""Multi-hot cross-entropy: one position predicts the `s` tokens of a bag as a set.

The loss of Token-Superposition Training (Peng, Gigant, Quesnelle, arXiv 2605.06546), at the cost of one
ordinary cross-entropy: the `s` targets of a row share its log-sum-exp and its gradient buffer.

On a GPU three kernels of `cross_entropy_triton.py` compute it. The code here is for a CPU, and for float64. It is an
autograd function, not an operator as the embedding is. Its backward turns what forward has left into the gradient, in
the same memory. An operator may not do that. Under a compiler nothing is computed in place.
"""

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits at a time for each thread of a CPU: 1 MiB of float32 stays in its cache.
_CHUNK_ELEMENTS = 1 << 18
# Whether Triton interprets the kernels on a CPU, as the tests have it.
_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def multi_hot_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = 'mean',
) -> Tensor:
    """Cross-entropy of each row of logits with its bag of `s` targets.

    With `w = weights / sum(weights)`, the loss of row `n` is the sum over its valid targets `y[k]` (those that
    are not `ignore_index`) of `w[k] * (logsumexp(logits[n]) - logits[n, y[k]])`. A token that occurs twice in a
    bag counts twice. All is summed in float32 whatever the dtype of the logits (in float64 for float64).

    Args:
        logits: (N, V), any floating dtype and strides; never modified.
        targets: (N, s) int64 or int32, each in [0, V) or `ignore_index`.
        weights: (s,) non-negative, not all zero; uniform if None. They receive no gradient.
        ignore_index: the target that counts for nothing.
        reduction: 'none' for the (N,) losses of the rows, 'sum' for their sum, 'mean' for that sum divided by
            the sum of the weights of all valid targets. Without any valid target the mean and its gradient are
            0, not NaN: a microbatch of nothing but padding must not poison the step that it is part of.

    Returns:
        The loss in nats, float32 (float64 for float64 logits): (N,) for 'none', else a scalar.

    Raises:
        ValueError: a wrong shape, targets that are no integers, an unknown reduction, or unusable weights (the
            values of weights on a GPU are not checked, which would stall it).
        RuntimeError: on CPU, a target outside [0, V) that is not `ignore_index`.
    """
    if logits.ndim != 2:
        raise ValueError(f'logits must be (N, V), but are {tuple(logits.shape)}.')
    if targets.ndim != 2 or targets.shape[0] != logits.shape[0] or targets.shape[1] == 0:
        raise ValueError(f'targets must be ({logits.shape[0]}, s) with s >= 1, but are {tuple(targets.shape)}.')
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f'targets must be int64 or int32, but are {targets.dtype}.')
    if reduction not in ('none', 'sum', 'mean'):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', but is {reduction!r}.")
    given = _checked(weights, targets.shape[1])
    if kernels := _kernels(logits):
        on_device = None if given is None else given.to(logits.device, non_blocking=True)
        mean = reduction == 'mean'
        losses = kernels.multi_hot_cross_entropy(logits, targets, on_device, ignore_index, mean)
        return losses.sum() if reduction == 'sum' else losses
    targets = targets.long()
    valid = targets != ignore_index
    target_weights = valid * _normalised(given, targets.shape[1], logits)
    trained = torch.is_grad_enabled() and logits.requires_grad
    indices = targets.masked_fill(~valid, 0)
    losses = cast(Tensor, _MultiHotCrossEntropy.apply(logits, indices, target_weights, trained))
    if reduction == 'none':
        return losses
    if reduction == 'sum':
        return losses.sum()
    total = target_weights.sum()
    return losses.sum() / total.where(total > 0, 1)


def _checked(weights: Sequence[float] | Tensor | None, bag_size: int) -> Tensor | None:
    """Weights as a tensor, (s,), None if there are none."""
    if weights is None:
        return None
    given = weights.detach() if isinstance(weights, Tensor) else torch.tensor(weights, dtype=torch.float64)
    if given.shape != (bag_size,):
        raise ValueError(f'weights must be ({bag_size},), one per target, but are {tuple(given.shape)}.')
    if given.device.type == 'cpu' and not torch.compiler.is_compiling():
        values, limits = given.tolist(), torch.finfo(torch.float32)  # in which they become shares of their sum
        if not (min(values) >= 0 and limits.tiny <= sum(values) <= limits.max):
            raise ValueError(f'weights must be finite, not negative and not all zero, but are {values}.')
    return given


def _normalised(weights: Tensor | None, bag_size: int, logits: Tensor) -> Tensor:
    """Weights that sum to 1, (s,), on the device of the logits and in the dtype to sum in."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if weights is None:
        return torch.full((bag_size,), 1 / bag_size, device=logits.device, dtype=dtype)
    weights = weights.to(dtype)
    return (weights / weights.sum()).to(logits.device, non_blocking=True)


class _MultiHotCrossEntropy(torch.autograd.Function):
    """Losses (N,) of (N, V) logits, (N, s) targets in [0, V) and (N, s) weights, which are 0 for ignored targets.

    `trained` says whether there will be a backward pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, trained: bool) -> Tensor:
        ctx.softmax = None
        if trained and logits.is_cpu and not torch.compiler.is_compiling():
            # The buffer of the gradient is filled here already, so that exponentials are computed once. On a CPU
            # they take longer than reading the logits.
            ctx.softmax = torch.empty(logits.shape, dtype=weights.dtype, device=logits.device)
            for rows in _chunks(logits):
                torch.softmax(logits[rows].to(weights.dtype), -1, out=ctx.softmax[rows])
            nats = _nats(ctx.softmax, logits, targets)
        else:
            chunks = (
                -logits[rows].to(weights.dtype).log_softmax(-1).gather(1, targets[rows]) for rows in _chunks(logits)
            )
            nats = torch.cat(list(chunks))
        ctx.save_for_backward(logits, targets, weights, nats)
        # A token that is masked out, with a logit of -inf, costs nothing where its weight is 0: not 0 * inf.
        return (weights * nats.masked_fill(weights == 0, 0)).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, weights, nats = ctx.saved_tensors
        scale = grad_output * weights.sum(-1)
        if ctx.softmax is not None:
            grad = _scaled_in_place(ctx.softmax, scale, logits.dtype)
            ctx.softmax = None  # a second backward computes it again
        elif torch.compiler.is_compiling():
            grad = (logits.to(weights.dtype).softmax(-1) * scale[:, None]).to(logits.dtype)
        else:
            grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
            for rows in _chunks(logits):
                grad[rows] = logits[rows].to(weights.dtype).softmax(-1).mul_(scale[rows, None])
        # A target's column is written once more, summed in float32: its probability, less the weights of all
        # targets of the row with this token. A token that occurs twice in a bag is written twice, with one value.
        # So is column 0, which stands in for the ignored targets.
        same = targets[:, :, None] == targets[:, None, :]  # (N, s, s)
        hits = (same * weights[:, None, :]).sum(-1)
        at_targets = scale[:, None] * (-nats).exp() - grad_output[:, None] * hits
        rows = torch.arange(len(targets), device=targets.device)[:, None]
        # Not `scatter`, which on CPU makes a float32 copy of a low-precision (N, V) tensor.
        put = grad.index_put if torch.compiler.is_compiling() else grad.index_put_
        return put((rows, targets), at_targets.to(grad.dtype)), None, None, None


def _kernels(logits: Tensor) -> Any:
    """The module of the GPU kernels if they take these logits. Only then it is imported, and Triton with it."""
    takes = logits.is_cuda or (logits.is_cpu and _INTERPRETED)
    if not takes or logits.dtype == torch.float64 or not logits.numel():
        return None
    try:
        from composer_tst.ops import cross_entropy_triton
    except ImportError:  # no Triton, so no GPU that it supports
        return None
    return cross_entropy_triton


def _nats(softmax: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """(N, s) negative log-probabilities of the targets, from the (N, V) softmax and the logits it was made of."""
    p = softmax.gather(1, targets)
    nats = -p.log()
    # NaN, or too improbable for its logarithm to be exact.
    for row in (~(p.amin(1) >= torch.finfo(p.dtype).tiny)).nonzero().flatten():
        z = logits[row].to(p.dtype)
        nats[row] = z.logsumexp(-1) - z[targets[row]]
    return nats


def _scaled_in_place(softmax: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, V) softmax times (N,) scale in another dtype, no wider than its own, in the softmax's own memory."""
    if dtype == softmax.dtype:
        return softmax.mul_(scale[:, None])
    result = softmax.flatten().view(dtype)[: softmax.numel()].view(softmax.shape)
    for rows in _chunks(softmax):  # from first to last: what is written has been read
        result[rows] = softmax[rows] * scale[rows, None]
    return result


def _chunks(logits: Tensor) -> list[slice]:
    """Runs of rows that cover (N, V) logits; one run for a compiler, which fuses the upcast into its use."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    rows, vocabulary = logits.shape
    step = max(1, _CHUNK_ELEMENTS * torch.get_num_threads() // max(1, vocabulary))
    return [slice(start, start + step) for start in range(0, max(1, rows), step)]
