"""The lookup of bags in place of ids, beneath whatever else an input embedding does.

The bags are for the ids that were handed over, told by their storage, and for nothing else: any other ids are looked up
as ever, in evaluation, by a callback, or in a backward pass that runs a part of the model again.
"""

import copyreg
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from composer_tst.models import with_lookup
from composer_tst.ops.embedding import bag_embedding


class BagLookup(nn.Embedding):
    """The lookup of an ``nn.Embedding`` that has bags to look up.

    Attributes:
        bags: The token ids ``(B * P, s)`` and the attended tokens ``(B * P, s)`` or None.
        handed_over: The ids ``(B, P)`` that stand for the bags.
        found: Whether a bag was looked up since the bags were handed over.
        missed: Whether other ids were.
        compiled: Whether a compiler had to take it for granted that the ids are those handed over.
        plain_class: The class without this one.
    """

    bags: tuple[torch.Tensor, torch.Tensor | None]
    handed_over: torch.Tensor
    found: bool
    missed: bool
    compiled: bool
    plain_class: type[nn.Embedding]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Mean embeddings, shape ``input.shape + (d,)``, of the bags that ``input`` stands for."""
        if isinstance(self.weight, DTensor):
            # FSDP has made the weight whole by now.
            raise ValueError(
                'The input embedding is divided by tensor parallelism, and superposition needs it whole: leave it out '
                'of the layer plan.'
            )
        at = _places(input, self.handed_over)
        if at is None:
            self.missed = True
            return super().forward(input)
        self.found = True
        if torch.compiler.is_compiling():
            self.compiled = True
        ids, mask = self.bags
        return bag_embedding(self, ids[at], mask if mask is None else mask[at]).view(*input.shape, -1)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy, and what is saved of it, is the embedding itself."""
        del protocol
        state = {key: value for key, value in vars(self).items() if key not in BagLookup.__annotations__}
        reconstruct: Any = getattr(copyreg, '_reconstructor')  # noqa: B009
        return reconstruct, (self.plain_class, object, None), state


def _places(input: torch.Tensor, handed_over: torch.Tensor) -> torch.Tensor | slice | None:
    """Which of the flat positions of ``handed_over`` the ids ``input`` are, None if they are others.

    A model may reshape, transpose or slice the ids that it is given: these are views of one storage.
    """
    if torch.compiler.is_compiling():  # which knows no storages: attach.py tries the model out without one
        return slice(None) if input.numel() == handed_over.numel() else None
    if input.untyped_storage().data_ptr() != handed_over.untyped_storage().data_ptr():
        # A backward pass that runs a part of the model again may have kept a copy of the ids, as offloading does.
        again = torch._C._current_graph_task_id() != -1 and input.numel() == handed_over.numel()
        return slice(None) if again and torch.equal(input.flatten(), handed_over.flatten()) else None
    if input.is_contiguous() and input.numel() == handed_over.numel():
        return slice(None)
    every = torch.arange(handed_over.numel(), device=input.device)
    return every.as_strided(input.size(), input.stride(), input.storage_offset()).flatten()


def change_lookup(
    embedding: nn.Embedding, bags: tuple[torch.Tensor, torch.Tensor | None], handed_over: torch.Tensor
) -> None:
    """Have an embedding look bags up for the ids handed over, until :func:`give_lookup_back`.

    Args:
        embedding: Any ``nn.Embedding``.
        bags: The token ids ``(B * P, s)``, and the attended tokens of the same shape or None.
        handed_over: The ids ``(B, P)`` that stand for them, contiguous and of a storage of their own.
    """
    if not isinstance(embedding, BagLookup):
        plain_class = type(embedding)
        _change_class(embedding, _LOOKUP_CLASSES.setdefault(plain_class, with_lookup(plain_class, BagLookup)))
        cast(BagLookup, embedding).plain_class = plain_class
    lookup = cast(BagLookup, embedding)
    lookup.bags, lookup.handed_over = bags, handed_over
    lookup.found = lookup.missed = lookup.compiled = False


def give_lookup_back(embedding: nn.Embedding) -> None:
    """Leave an embedding as it was; nothing, where it is."""
    if isinstance(embedding, BagLookup):
        plain_class = embedding.plain_class
        for name in BagLookup.__annotations__:
            vars(embedding).pop(name, None)
        _change_class(embedding, plain_class)


def _change_class(embedding: Any, cls: type) -> None:
    embedding.__class__ = cls


# One class for each, so that a compiler compiles for it once.
_LOOKUP_CLASSES: dict[type[nn.Embedding], type[nn.Embedding]] = {}
