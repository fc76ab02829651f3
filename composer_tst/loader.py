"""Drawing the s-fold data: a train loader that yields several of its batches as one."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import wrapt
from composer.utils import dist
from streaming import StreamingDataset

from composer_tst.folding import is_plain

log = logging.getLogger(__name__)


class BagLoader(wrapt.ObjectProxy):
    """A stand-in for a train loader that joins the batches of one step.

    In all but iteration it is the loader itself: its type, length, dataset and sampler, so that Composer's
    resumption, sampler seeding and checkpoints see what they would see without it.

    At the end of an epoch fewer batches than a step needs may be left. They make a smaller step, or none if the
    loader has ``drop_last``. Rows that cannot be joined to a whole row of bags are left out. Either way the
    number of samples left out is logged. They are not carried into the next epoch: a StreamingDataset's state in a
    checkpoint counts samples within one epoch, so a run resumed there could not draw them again.

    Args:
        loader: The train loader.
        draws_at: Given the index of a step in the epoch, how many batches it draws.
        begins_at: The step and the loader batch of the epoch with which the next iteration begins: not 0 where a
            dataset resumes in the middle of an epoch by itself.
        joins_rows: Whether a step's rows are joined in groups of as many as it draws batches.
        limit: The batches to draw in an epoch, or None for all.
        leave_out: Told the number of samples left out at the end of an epoch, where there are any.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        draws_at: Callable[[int], int],
        begins_at: Callable[[], tuple[int, int]],
        joins_rows: bool,
        limit: int | None,
        leave_out: Callable[[int], None],
    ):
        super().__init__(loader)
        self._self_draws_at = draws_at
        self._self_begins_at = begins_at
        self._self_joins_rows = joins_rows
        self._self_limit = limit
        self._self_leave_out = leave_out
        self._self_step = 0

    @property
    def step(self) -> int:
        """The index in the epoch of the step whose batch was yielded last."""
        return self._self_step

    def __iter__(self) -> Iterator[Any]:
        """Yield the batch of each step."""
        first_step, drawn = self._self_begins_at()
        # A StreamingDataset may have a batch more than its loader's length: no epoch draws it, nor does a resumed one.
        limit = None if self._self_limit is None else max(0, self._self_limit - drawn)
        batches = itertools.islice(self.__wrapped__, limit)
        for step in itertools.count(first_step):
            draws = self._self_draws_at(step)
            group = list(itertools.islice(batches, draws))
            if not group:
                return
            self._self_step = step
            if draws == 1:
                yield group[0]
                continue
            batch = merge_batches(group)
            rows = len(batch['input_ids'])
            used = self._usable_rows(rows, complete=len(group) == draws, draws=draws)
            if used:
                yield {key: value if is_plain(value) else value[:used] for key, value in batch.items()}
            # After the step: a checkpoint of it has not counted them, and a run that resumes there draws them again.
            if used < rows:
                log.warning(
                    'The last %d samples of the epoch on this rank are left out: they do not fill a step that '
                    'reads %d batches.',
                    rows - used,
                    draws,
                )
                self._self_leave_out(rows - used)

    def _usable_rows(self, rows: int, complete: bool, draws: int) -> int:
        if not complete and getattr(self.__wrapped__, 'drop_last', False):
            return 0
        return rows - rows % draws if self._self_joins_rows else rows


def merge_batches(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join loader batches, one after another, along the rows.

    Args:
        batches: Mappings of tensors ``(rows, ...)``, lists one entry a row, and plain numbers, strings or flags.

    Returns:
        dict: The same keys; tensors and lists are as long as all batches together.

    Raises:
        ValueError: If the batches are no mappings with input_ids, or differ in their keys, row lengths or
            plain values.
    """
    first = batches[0]
    for batch in batches:
        if not isinstance(batch, Mapping) or 'input_ids' not in batch:
            kind = ', '.join(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f'The train loader yields {kind}: superposition needs a mapping with input_ids and labels.'
            )
        if batch.keys() != first.keys():
            raise ValueError(
                f'Of the batches of one step one has {", ".join(first)}, another {", ".join(batch)}: have the collator '
                'give all of them the same.'
            )
    merged: dict[str, Any] = {}
    for key, value in first.items():
        values: list[Any] = [batch[key] for batch in batches]
        if isinstance(value, torch.Tensor):
            if any(not isinstance(v, torch.Tensor) or v.shape[1:] != value.shape[1:] for v in values):
                shapes = [tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in values]
                raise ValueError(f'{key} comes in shapes {shapes}: have the collator pad every batch to one length.')
            merged[key] = torch.cat(values)
        elif isinstance(value, (list, tuple)):
            merged[key] = list(itertools.chain.from_iterable(values))
        elif all(v == value for v in values):
            merged[key] = value
        else:
            raise ValueError(f'{key} differs between the batches of one step ({values}): leave it out of the batch.')
    return merged


def check_epoch_is_whole(loader: Any, length: int, samples: int) -> None:
    """Refuse an epoch cut short: a StreamingDataset that fails to read a shard ends the epoch with no error.

    Args:
        loader: The train loader.
        length: The batches it has in an epoch.
        samples: The samples it gave in this one, over all ranks.

    Raises:
        RuntimeError: If the loader has yielded fewer batches than its length, by more than one a worker.
    """
    dataset = getattr(loader, 'dataset', None)
    if not isinstance(dataset, StreamingDataset):
        return
    # Where ranks share samples, their number says nothing of the batches. By other methods, batches leave out rows of
    # each stream.
    if (dataset.replication or 1) > 1 or dataset.batching_method != 'random':
        return
    batches = -(-samples // (loader.batch_size * dist.get_world_size()))
    if batches < length - max(1, loader.num_workers):
        raise RuntimeError(
            f'The epoch ended after {batches} of {length} loader batches: if data could not be read, the reason is '
            'above; resume once it can be.'
        )
