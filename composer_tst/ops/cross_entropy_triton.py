"""Multi-hot cross-entropy in three Triton kernels: two forward, one backward.

1. `row_losses` reads each row of logits once, and gives its loss and the two parts of its log-sum-exp.
2. `mean_of_rows` sums the rows' losses, and divides by the weight of all valid targets.
3. `logits_gradient` reads the logits once and writes their gradient once.

Each is an operator, which `torch.compile` does not look into. The compiler's own code would read the logits once for
their maximum and once for their sum. No kernel adds with atomics, so loss and gradient are the same bits at every call.
"""

# A kernel's launch takes the grid in brackets and more arguments than the kernel, which pyright does not know.
# pyright: reportCallIssue=false

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits in one program at a time: 32 for each of its threads.
_BLOCK, _WARPS = 8192, 8


def multi_hot_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, mean: bool
) -> Tensor:
    """Losses (N,), or their mean, of (N, V) logits with (N, s) targets and (s,) weights, uniform if None."""
    return cast(Tensor, _MultiHotCrossEntropy.apply(logits, targets, weights, ignore_index, mean))


class _MultiHotCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, mean: bool
    ) -> Tensor:
        loss, lse, valid = row_losses(logits, targets, weights, ignore_index)
        divisor = None
        if mean:
            loss, divisor = mean_of_rows(loss, valid)
        ctx.save_for_backward(logits, targets, weights, lse, valid, divisor)
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, weights, lse, valid, divisor = ctx.saved_tensors
        grad = logits_gradient(logits, targets, weights, ctx.ignore_index, lse, valid, grad_output, divisor)
        return grad, None, None, None, None


@torch.library.custom_op('composer_tst::row_losses', mutates_args=())
def row_losses(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), parts of log-sum-exps (N, 2) and shares of valid weight (N,) of the rows, in float32.

    The first part is a row's greatest logit. The second is the logarithm of the sum of `exp(logit - greatest)`. Their
    sum in one number would be rounded at the size of the logits.

    Logits (N, V), targets (N, s) and weights (s,) may have any strides. None for weights is one weight for all.
    """
    rows, vocabulary = logits.shape
    losses, lse, valid = _of_rows(logits)
    with torch.cuda.device_of(logits):
        _row_losses[(rows,)](
            *_strided(logits, targets, weights),
            ignore_index,
            losses,
            lse,
            valid,
            vocabulary,
            targets.shape[1],
            **_blocks(vocabulary, targets.shape[1]),
            # As torch's compiler does it: targets outside the vocabulary stop the run. Nothing else is checked.
            debug=True,
            sanitize_overflow=False,
        )
    return losses, lse, valid


@row_losses.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _of_rows(logits)


def _of_rows(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what :func:`row_losses` gives."""
    losses, lse, valid = (logits.new_empty(len(logits), *parts, dtype=torch.float32) for parts in ((), (2,), ()))
    return losses, lse, valid


