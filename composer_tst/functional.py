"""The method without a Trainer: fold, embed, predict. It needs torch alone."""

from composer_tst.ops.cross_entropy import multi_hot_cross_entropy
from composer_tst.ops.embedding import bag_embedding
from composer_tst.ops.fold import fold_batch

__all__ = ['bag_embedding', 'fold_batch', 'multi_hot_cross_entropy']
