"""Drawing the s-fold data: several batches of a loader as one."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from composer_tst.ops.fold import check_bag_size, check_kinds, is_needed, is_plain


class draw:
    """Draw the batches of a loader, as many as a bag has tokens as one.

    .. code-block:: python

        batches = draw(loader, lambda step: 6 if step < 6000 else 1)
        for batch in batches:
            folded = fold_batch(batch, batches.bag_size)

    Nothing is read ahead: the bag size of a step is asked for when the step is drawn, and a change amid an epoch
    loses or repeats no row. Steps are counted over epochs. At the end of an epoch fewer batches than a step needs may
    be left: they make no step. If a batch is smaller than the others, its rows that do not fill a group of ``s`` rows
    are left out too. All samples left out are counted.

    Args:
        loader: A loader, of which each loop over this draws an epoch; or an iterator, which goes on where it stands.
            Its batches are mappings of tensors ``(rows, ...)``, lists one entry a row, and plain numbers, strings or
            flags.
        bag_size: Tokens in a bag, ``s``; or a function of the step, counted from 0, that gives it. 1 draws batch by
            batch, as the loader gives them.

    Attributes:
        bag_size: That of the batch drawn last.
        left_out: Samples left out so far, in tails.

    Raises:
        ValueError: If a bag size is no integer of at least 1, or the batches of a step cannot be joined.
    """

    def __init__(self, loader: Iterable[Any], bag_size: int | Callable[[int], int]):
        self._loader = loader
        self._bag_size_at = bag_size if callable(bag_size) else lambda step: bag_size
        self._step = 0
        self.left_out = 0
        self.bag_size = check_bag_size(self._bag_size_at(0))

    def __iter__(self) -> Iterator[Any]:
        """Yield the batch of each step."""
        batches = iter(self._loader)
        while True:
            bag_size = check_bag_size(self._bag_size_at(self._step))
            group = next_batches(batches, bag_size)
            batch = group[0] if group else None
            if bag_size > 1 and group:
                batch, left_out = join_batches(group, bag_size)
                self.left_out += left_out
            if batch is None:
                return
            self._step, self.bag_size = self._step + 1, bag_size
            yield batch


def check_batches(batches: Sequence[Any], takes: Collection[str] | None = None) -> None:
    """Refuse, with a ValueError, the batches of one step if they are no mappings with input_ids, or differ in keys."""
    first = batches[0]
    for batch in batches:
        if not isinstance(batch, Mapping) or 'input_ids' not in batch:
            kind = ', '.join(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f'The train loader yields {kind}: superposition needs a mapping with input_ids and labels.'
            )
        if not isinstance(ids := batch['input_ids'], torch.Tensor):
            raise ValueError(
                f'The train loader yields input_ids as {type(ids).__name__}: superposition needs a tensor (rows, '
                'tokens).'
            )
        if any(is_needed(key, takes) for key in batch.keys() ^ first.keys()):
            raise ValueError(
                f'Of the batches of one step one has {", ".join(first)}, another {", ".join(batch)}: have the collator '
                'give all of them the same.'
            )


def ids_of(batch: Any) -> torch.Tensor | None:
    """The token ids of a batch, None if it has no tensor of them."""
    ids = batch.get('input_ids') if isinstance(batch, Mapping) else None
    return ids if isinstance(ids, torch.Tensor) else None


def next_batches(batches: Iterator[Any], count: int) -> list[Any]:
    """The next batches of a loader, fewer at its end; a single one is the loader's own."""
    group: list[Any] = []
    for _ in range(count):
        if group:
            group[-1] = _kept(group[-1])  # a loader may fill one dict or one buffer for all its batches
        try:
            group.append(next(batches))  # no loop over them: an iterator's __iter__ may begin anew
        except StopIteration:
            break
    return group


def _kept(batch: Any) -> Any:
    """A copy of a batch, with its tensors and lists."""
    if not isinstance(batch, Mapping):
        return batch
    return {key: _copy(value) for key, value in batch.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value


def join_batches(
    batches: Sequence[Mapping[str, Any]],
    bag_size: int,
    joins_rows: bool = True,
    drops_tail: bool = True,
    takes: Collection[str] | None = None,
) -> tuple[dict[str, Any] | None, int]:
    """Join the loader batches of one step.

    Args:
        batches: As many as a bag has tokens, or fewer at the end of an epoch.
        bag_size: Tokens in a bag, ``s``.
        joins_rows: Whether ``s`` rows are to be joined into one, so that rows which do not fill such a group are left
            out.
        drops_tail: Whether fewer batches than ``s`` make no step.
        takes: As for :func:`merge_batches`.

    Returns:
        tuple: The batch, None if there is none, and the rows that are left out.
    """
    check_batches(batches, takes)
    rows = sum(len(batch['input_ids']) for batch in batches)
    used = rows - rows % bag_size if joins_rows else rows
    if not used or (drops_tail and len(batches) < bag_size):
        return None, rows
    merged = merge_batches(batches, takes)
    if used < rows:
        merged = {key: value if is_plain(value) else value[:used] for key, value in merged.items()}
    return merged, rows - used


def merge_batches(batches: Sequence[Mapping[str, Any]], takes: Collection[str] | None = None) -> dict[str, Any]:
    """Join loader batches, one after another, along the rows.

    Args:
        batches: Mappings of tensors ``(rows, ...)``, lists one entry a row, and plain numbers, strings or flags.
        takes: What the model's forward takes, if all else is left out before it; None if it takes the whole batch.

    Returns:
        dict: The same keys; tensors and lists are as long as all batches together. What cannot be joined is left out if
        nothing needs it.

    Raises:
        ValueError: If the batches are no mappings with input_ids, or what is needed of them differs in keys, row
            lengths or plain values.
    """
    check_batches(batches, takes)
    merged: dict[str, Any] = {}
    for key in batches[0]:
        try:
            merged[key] = _join_values(key, [batch[key] for batch in batches])
        except (KeyError, ValueError):
            if is_needed(key, takes):
                raise
    return merged


def _join_values(key: str, values: list[Any]) -> Any:
    for value in values:
        check_kinds({key: value})
    first = values[0]
    if isinstance(first, torch.Tensor) and first.ndim:
        if any(not isinstance(v, torch.Tensor) or v.shape[1:] != first.shape[1:] for v in values):
            shapes = [tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in values]
            raise ValueError(f'{key} comes in shapes {shapes}: have the collator pad every batch to one length.')
        return torch.cat(values)
    if all(isinstance(v, (list, tuple)) for v in values):
        return list(itertools.chain.from_iterable(values))
    if all(is_plain(v) and v == first for v in values):
        return first
    raise ValueError(f'{key} differs between the batches of one step ({values}): leave it out of the batch.')
