"""The method without a Trainer: fold, embed, predict. It needs torch alone."""

from composer_tst.embedding import bag_embedding
from composer_tst.folding import fold_batch
from composer_tst.loss import multi_hot_cross_entropy

__all__ = ['bag_embedding', 'fold_batch', 'multi_hot_cross_entropy']
