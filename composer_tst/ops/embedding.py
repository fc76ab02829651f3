"""Bag embedding: the input of one s-token is the mean of its tokens' embeddings.

Token-Superposition Training (Peng, Gigant, Quesnelle, arXiv 2605.06546) sums in float32 and casts back. Here
the `s` embeddings of a bag never stand side by side in memory, neither forward nor backward.

On a GPU, bags without a mask go through torch's own `embedding_bag`, in as many launches as it needs. All else is
computed here. For `torch.compile` that is two operators, which it does not look into. They compute in place. A
compiler that traces into an autograd function with such code may lose its gradient (that of torch 2.11 does).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

# Options of `nn.Embedding` that are not defined for bags.
NOT_FOR_BAGS = ('max_norm', 'sparse', 'scale_grad_by_freq')
# Float32 elements summed at a time for a low-precision weight on CPU (1 MiB): the sums stay in the cache.
_CHUNK_ELEMENTS = 1 << 18


def bag_embedding(embedding: nn.Module | Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean embedding of the attended tokens of each bag.

    Gradients are those of `nn.Embedding`: dense, and none for the row of `padding_idx`, which forward counts
    like any other (unlike `nn.EmbeddingBag`, which leaves it out of the mean).

    Args:
        embedding: an `nn.Embedding`, another module with a (V, d) `.weight` and optionally a `.padding_idx`,
            or a (V, d) weight.
        input_ids: (..., s) int64 or int32, each in [0, V).
        mask: (..., s), nonzero where a token is attended to; None if all are.

    Returns:
        (..., d) in the weight's dtype, summed in float32; zeros for a bag with no attended token.

    Raises:
        ValueError: ids that are no integers, bags without tokens, a mask of another shape, or an embedding with
            `max_norm`, `sparse` or `scale_grad_by_freq`.
    """
    if isinstance(embedding, Tensor):
        weight, padding_idx = embedding, None
    else:
        for option in NOT_FOR_BAGS:
            if getattr(embedding, option, None):
                raise ValueError(f'An embedding with {option} cannot be averaged over bags; switch {option} off.')
        weight, padding_idx = cast(Tensor, embedding.weight), getattr(embedding, 'padding_idx', None)
    if isinstance(weight, DTensor):
        raise ValueError(
            "The embedding's weight is sharded, and its rows are on several ranks: call the model inside "
            'superposed(model, folded), which looks bags up where the weight is whole.'
        )
    return mean_of_bags(weight, padding_idx, input_ids, mask)


def mean_of_bags(weight: Tensor, padding_idx: int | None, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """As :func:`bag_embedding`, of a weight that is on this device as a whole."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f'input_ids must be int64 or int32, but are {input_ids.dtype}.')
    if input_ids.ndim == 0 or input_ids.shape[-1] == 0:
        raise ValueError(f'input_ids must be (..., s) with s >= 1, but have shape {tuple(input_ids.shape)}.')
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(f'mask must be {tuple(input_ids.shape)} like input_ids, but is {tuple(mask.shape)}.')
    bags = input_ids.flatten(0, -2) if input_ids.ndim > 1 else input_ids[None]
    if mask is None and _on_gpu(weight):
        means = _WholeBags.apply(weight, bags, padding_idx)
    else:
        attended = None if mask is None else mask.reshape(bags.shape) != 0
        means = _BagEmbedding.apply(weight, bags.long(), attended, padding_idx)
    return cast(Tensor, means).view(*input_ids.shape[:-1], weight.shape[1])


def _on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


class _WholeBags(torch.autograd.Function):
    """(V, d) weight and (T, s) ids to (T, d) means, on a GPU.

    `embedding_bag` leaves tokens of its `padding_idx` out of the mean too. So it is given none, and the gradient
    leaves them out.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bags: Tensor, padding_idx: int | None) -> Tensor:
        ids = bags.flatten()
        starts = torch.arange(0, ids.numel(), bags.shape[1], device=ids.device, dtype=ids.dtype)
        means, of_bag, sizes, maxima = torch.embedding_bag(weight, ids, starts, mode=1)
        ctx.save_for_backward(ids, of_bag, sizes, maxima)
        ctx.vocabulary = weight.shape[0]
        ctx.left_out = -1 if padding_idx is None else padding_idx % weight.shape[0]
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        # What `embedding_bag` itself calls. It sums the positions of a frequent token side by side, in float32.
        gradient_of_bags: Any = torch.ops.aten._embedding_bag_dense_backward
        grads = grad_output.contiguous()
        gradient = gradient_of_bags(grads, *ctx.saved_tensors, ctx.vocabulary, False, 1, None, ctx.left_out)
        return gradient, None, None


