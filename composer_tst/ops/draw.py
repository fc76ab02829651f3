"""Drawing the s-fold data: several batches of a loader as one."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from composer_tst.ops.fold import check_bag_size, check_kinds, is_needed, is_plain


class draw:
    """Join each ``s`` batches of a loader into one.

    .. code-block:: python

        batches = draw(loader, lambda step: 6 if step < 6000 else 1)
        for batch in batches:
            folded = fold_batch(batch, batches.bag_size)

    Nothing is read ahead. The bag size of a step is asked for when the step is drawn. So a change in the middle of an
    epoch loses or repeats no row. Steps are counted over epochs.

    Batches at the end of an epoch that are too few for a step are left out. So are rows that do not fill a group of
    ``s`` rows, if a batch is smaller than the others. All samples left out are counted.

    Args:
        loader: A loader, of which each loop over this draws an epoch; or an iterator, which goes on where it stands.
            Its batches are mappings. Their values are tensors ``(rows, ...)``, lists with an entry for each row, or
            plain numbers, strings and flags.
        bag_size: Tokens in a bag, ``s``; or a function that gives it for a step, counted from 0. With 1, each batch is
            given as it is.

    Attributes:
        bag_size: The bag size of the batch drawn last.
        left_out: Samples left out so far.

    Raises:
        ValueError: If a bag size is not an integer of at least 1, or the batches of a step cannot be joined.
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


def check_batches(batches: Sequence[Any], takes: Collection[str] | None) -> None:
    """Refuse, with a ValueError, batches of one step that are no mappings with input_ids, or differ in their keys."""
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
    """The next batches of a loader, fewer at its end. The last of them is the loader's own object."""
    group: list[Any] = []
    for _ in range(count):
        if group:
            group[-1] = _kept(group[-1])  # a loader may fill one dict or one buffer for all its batches
        try:
            group.append(next(batches))  # not `for`, which calls iter(): the iterator may begin again
        except StopIteration:
            break
    return group


def _kept(batch: Any) -> Any:
    """Copy a batch, with its tensors and lists."""
    if not isinstance(batch, Mapping):
        return batch
    tensors = {key: value.clone() for key, value in batch.items() if isinstance(value, torch.Tensor)}
    return {**batch, **tensors, **{key: list(value) for key, value in batch.items() if isinstance(value, list)}}


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
        joins_rows: Whether ``s`` rows become one. Rows that do not fill such a group are then left out.
        drops_tail: Whether to leave out fewer than ``s`` batches.
        takes: The keys that the model's forward takes. None if it takes the whole batch.

    Returns:
        tuple: The batch, None if there is none; and how many rows are left out.
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


def merge_batches(batches: Sequence[Mapping[str, Any]], takes: Collection[str] | None) -> dict[str, Any]:
    """Join loader batches, one after another, along the rows.

    Args:
        batches: As those of the loader of :class:`draw`.
        takes: As for :func:`join_batches`.

    Returns:
        dict: The same keys. Tensors and lists are as long as those of all batches together. A value that cannot be
        joined is left out if nothing needs it.

    Raises:
        ValueError: If batches are no mappings with input_ids, or needed values differ in keys, row lengths or plain
            values.
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
