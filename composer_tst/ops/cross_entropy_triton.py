"""The two passes of the loss over (N, V) logits as Triton kernels: one read forward; one read, one write backward.

All else of the loss is (N, s) and stays in torch. The kernels are opaque operators to `torch.compile`, which would
itself read the logits once for their maximum and once for their sum.
"""

# A kernel's launch takes the grid in brackets and more arguments than the kernel, which pyright does not know.
# pyright: reportCallIssue=false

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits in one program at a time: 32 for each of its threads.
_BLOCK, _WARPS = 8192, 8
_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def runs_on(logits: Tensor) -> bool:
    """Whether the kernels take these logits: on a GPU, or anywhere in Triton's interpreter (for the tests)."""
    return (logits.is_cuda or _INTERPRETED) and logits.dtype != torch.float64 and logits.numel() > 0


@torch.library.custom_op('composer_tst::log_sum_exp', mutates_args=())
def log_sum_exp(logits: Tensor) -> Tensor:
    """(N,) float32 log-sum-exps of (N, V) logits of any strides."""
    rows, vocabulary = logits.shape
    result = torch.empty(rows, device=logits.device, dtype=torch.float32)
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    with torch.cuda.device_of(logits):
        _log_sum_exp[(rows,)](logits, *logits.stride(), result, vocabulary, block, num_warps=_WARPS)
    return result


@log_sum_exp.register_fake
def _(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op('composer_tst::scaled_softmax', mutates_args=())
def scaled_softmax(logits: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    """(N, V) `softmax(logits) * scale`, contiguous, in the dtype of the logits; lse and scale are (N,) float32."""
    rows, vocabulary = logits.shape
    result = torch.empty(rows, vocabulary, device=logits.device, dtype=logits.dtype)
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    grid = (rows, triton.cdiv(vocabulary, block))
    with torch.cuda.device_of(logits):
        _scaled_softmax[grid](logits, *logits.stride(), lse, scale, result, vocabulary, block, num_warps=_WARPS)
    return result


@scaled_softmax.register_fake
def _(logits: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


@triton.jit
def _log_sum_exp(logits, row_stride, column_stride, result, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # row * vocabulary may not fit 32 bits
    columns = tl.arange(0, BLOCK).to(tl.int64)
    top = -float('inf')
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        address = logits + row * row_stride + (start + columns) * column_stride
        z = tl.load(address, mask=inside, other=-float('inf')).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, 0))
        # Nothing but -inf so far: subtract 0, as -inf less -inf is not a number.
        shift = tl.where(new_top == -float('inf'), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
        top = new_top
    tl.store(result + row, top + tl.log(total))


@triton.jit
def _scaled_softmax(logits, row_stride, column_stride, lse, scale, result, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    z = tl.load(logits + row * row_stride + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
    p = tl.exp(z - tl.load(lse + row)) * tl.load(scale + row)
    tl.store(result + row * vocabulary + columns, p.to(result.dtype.element_ty), mask=inside)
