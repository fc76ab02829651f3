"""The method without a Trainer: fold, embed, predict. It needs torch alone."""

from collections.abc import Mapping
from typing import Any

from composer_tst import folding
from composer_tst.embedding import bag_embedding
from composer_tst.loss import multi_hot_cross_entropy

__all__ = ['bag_embedding', 'fold_batch', 'multi_hot_cross_entropy']


def fold_batch(
    batch: Mapping[str, Any], bag_size: int, expand: str = 'sequence', superpose: str = 'both'
) -> dict[str, Any]:
    """`composer_tst.folding.fold_batch`, which says what comes of a batch, for loops whose batches may have no labels.

    Args:
        batch: as there, with `input_ids` (R, L), int64 or int32. Without `labels`, every token is a target but those
            that `attention_mask` leaves out. (A Trainer's batches need them for its plain steps.)
        bag_size: tokens in a bag, `s`.
        expand: 'sequence', 'batch' or 'none': where the s-fold data goes.
        superpose: 'both', 'input' or 'output': the sides that have bags.

    Returns:
        `input_ids` (B, P, s) and `labels` (B, P, s), and whatever else the batch has, folded.

    Raises:
        ValueError: a batch or settings that cannot be folded.
    """
    if isinstance(batch, Mapping) and 'input_ids' in batch and 'labels' not in batch:
        batch = {**batch, 'labels': batch['input_ids']}
    return folding.fold_batch(batch, bag_size, expand, superpose)
