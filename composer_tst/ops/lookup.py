"""The lookup of an embedding while its ids may stand for bags.

The model gets one id for each bag. An id ``BASE + k`` means bag ``k`` of the batch. Ids below ``BASE`` are plain
tokens. No table is as long as ``BASE``, and int32 holds it.

:func:`swap` puts :class:`BagLookup` beneath an embedding's class, as FSDP2's ``fully_shard`` changes a module's class.
It looks a bag up as the mean of its embeddings, and a plain token as ever. So a view, a copy or a recomputation of the
ids comes out right, in eager and compiled models. Parameters, buffers and state-dict keys do not change.
"""

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from composer_tst.ops.embedding import mean_of_bags

BASE = 1 << 30


def stands_for_bags(value: Tensor) -> bool:
    """Whether a tensor holds ids that stand for bags."""
    return value.dtype in (torch.int32, torch.int64) and bool((value >= BASE).any())


class BagLookup(nn.Embedding):
    """Look up bags beneath whatever else an embedding does.

    Attributes:
        superposed_bags: The token ids ``(T, s)``, and a mask of the attended tokens ``(T, s)``, None if all are.
        superposed_class: The embedding's class without this one.
    """

    superposed_bags: tuple[Tensor, Tensor | None]
    superposed_class: type[nn.Embedding]

    def forward(self, input: Tensor) -> Tensor:
        """Look up ``input``, ids of bags and of tokens: embeddings of shape ``input.shape + (d,)``."""
        weight = self.weight  # read once: a parametrisation computes it at each read
        if isinstance(weight, DTensor):  # not of FSDP, which has made the weight whole by now
            raise ValueError(
                'The input embedding is divided by tensor parallelism, and superposition needs it whole: leave it out '
                'of the layer plan.'
            )
        ids, mask = self.superposed_bags
        attended = None
        # In half precision a plain id needs no mask: the float32 mean of a token, taken s times, is exactly that token.
        if mask is not None or weight.dtype not in (torch.float16, torch.bfloat16):
            attended = _bag_mask(input, mask, ids.shape[1])
        return mean_of_bags(weight, self.padding_idx, _bag_tokens(input, ids), attended)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save the embedding as it is without bags."""
        del protocol  # from protocol 2 on, pickle compares the classes
        return _as_plain(self, lambda: self.__reduce_ex__(1))

    def __deepcopy__(self, memo: Any) -> Any:
        """Copy the embedding as it is without bags."""
        return _as_plain(self, lambda: copy.deepcopy(self, memo))


@torch.library.custom_op('composer_tst::bag_tokens', mutates_args=())
def _bag_tokens(input: Tensor, ids: Tensor) -> Tensor:
    """For a bag's id the tokens of its bag, of ``ids`` ``(T, s)``. For a plain id that id ``s`` times."""
    bags = ids.to(input)[(input - BASE).clamp_(min=0)]
    return torch.where((input >= BASE)[..., None], bags, input[..., None])


@_bag_tokens.register_fake
def _(input: Tensor, ids: Tensor) -> Tensor:
    return input.new_empty(*input.shape, ids.shape[1])


@torch.library.custom_op('composer_tst::bag_mask', mutates_args=())
def _bag_mask(input: Tensor, mask: Tensor | None, size: int) -> Tensor:
    """Which of these tokens are attended. Of a bag those of ``mask`` ``(T, s)``, or all. Of a plain id the first."""
    stands = (input >= BASE)[..., None]
    first = torch.arange(size, device=input.device) == 0
    if mask is None:
        return stands | first
    return torch.where(stands, mask.to(input.device)[(input - BASE).clamp_(min=0)], first)


@_bag_mask.register_fake
def _(input: Tensor, mask: Tensor | None, size: int) -> Tensor:
    return input.new_empty(*input.shape, size, dtype=torch.bool)


# One class for each class of embeddings, so that a compiler compiles for it once.
_LOOKUP_CLASSES: dict[type[nn.Embedding], type[nn.Embedding]] = {nn.Embedding: BagLookup}


def swap(table: Any, bags: tuple[Tensor, Tensor | None]) -> None:
    """Have an embedding look up bags of tokens ``(T, s)``, with the mask of those that are attended."""
    plain = type(table)
    if plain not in _LOOKUP_CLASSES:
        # BagLookup comes after the class, so that its super().forward() finds it. The copy methods come before.
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
    """Call a function while an embedding looks up no bags."""
    bags = table.superposed_bags
    swap_back(table)
    try:
        return call()
    finally:
        swap(table, bags)
