"""Bags in any module's input embedding, for one forward and backward pass.

The model gets one id for each bag (see ``lookup.py``). Its first call on such ids is watched (see ``watch.py``).
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from composer_tst.ops.embedding import NOT_FOR_BAGS
from composer_tst.ops.lookup import BASE, BagLookup, swap, swap_back
from composer_tst.ops.watch import FirstCall, is_watched, take_stand_ins_off, version_of, watch_again

# Values for the loss and for counting. A model's forward does not take them.
_NOT_FOR_FORWARD = ('labels', 'bag_mask', 'total_tokens', 'loss_generating_tokens')


class superposed:
    """Have a model's input embedding look up bags, for the forward and backward pass in a ``with`` block.

    .. code-block:: python

        with superposed(model, folded) as inputs:
            logits = model(**inputs).logits
            loss = multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))
            loss.backward()  # inside: recomputed activations look bags up too

    The first call of a model in such a block is made twice; so is the first in evaluation mode. The first of the two
    is watched: it refuses a model that reads the ids by value, or writes to them. It has no gradient and is not
    compiled. It changes no bit of the second. Random numbers (of torch, numpy and ``random``), buffers, and values that
    modules keep are put back. It cannot see a branch that is first taken later.

    Args:
        model: The module that is called in the block: wrapped, sharded, compiled or plain.
        folded: A batch that :func:`~composer_tst.functional.fold_batch` has made: ``input_ids`` ``(B, P, s)``, or
            ``(B, P)`` for ``superpose: output``. With bags of one token nothing is changed.
        embedding: The module that looks the ids up. By default that of ``get_input_embeddings``, else the only
            ``nn.Embedding`` of the model.

    Yields:
        dict: The inputs of the model: ``input_ids`` ``(B, P)``, ``attention_mask`` and the rest, without labels.

    Raises:
        ValueError: On entering, if the model has no such embedding, if its embedding has an option that is not defined
            for bags, if the batch is not folded, or if another block is open on the model. In the block, if the model
            reads or changes the ids, or does not look them up. On leaving, if the ids were changed in place, or the
            model was not called.
    """

    def __init__(self, model: nn.Module, folded: Mapping[str, Any], embedding: nn.Embedding | None = None):
        _check_folded(folded)
        self._model = model
        self._ids: Tensor = folded['input_ids']
        self._mask: Tensor | None = folded.get('bag_mask')
        self._rest = {key: value for key, value in folded.items() if key not in (*_NOT_FOR_FORWARD, 'input_ids')}
        self._embedding = embedding
        self._tables: list[nn.Embedding] = []
        self._first_call: FirstCall | None = None

    def __enter__(self) -> dict[str, Any]:
        self._given = self._ids if self._ids.ndim == 2 else self._ids[..., 0]
        if self._ids.ndim == 3 and self._ids.shape[2] > 1:
            embedding = find_embedding(self._model) if self._embedding is None else self._embedding
            self._tables = tables_of(self._model, embedding)
            self._given = BASE + torch.arange(self._given.numel(), dtype=self._ids.dtype, device=self._ids.device)
            self._given = self._given.view(self._ids.shape[:2])
            mask = None if self._mask is None else self._mask.flatten(0, 1) != 0
            try:
                for table in self._tables:
                    swap(table, (self._ids.flatten(0, 1), mask))
            except BaseException:
                self.restore()
                raise
        if (self._tables or self._ids.ndim == 2) and not is_watched(self._model, bool(self._tables)):
            self._first_call = FirstCall(self._model, self._given, self._tables)
        self._version = version_of(self._given)
        return {'input_ids': self._given, **self._rest}

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        self.restore()
        if kind is not None or not self._tables:
            return
        name = type(self._model).__name__
        if self._first_call is not None and not self._first_call.was_called:
            raise ValueError(
                f'superposed was given {name}, which was not called on the inputs of its block, or in a compiled '
                'function alone: give it the module that you call, and the first time call that outside of compiled '
                'functions.'
            )
        if version_of(self._given) != self._version:
            raise ValueError(
                f'The ids of a superposed batch were changed in place in the pass of {name}. Each stands for a bag: '
                'change tokens before the batch is folded.'
            )

    def follow_labels(self, labels: Tensor) -> None:
        """Have the watched call refuse a model that reads these labels. It may hand them on."""
        if self._first_call is not None:
            self._first_call.labels.append(labels)

    def restore(self) -> None:
        """Put the model back as it was, wherever the pass has ended."""
        for table in self._tables:
            swap_back(table)
        if self._first_call is not None:
            self._first_call.take_off()


def find_embedding(model: nn.Module) -> nn.Embedding:
    """The module in which a model looks up its token ids.

    The outermost ``get_input_embeddings`` gives it. Without one, it is the model's only ``nn.Embedding``. Wrappers
    (FSDP, activation checkpointing, ``torch.compile``) are looked through.

    Raises:
        ValueError: If there is not exactly one.
    """
    found: nn.Module = model
    for module in model.modules():
        if hasattr(module, 'get_input_embeddings'):
            with contextlib.suppress(NotImplementedError):  # a base class may not know
                given = module.get_input_embeddings()  # pyright: ignore[reportCallIssue]
                found = given if isinstance(given, nn.Module) else model
                break
    embeddings = [module for module in found.modules() if isinstance(module, nn.Embedding)]
    if len(embeddings) != 1:
        raise ValueError(
            f'{type(model).__name__} has {len(embeddings)} nn.Embedding modules where its input embedding is looked '
            'for: define get_input_embeddings() on it to return the nn.Embedding that token ids go through.'
        )
    return embeddings[0]


def restore(model: nn.Module) -> None:
    """Put a model back as it was, wherever a pass has ended, and watch its next call."""
    for module in model.modules():
        swap_back(module)
    take_stand_ins_off(model)
    watch_again(model)


def _check_folded(folded: Any) -> None:
    """Refuse, with a ValueError, what fold_batch has not made."""
    batch: Any = folded if isinstance(folded, Mapping) else {}
    ids, labels = batch.get('input_ids'), batch.get('labels')
    dimensions = [value.ndim if isinstance(value, Tensor) else 0 for value in (ids, labels)]
    if (dimensions[0] != 3 and dimensions != [2, 3]) or ids.dtype not in (torch.int64, torch.int32):
        given = f'input_ids of {ids.dtype}, {tuple(ids.shape)}' if isinstance(ids, Tensor) else 'no tensor of input_ids'
        raise ValueError(
            f'superposed was given {given}: give it a batch of int64 or int32 ids that fold_batch has made.'
        )


def tables_of(model: nn.Module, embedding: nn.Embedding) -> list[nn.Embedding]:
    """The embeddings that ids may be looked up in: the input embedding first, and all others of its length.

    Raises:
        ValueError: If one has an option that is not defined for bags, or looks bags up already.
    """
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f'embedding is a {type(embedding).__name__}: give the nn.Embedding that {type(model).__name__} looks token '
            'ids up in.'
        )
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = [embedding, *(e for e in found if e is not embedding and e.num_embeddings == embedding.num_embeddings)]
    for table in tables:
        if isinstance(table, BagLookup):
            raise ValueError(
                f'{type(model).__name__} is superposed already: leave one block of superposed before the next.'
            )
        for option in NOT_FOR_BAGS:
            if getattr(table, option):
                raise ValueError(
                    f'An embedding of {type(model).__name__} has {option}, which is not defined for bags: '
                    'make it without.'
                )
    return tables
