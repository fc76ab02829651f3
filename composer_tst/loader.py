"""Drawing the s-fold data: a train loader that yields several of its batches as one."""

import copy
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import wrapt
from streaming import StreamingDataset

from composer_tst.ops.fold import check_kinds, is_plain

log = logging.getLogger(__name__)


class Resumption(NamedTuple):
    """Where the next iteration begins.

    Attributes:
        drawn: The loader batches of the epoch that are drawn already.
        steps: The steps these made, if the trainer draws them again, only to pass over them; 0 if the dataset goes on
            after these batches by itself, as a StreamingDataset does.
    """

    drawn: int = 0
    steps: int = 0


class BagLoader(wrapt.ObjectProxy):
    """A stand-in for a train loader that joins the batches of one step, and counts what it draws.

    In all but iteration it is the loader itself: its type, length, dataset and sampler, so that Composer's
    resumption, sampler seeding and checkpoints see what they would see without it; a copy is one of the loader.

    At the end of an epoch fewer batches than a step needs may be left. They make a smaller step, or none if the
    loader has ``drop_last``. Rows that cannot be joined to a whole row of bags are left out. Either way the
    number of samples left out is counted. They are not carried into the next step or epoch: a StreamingDataset's state
    in a checkpoint counts samples within one epoch, so a run resumed there could not draw them again.

    Args:
        loader: The train loader.
        joins_rows: Whether a step's rows are joined in groups of as many as it draws batches.
        limit: The batches to draw in an epoch, or None for all.
        resumption: Where the first epoch begins.

    Attributes:
        draws: The loader batches that the next step draws; to be set before it is drawn.
        drawn: The loader batches drawn in this epoch.
        left_out: The samples left out so far, on this rank.
        yielded: Whether a batch was yielded; set it to False where that is noted.
        passing_over: Whether the steps drawn are ones that the trainer is to pass over. Set it to False where it trains
            on one of them: the epoch then goes on from there.
        ended: What is called when an epoch has no further step.
    """

    # What the class has, wrapt keeps on the stand-in; all else is the loader's.
    draws = 1
    drawn = 0
    left_out = 0
    yielded = False
    passing_over = False
    joins_rows = False
    limit: int | None = None
    resumption = Resumption()
    ended: Callable[[], None] = staticmethod(lambda: None)
    warned = False

    def __init__(self, loader: Iterable[Any], joins_rows: bool, limit: int | None, resumption: Resumption):
        super().__init__(loader)
        self.joins_rows = joins_rows
        self.limit = limit
        self.resumption = resumption

    def __copy__(self) -> Any:
        return copy.copy(self.__wrapped__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__reduce_ex__(protocol)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batch of each step."""
        drawn, steps = self.resumption
        self.drawn = 0 if steps else drawn
        batches = iter(self.__wrapped__)
        if self.limit is not None and self.drawn >= self.limit:
            # All of the epoch was drawn before. But as it begins, a dataset counts its epochs and takes up its state.
            next(batches, None)
        else:
            for batch in itertools.chain(self._pass_over(batches, drawn, steps), self._steps(batches)):
                self.yielded = True
                yield batch
        self.resumption = Resumption()
        self.ended()

    def _pass_over(self, batches: Iterator[Any], drawn: int, steps: int) -> Iterator[Any]:
        """As many steps as the trainer passes over, until ``drawn`` batches are drawn."""
        group: list[Any] = []
        self.passing_over = steps > 0
        for step in range(steps):
            # A trainer that does not pass over them trains on the first.
            draws = min(self.draws, drawn - steps + 1) if step == 0 else 1
            if self.drawn < drawn:
                group = self._draw(batches, max(1, draws))
            if not group:  # the epoch is shorter than it was
                return
            yield merge_batches(group) if len(group) > 1 else group[0]
            if not self.passing_over:
                return
        # The trainer has put back the random numbers of the coming step.
        with same_random_numbers():
            self._draw(batches, drawn - self.drawn)
        self.passing_over = False

    def _steps(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            draws = self.draws
            group = self._draw(batches, draws)
            if not group:
                return
            if draws == 1:
                yield group[0]
                continue
            batch = merge_batches(group)
            rows = len(batch['input_ids'])
            used = self._usable_rows(rows, complete=len(group) == draws, draws=draws)
            self._leave_out(rows - used, draws)
            if used:
                yield {key: value if is_plain(value) else value[:used] for key, value in batch.items()}

    def _draw(self, batches: Iterator[Any], count: int) -> list[Any]:
        # A StreamingDataset may have a batch more than its loader's length: no epoch draws it.
        if self.limit is not None:
            count = min(count, self.limit - self.drawn)
        group = list(itertools.islice(batches, max(0, count)))
        self.drawn += len(group)
        return group

    def _usable_rows(self, rows: int, complete: bool, draws: int) -> int:
        if not complete and getattr(self.__wrapped__, 'drop_last', False):
            return 0
        return rows - rows % draws if self.joins_rows else rows

    def _leave_out(self, rows: int, draws: int) -> None:
        self.left_out += rows
        if rows and not self.warned:
            self.warned = True
            log.warning(
                '%d samples on this rank are left out, because they do not fill a step that reads %d batches; '
                'superposition/samples_left_out counts them from here.',
                rows,
                draws,
            )


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Draw without a trace in the random numbers to come."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


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
    check_kinds(first)
    for key, value in first.items():
        values: list[Any] = [batch[key] for batch in batches]
        if isinstance(value, torch.Tensor) and value.ndim:
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


def check_epoch_is_whole(loader: Any, length: int, drawn: int) -> None:
    """Refuse an epoch cut short: a StreamingDataset that fails to read a shard ends the epoch with no error.

    Args:
        loader: The train loader.
        length: The batches it has in an epoch.
        drawn: The batches it gave in this one.

    Raises:
        RuntimeError: If the loader has given fewer batches than its length, by more than one a worker.
    """
    dataset = getattr(loader, 'dataset', None)
    # By other methods, batches leave out rows of each stream.
    if not isinstance(dataset, StreamingDataset) or dataset.batching_method != 'random':
        return
    if drawn < length - max(1, getattr(loader, 'num_workers', 0)):
        raise RuntimeError(
            f'The epoch ended after {drawn} of {length} loader batches: if data could not be read, the reason is '
            'above; resume once it can be.'
        )