@torch.library.custom_op('composer_tst::mean_of_rows', mutates_args=())
def mean_of_rows(losses: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of (N,) losses over that of (N,) shares of valid weight, and the latter sum, 1 if it is 0: two scalars."""
    mean, divisor = (torch.empty((), device=losses.device, dtype=torch.float32) for _ in range(2))
    block = min(_BLOCK, triton.next_power_of_2(len(losses)))
    with torch.cuda.device_of(losses):
        _mean_of_rows[(1,)](losses, valid, mean, divisor, len(losses), BLOCK=block, num_warps=_WARPS)
    return mean, divisor


@mean_of_rows.register_fake
def _(losses: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    return losses.new_empty(()), losses.new_empty(())


@torch.library.custom_op('composer_tst::logits_gradient', mutates_args=())
def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    lse: Tensor,
    valid: Tensor,
    grad_output: Tensor,
    divisor: Tensor | None,
) -> Tensor:
    """(N, V) gradient of the logits, contiguous, in their dtype.

    `lse` and `valid` come from :func:`row_losses`, and `divisor` from :func:`mean_of_rows`. `grad_output` is (N,), or a
    scalar if there is a divisor.
    """
    rows, vocabulary = logits.shape
    grad = torch.empty(rows, vocabulary, device=logits.device, dtype=logits.dtype)
    blocks = _blocks(vocabulary, targets.shape[1])
    with torch.cuda.device_of(logits):
        _logits_gradient[(rows, triton.cdiv(vocabulary, blocks['BLOCK']))](
            *_strided(logits, targets, weights),
            ignore_index,
            lse,
            valid,
            grad_output,
            grad_output.stride(0) if grad_output.ndim else 0,
            divisor,
            grad,
            vocabulary,
            targets.shape[1],
            **blocks,
        )
    return grad


@logits_gradient.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _strided(logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
    """What the kernels take first: each tensor and its strides."""
    stride = 0 if weights is None else weights.stride(0)
    return logits, *logits.stride(), targets, *targets.stride(), weights, stride


def _blocks(vocabulary: int, bag_size: int) -> dict[str, int]:
    """How much a program of the two large kernels has at hand."""
    return {
        'BLOCK': min(_BLOCK, triton.next_power_of_2(vocabulary)),
        'BAG': triton.next_power_of_2(bag_size),
        'num_warps': _WARPS,
    }


@triton.jit
def _row_losses(
    logits,
    row_stride,
    column_stride,
    targets,
    bag_stride,
    target_stride,
    weights,
    weight_stride,
    ignore_index,
    losses,
    lse,
    valid,
    vocabulary,
    bag_size,
    BLOCK: tl.constexpr,
    BAG: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * vocabulary may not fit 32 bits
    logits += row * row_stride
    columns = tl.arange(0, BLOCK).to(tl.int64)
    top = -float('inf')
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        z = tl.load(logits + (start + columns) * column_stride, mask=inside, other=-float('inf')).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, 0))
        # Nothing but -inf so far: subtract 0, as -inf less -inf is not a number.
        shift = tl.where(new_top == -float('inf'), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
        top = new_top
    log_total = tl.log(total)

    k = tl.arange(0, BAG).to(tl.int64)
    y = tl.load(targets + row * bag_stride + k * target_stride, mask=k < bag_size, other=ignore_index).to(tl.int64)
    counts = y != ignore_index
    within = (y >= 0) & (y < vocabulary)
    tl.device_assert(within | (y == ignore_index), 'index out of bounds: a target outside of the vocabulary')
    z = tl.load(logits + y * column_stride, mask=counts & within, other=0.0).to(tl.float32)
    share = 1.0 / _total_weight(weights, weight_stride, bag_size, BAG)
    if weights is None:
        weight = tl.where(counts, share, 0.0)
    else:
        weight = tl.load(weights + k * weight_stride, mask=counts & (k < bag_size), other=0.0).to(tl.float32) * share
    # A token that is masked out, with a logit of -inf, costs nothing where its weight is 0: not 0 * inf.
    tl.store(losses + row, tl.sum(tl.where(weight == 0.0, 0.0, weight * ((top - z) + log_total)), 0))
    tl.store(lse + 2 * row, top)
    tl.store(lse + 2 * row + 1, log_total)
    tl.store(valid + row, tl.sum(weight, 0))


@triton.jit
def _mean_of_rows(losses, valid, mean, divisor, rows, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        loss += tl.load(losses + start + lanes, mask=start + lanes < rows, other=0.0)
        weight += tl.load(valid + start + lanes, mask=start + lanes < rows, other=0.0)
    total = tl.sum(weight, 0)
    total = tl.where(total > 0, total, 1.0)
    tl.store(divisor, total)
    tl.store(mean, tl.sum(loss, 0) / total)


@triton.jit
def _logits_gradient(
    logits,
    row_stride,
    column_stride,
    targets,
    bag_stride,
    target_stride,
    weights,
    weight_stride,
    ignore_index,
    lse,
    valid,
    grad_output,
    grad_output_stride,
    divisor,
    grad,
    vocabulary,
    bag_size,
    BLOCK: tl.constexpr,
    BAG: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)  # of the block: 64 bits of it would take the registers of another program
    inside = column < (vocabulary - first).to(tl.int32)
    logits += row * row_stride + first * column_stride
    targets += row * bag_stride
    z = tl.load(logits + column.to(tl.int64) * column_stride, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(grad_output + row * grad_output_stride).to(tl.float32)
    if divisor is not None:
        scale /= tl.load(divisor)
    g = tl.exp((z - tl.load(lse + 2 * row)) - tl.load(lse + 2 * row + 1)) * (scale * tl.load(valid + row))
    # The targets' share, subtracted before the gradient is rounded: a token that occurs twice in a bag counts twice.
    share = scale / _total_weight(weights, weight_stride, bag_size, BAG)
    for k in range(0, bag_size):
        y = tl.load(targets + tl.cast(k, tl.int64) * target_stride).to(tl.int64)
        if (y != ignore_index) & (y >= first) & (y < first + BLOCK):
            weight = share
            if weights is not None:
                weight = share * tl.load(weights + tl.cast(k, tl.int64) * weight_stride).to(tl.float32)
            g -= tl.where(column == (y - first).to(tl.int32), weight, 0.0)
    tl.store(grad + (row * vocabulary + first) + column, g.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _total_weight(weights, weight_stride, bag_size, BAG: tl.constexpr):
    if weights is None:
        return 1.0 * bag_size
    else:
        k = tl.arange(0, BAG).to(tl.int64)
        return tl.sum(tl.load(weights + k * weight_stride, mask=k < bag_size, other=0.0).to(tl.float32), 0)
