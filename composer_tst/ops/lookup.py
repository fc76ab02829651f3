"""The lookup of an embedding while its ids may stand for bags.

A model is given one id for each bag, told by its value: ``BASE + k`` stands for the k-th bag of the batch. No table is
as long as ``BASE``, and int32 holds it. :func:`swap` puts :class:`BagLookup` beneath an embedding's class, as FSDP2's
``fully_shard`` changes a module's class. It looks up an id that stands for a bag as the mean of the bag's embeddings,
and any other id as ever. So a view, a copy or a recomputation of the ids comes out right, in eager and compiled models
alike. Parameters, buffers and state-dict keys stay as they are.
"""

import copy
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from composer_tst.ops.embedding import bag_embedding

BASE = 1 << 30


def stands_for_bags(value: Tensor) -> bool:
    """Whether a value holds ids that stand for bags."""
    return value.dtype in (torch.int32, torch.int64) and bool((value >= BASE).any())


class _Table(NamedTuple):
    """What :func:`~composer_tst.functional.bag_embedding` asks of a module."""

    weight: Tensor
    padding_idx: int | None


class BagLookup(nn.Embedding):
    """The lookup of an embedding, beneath whatever else the embedding does, while ids may stand for bags.

    Attributes:
        superposed_bags: The token ids ``(T, s)``, and the attended tokens ``(T, s)`` or None if all are.
        superposed_class: The embedding's class without this one.
    """

    superposed_bags: tuple[Tensor, Tensor | None]
    superposed_class: type[nn.Embedding]

    def forward(self, input: Tensor) -> Tensor:
        """Mean embeddings ``input.shape + (d,)`` of the bags that ``input`` stands for, or of tokens themselves."""
        weight = self.weight  # asked for once: a parametrisation computes it anew each time
        if isinstance(weight, DTensor):  # FSDP has made the weight whole by now
            raise ValueError(
                'The input embedding is divided by tensor parallelism, and superposition needs it whole: leave it out '
                'of the layer plan.'
            )
        ids, mask = self.superposed_bags
        table: Any = _Table(weight, self.padding_idx)
        tokens = _bag_tokens(input, ids)
        if mask is None and weight.dtype in (torch.float16, torch.bfloat16):
            return bag_embedding(table, tokens)  # the float32 mean of one token, taken s times, is exactly that token
        return bag_embedding(table, tokens, _bag_mask(input, mask, ids.shape[1]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is saved is the embedding itself."""
        del protocol  # those from 2 on compare the classes
        return _as_plain(self, lambda: self.__reduce_ex__(1))

    def __deepcopy__(self, memo: Any) -> Any:
        """A copy is the embedding itself."""
        return _as_plain(self, lambda: copy.deepcopy(self, memo))


@torch.library.custom_op('composer_tst::bag_tokens', mutates_args=())
def _bag_tokens(input: Tensor, ids: Tensor) -> Tensor:
    """Tokens ``input.shape + (s,)`` of the bags of ``ids`` ``(T, s)`` that are stood for; a plain id, ``s`` times."""
    bags = ids.to(input)[(input - BASE).clamp_(min=0)]
    return torch.where((input >= BASE)[..., None], bags, input[..., None])


@_bag_tokens.register_fake
def _(input: Tensor, ids: Tensor) -> Tensor:
    return input.new_empty(*input.shape, ids.shape[1])


@torch.library.custom_op('composer_tst::bag_mask', mutates_args=())
def _bag_mask(input: Tensor, mask: Tensor | None, size: int) -> Tensor:
    """Which of these tokens are attended: those of ``mask`` ``(T, s)``, or all; the first of a plain id."""
    stands = (input >= BASE)[..., None]
    first = torch.arange(size, device=input.device) == 0
    if mask is None:
        return stands | first
    return torch.where(stands, mask.to(input.device)[(input - BASE).clamp_(min=0)], first)


@_bag_mask.register_fake
def _(input: Tensor, mask: Tensor | None, size: int) -> Tensor:
    return input.new_empty(*input.shape, size, dtype=torch.bool)


# One class for each, so that a compiler compiles for it once.
_LOOKUP_CLASSES: dict[type[nn.Embedding], type[nn.Embedding]] = {nn.Embedding: BagLookup}


def swap(table: Any, bags: tuple[Tensor, Tensor | None]) -> None:
    """Have an embedding look up these bags: their tokens ``(T, s)``, and which of them are attended."""
    plain = type(table)
    if plain not in _LOOKUP_CLASSES:
        # Between the class and nn.Embedding, where its `super().forward` looks. What copies comes first.
        copies = {name: vars(BagLookup)[name] for name in ('__reduce_ex__', '__deepcopy__')}
        _LOOKUP_CLASSES[plain] = types.new_class(
            plain.__name__, (plain, BagLookup), exec_body=lambda n: n.update(copies)
        )
    vars(table).update(superposed_bags=bags, superposed_class=plain)
    table.__class__ = _LOOKUP_CLASSES[plain]


def swap_back(table: Any) -> None:
    """Leave an embedding as it was."""
    if isinstance(table, BagLookup):
        plain = table.superposed_class
        del table.superposed_class, table.superposed_bags
        table.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]


def _as_plain(table: BagLookup, call: Callable[[], Any]) -> Any:
    """Do something to a table while it is itself."""
    bags = table.superposed_bags
    swap_back(table)
    try:
        return call()
    finally:
        swap(table, bags)
