"""The method without a Trainer: draw, fold, embed, predict. It needs torch alone."""

from composer_tst.ops.cross_entropy import multi_hot_cross_entropy
from composer_tst.ops.draw import draw
from composer_tst.ops.embedding import bag_embedding
from composer_tst.ops.fold import fold_batch
from composer_tst.ops.superposed import superposed

__all__ = ['bag_embedding', 'draw', 'fold_batch', 'multi_hot_cross_entropy', 'superposed']
