"""Bag embedding: the input of one s-token is the mean of its tokens' embeddings.

Token-Superposition Training (Peng, Gigant, Quesnelle, arXiv 2605.06546) sums in float32 and casts back.
"""

import torch
from torch import Tensor, nn


def bag_embedding(embedding: nn.Module | Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean embedding of the attended tokens of each bag.

    Args:
        embedding: an `nn.Embedding`, or another module with a (V, d) `.weight`, or that weight.
        input_ids: (..., s) int64, each in [0, V).
        mask: (..., s), nonzero where a token is attended to; None if all are.

    Returns:
        (..., d) in the weight's dtype; zeros for a bag with no attended token.
    """
    weight = embedding if isinstance(embedding, Tensor) else embedding.weight
    padding_idx = None if isinstance(embedding, Tensor) else getattr(embedding, 'padding_idx', None)
    total = torch.zeros((*input_ids.shape[:-1], weight.shape[1]), dtype=torch.float32, device=weight.device)
    for k in range(input_ids.shape[-1]):
        tokens = nn.functional.embedding(input_ids[..., k], weight, padding_idx).float()
        total = total + (tokens if mask is None else tokens * mask[..., k, None].bool())
    if mask is None:
        return (total / input_ids.shape[-1]).to(weight.dtype)
    return (total / mask.bool().sum(-1, keepdim=True).clamp_min(1)).to(weight.dtype)