class _BagEmbedding(torch.autograd.Function):
    """(V, d) weight, (T, s) int64 ids and (T, s) bool mask or None to (T, d) means."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bags: Tensor, attended: Tensor | None, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(bags, attended)
        ctx.vocabulary, ctx.padding_idx = weight.shape[0], padding_idx
        mean = _mean_operator if torch.compiler.is_compiling() else _mean
        return mean(weight.detach(), bags, attended)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        bags, attended = ctx.saved_tensors
        gradient = _gradient_operator if torch.compiler.is_compiling() else _gradient
        return gradient(grad_output, bags, attended, ctx.vocabulary, ctx.padding_idx), None, None, None


def _mean(weight: Tensor, bags: Tensor, attended: Tensor | None) -> Tensor:
    """(V, d) weight, (T, s) ids and (T, s) bool mask or None to (T, d) means."""
    size = bags.shape[1]
    if weight.dtype in (torch.float32, torch.float64):
        offsets = torch.arange(0, bags.numel() + 1, size, device=bags.device)
        return _sum_bags(weight, bags.flatten(), offsets, attended).div_(_counts(bags, attended))
    # `torch.embedding_bag` rounds a low-precision sum before it is divided.
    means = weight.new_empty(bags.shape[0], weight.shape[1])
    for rows in _chunks(means):
        seen = None if attended is None else attended[rows]
        sums = torch.zeros_like(means[rows], dtype=torch.float32)
        for k in range(size):
            tokens = weight.index_select(0, bags[rows, k]).float()  # added as they are, they take twice the time
            sums += tokens if seen is None else tokens.mul_(seen[:, k, None])
        means[rows] = sums.div_(_counts(bags[rows], seen))
    return means


def _gradient(
    grad_output: Tensor, bags: Tensor, attended: Tensor | None, vocabulary: int, padding_idx: int | None
) -> Tensor:
    """(T, d) gradient of the means to the (V, d) gradient of the weight."""
    # The gradient of one row of the weight is itself a bag: a sum over the positions where its id occurs. So it is
    # summed in float32 and written once, also in bfloat16. There torch's own gradient of an embedding adds position
    # after position to a bfloat16 row, and loses what a frequent token gets.
    ids, size = bags.flatten(), bags.shape[1]
    grads = (grad_output / _counts(bags, attended)).contiguous()
    if grads.is_cuda:
        # On a GPU `embedding_bag` sums a bag in one thread, position after position: a frequent id would take long.
        # torch's gradient of its own bags sums parts of a bag side by side, in float32 too.
        of_bag = torch.arange(ids.numel(), device=ids.device) // size
        seen = None if attended is None else attended.flatten().to(grads.dtype)
        unused = of_bag[:0]  # what means and maxima need
        gradient_of_bags: Any = torch.ops.aten._embedding_bag_dense_backward
        grad_weight = gradient_of_bags(grads, ids, of_bag, unused, unused, vocabulary, False, 0, seen)
    else:
        order = ids.argsort()
        # Where each id's positions begin is how many ids are lower. To count them is faster than to search.
        offsets = torch.zeros(vocabulary + 1, device=ids.device, dtype=ids.dtype)
        offsets = offsets.scatter_add_(0, ids + 1, torch.ones_like(ids)).cumsum(0)
        seen = None if attended is None else attended.flatten()[order]
        grad_weight = _sum_bags(grads, order // size, offsets, seen)
    if padding_idx is not None:
        grad_weight[padding_idx] = 0
    return grad_weight


_mean_operator = torch.library.custom_op('composer_tst::bag_mean', _mean, mutates_args=())
_gradient_operator = torch.library.custom_op('composer_tst::bag_mean_gradient', _gradient, mutates_args=())


@_mean_operator.register_fake
def _(weight: Tensor, bags: Tensor, attended: Tensor | None) -> Tensor:
    return weight.new_empty(bags.shape[0], weight.shape[1])


@_gradient_operator.register_fake
def _(grad_output: Tensor, bags: Tensor, attended: Tensor | None, vocabulary: int, padding_idx: int | None) -> Tensor:
    return grad_output.new_empty(vocabulary, grad_output.shape[1])


def _counts(bags: Tensor, attended: Tensor | None) -> Tensor | int:
    """How many tokens each of the bags averages: (T, 1), or one number for all."""
    return bags.shape[1] if attended is None else attended.sum(1, keepdim=True).clamp_min(1)


def _sum_bags(table: Tensor, rows: Tensor, offsets: Tensor, attended: Tensor | None) -> Tensor:
    """Sums of the attended `table[rows]` between each two of the offsets."""
    weights = None if attended is None else attended.flatten().to(table.dtype)  # 0 or 1 each
    return torch.embedding_bag(table, rows, offsets, mode=0, per_sample_weights=weights, include_last_offset=True)[0]


def _chunks(means: Tensor) -> list[slice]:
    """Runs of rows that cover (T, d) means."""
    if means.device.type != 'cpu':
        return [slice(None)]
    step = max(1, _CHUNK_ELEMENTS // max(1, means.shape[1]))
    return [slice(start, start + step) for start in range(0, means.shape[0], step)]
