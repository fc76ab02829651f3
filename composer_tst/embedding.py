"""Bag embedding: the input of one s-token is the mean of its tokens' embeddings.

Token-Superposition Training (Peng, Gigant, Quesnelle, arXiv 2605.06546) sums in float32 and casts back. Here
the `s` embeddings of a bag never stand side by side in memory, neither forward nor backward.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Float32 elements summed at a time for a low-precision weight on CPU (1 MiB): the sums stay in the cache.
_CHUNK_ELEMENTS = 1 << 18


def bag_embedding(embedding: nn.Module | Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean embedding of the attended tokens of each bag.

    Gradients are those of `nn.Embedding`: dense, and none for the row of `padding_idx`, which forward counts
    like any other (unlike `nn.EmbeddingBag`, which leaves it out of the mean).

    Args:
        embedding: an `nn.Embedding`, another module with a (V, d) `.weight` and optionally a `.padding_idx`,
            or a (V, d) weight.
        input_ids: (..., s) int64, each in [0, V).
        mask: (..., s), nonzero where a token is attended to; None if all are.

    Returns:
        (..., d) in the weight's dtype, summed in float32; zeros for a bag with no attended token.

    Raises:
        ValueError: bags without tokens, a mask of another shape, or an embedding with `max_norm`, `sparse` or
            `scale_grad_by_freq`.
    """
    if isinstance(embedding, Tensor):
        weight, padding_idx = embedding, None
    else:
        for option in ('max_norm', 'sparse', 'scale_grad_by_freq'):
            if getattr(embedding, option, None):
                raise ValueError(f'An embedding with {option} cannot be averaged over bags; switch {option} off.')
        weight, padding_idx = cast(Tensor, embedding.weight), getattr(embedding, 'padding_idx', None)
    if input_ids.ndim == 0 or input_ids.shape[-1] == 0:
        raise ValueError(f'input_ids must be (..., s) with s >= 1, but have shape {tuple(input_ids.shape)}.')
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(f'mask must be {tuple(input_ids.shape)} like input_ids, but is {tuple(mask.shape)}.')
    bags = input_ids.flatten(0, -2) if input_ids.ndim > 1 else input_ids[None]
    attended = None if mask is None else mask.reshape(bags.shape) != 0
    means = cast(Tensor, _BagEmbedding.apply(weight, bags, attended, padding_idx))
    return means.view(*input_ids.shape[:-1], weight.shape[1])


class _BagEmbedding(torch.autograd.Function):
    """(V, d) weight, (T, s) ids and (T, s) bool mask or None to (T, d) means."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bags: Tensor, attended: Tensor | None, padding_idx: int | None) -> Tensor:
        size = bags.shape[1]
        if attended is None:
            counts = torch.full_like(bags[:, :1], size)
        else:
            counts = attended.sum(1, keepdim=True).clamp_min(1)
        ctx.save_for_backward(bags, attended, counts)
        ctx.rows, ctx.padding_idx = weight.shape[0], padding_idx
        wide = weight.dtype in (torch.float32, torch.float64)
        if wide or (weight.is_cuda and attended is None):
            offsets = torch.arange(0, bags.numel() + 1, size, device=bags.device, dtype=bags.dtype)
            if wide:
                return _sum_bags(weight.detach(), bags.flatten(), offsets, attended).div_(counts)
            return torch.embedding_bag(weight.detach(), bags.flatten(), offsets, mode=1, include_last_offset=True)[0]
        # Elsewhere `torch.embedding_bag` rounds a low-precision sum before it is divided.
        means = weight.new_empty(bags.shape[0], weight.shape[1])
        for rows in _chunks(means):
            sums = torch.zeros_like(means[rows], dtype=torch.float32)
            for k in range(size):
                tokens = weight.index_select(0, bags[rows, k]).float()  # added as they are, they take twice the time
                sums += tokens if attended is None else tokens.mul_(attended[rows, k, None])
            means[rows] = sums.div_(counts[rows])
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        bags, attended, counts = ctx.saved_tensors
        # The gradient of one row of the weight is itself a bag: a sum over the positions where its id occurs. So
        # it is summed in float32 and written once, also in bfloat16, where torch's own gradient of an embedding
        # adds position after position to a bfloat16 row and loses what a frequent token gets.
        ids = bags.flatten()
        order = ids.argsort()
        # Where each id's positions begin: how many ids are lower, counted (a search takes longer than the sort).
        offsets = torch.zeros(ctx.rows + 1, device=ids.device, dtype=ids.dtype)
        offsets = offsets.scatter_add_(0, ids + 1, torch.ones_like(ids)).cumsum(0)
        grads = (grad_output / counts).contiguous()
        if attended is not None:
            attended = attended.flatten()[order]
        grad_weight = _sum_bags(grads, order // bags.shape[1], offsets, attended)
        if ctx.padding_idx is not None:
            grad_weight[ctx.padding_idx] = 0
        return grad_weight, None, None, None


def _sum_bags(table: Tensor, rows: Tensor, offsets: Tensor, attended: Tensor | None) -> Tensor:
    """Sums of the attended `table[rows]` between each two of the offsets."""
    weights = None if attended is None else attended.flatten().to(table.dtype)
    return torch.embedding_bag(table, rows, offsets, mode=0, per_sample_weights=weights, include_last_offset=True)[0]


def _chunks(means: Tensor) -> list[slice]:
    """Runs of rows that cover (T, d) means."""
    if means.device.type != 'cpu' or torch.compiler.is_compiling():
        return [slice(None)]
    step = max(1, _CHUNK_ELEMENTS // max(1, means.shape[1]))
    return [slice(start, start + step) for start in range(0, means.shape[0], step)]
