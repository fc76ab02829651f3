"""The data of a step: several loader batches as one, and what was drawn of the epoch."""

import copy
import logging
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import wrapt
from composer.core import State, Timestamp
from composer.utils import dist
from streaming import StreamingDataset

from composer_tst.compatibility import takes, unwrapped
from composer_tst.ops.draw import ids_of, join_batches, merge_batches, next_batches
from composer_tst.ops.fold import is_full
from composer_tst.schedule import Data, Progress, Schedule, too_short

log = logging.getLogger(__name__)


class Resumption(NamedTuple):
    """Where the next iteration begins.

    Attributes:
        drawn: The loader batches of the epoch that are drawn already.
        steps: Steps that Composer replays on resume; 0 if the dataset resumes by itself, as a StreamingDataset does.
        known: False if a dataset that resumes by itself does not tell how much was drawn.
    """

    drawn: int = 0
    steps: int = 0
    known: bool = True


def where_epoch_stands(
    steps: int, read: int, kept: Progress, given: int | None, samples: int | None, length: int | None
) -> Resumption:
    """Where in an epoch the data of a run go on.

    Composer draws the steps of an epoch again and passes over them. A dataset that resumes by itself goes on after the
    samples that its state in the checkpoint counts.

    Args:
        steps: The steps done in the epoch.
        read: The samples that they read.
        kept: What the checkpoint kept; nothing, if it was loaded without algorithms.
        given: The samples after which the dataset goes on by itself, None if Composer draws the steps again.
        samples: Samples of a loader batch, None if the loader does not say.
        length: Loader batches in an epoch, None if there is no end.
    """
    by_itself = given is not None
    if not (given if by_itself else steps):
        return Resumption()
    # All batches were drawn. The dataset's count is lower because the tail was left out.
    same_batches = kept.batch_samples == samples
    all_drawn = same_batches and kept.drawn is not None and length is not None and kept.drawn >= length
    if given is not None and samples and not all_drawn:
        return Resumption(given // samples)
    drawn = kept.drawn
    if drawn is None:
        drawn = max(steps, read // samples) if samples else steps
    return Resumption(drawn, 0 if by_itself else steps, known=not by_itself or kept.drawn is not None)


def samples_given(dataset: Any, time: Timestamp) -> int:
    """The samples of the epoch after which a dataset that resumes by itself goes on."""
    if not isinstance(dataset, StreamingDataset):
        return int(time.sample_in_epoch)
    saved = dataset.state_dict(0, from_beginning=False)
    given, epoch = int(saved['sample_in_epoch']), int(saved['epoch'])
    if given == int(time.batch_in_epoch) == 0 and epoch < int(time.epoch):
        # Saved at an epoch's end, it is that epoch at its beginning: have it begin the next.
        dist.barrier()  # the ranks of a node have one state
        dataset.load_state_dict({**saved, 'epoch': epoch + 1})
    return given


class BagLoader(wrapt.ObjectProxy):
    """A stand-in for a train loader in one epoch: joins the batches of each step, and counts what it draws.

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
        resumption: Where the epoch begins.
        draws: The loader batches that the coming step draws.
        takes: What the model's forward takes of a batch, None if it takes all.
        ended: What to call when the epoch has no further step.

    Attributes:
        drawn: The loader batches drawn in the epoch.
        left_out: The samples left out of it, on this rank.
        pending: For each step drawn and not trained on yet, the loader batches that it asked for.
        last: Of the step drawn last, the loader batches and the shape of the ids; None before it.
        retired: Whether the epoch is over, for whoever still iterates what stands around this one.
        trained_on: Whether a step was trained on. Another ``iter()`` then only looks at the data, and counts nothing.
        replaying: Whether the steps drawn are ones that the trainer is to pass over. Set it to False where it trains on
            one of them: the epoch then goes on from there.
    """

    # What the class names, wrapt keeps on the stand-in; all else is the loader's.
    joins_rows = retired = trained_on = replaying = False
    drawn = left_out = 0
    limit = resumption = draws = takes = ended = pending = last = cast(Any, None)

    def __init__(
        self,
        loader: Iterable[Any],
        joins_rows: bool,
        limit: int | None,
        resumption: Resumption,
        draws: Callable[[], int],
        takes: Collection[str] | None = None,
        ended: Callable[[], None] = lambda: None,
    ):
        super().__init__(loader)
        self.joins_rows, self.limit, self.resumption = joins_rows, limit, resumption
        self.draws, self.takes, self.ended = draws, takes, ended
        self.pending: list[int] = []

    def __copy__(self) -> Any:
        return copy.copy(self.__wrapped__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__reduce_ex__(protocol)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batch of each step."""
        if self.retired:
            yield from self.__wrapped__
            return
        if self.trained_on:
            yield from BagLoader(self.__wrapped__, self.joins_rows, self.limit, Resumption(), self.draws, self.takes)
            return
        drawn, steps, _ = self.resumption
        self.drawn, self.left_out, self.pending = 0 if steps else drawn, 0, []
        batches = iter(self.__wrapped__)
        if self.limit is not None and self.drawn >= self.limit:
            # All of the epoch was drawn before. But as it begins, a dataset counts its epochs and takes up its state.
            next(batches, None)
        else:
            yield from self._replay(batches, drawn, steps)
            yield from self._steps(batches)
        self.ended()

    def _replay(self, batches: Iterator[Any], drawn: int, steps: int) -> Iterator[Any]:
        """Draw as many steps as the trainer passes over, until ``drawn`` batches are drawn."""
        group: list[Any] = []
        self.replaying = steps > 0
        # A trainer that does not pass over them trains on the first.
        draws = max(1, min(self.draws(), drawn - steps + 1))
        for _ in range(steps):
            if self.drawn < drawn:
                group = self._draw(batches, draws)
            if not group:  # the epoch is shorter than it was
                return
            yield merge_batches(group, self.takes) if len(group) > 1 else group[0]
            if not self.replaying:
                return
            draws = 1
        # The trainer has put back the random numbers of the coming step.
        with same_random_numbers():
            self._draw(batches, drawn - self.drawn)
        self.replaying = False

    def _steps(self, batches: Iterator[Any]) -> Iterator[Any]:
        drops_tail = bool(getattr(self.__wrapped__, 'drop_last', False))
        while group := self._draw(batches, draws := self.draws()):
            batch = group[0]
            if draws > 1:
                batch, left_out = join_batches(group, draws, self.joins_rows, drops_tail, self.takes)
                self.left_out += left_out
            if batch is not None:
                self.pending.append(draws)
                ids = ids_of(batch)
                self.last = None if ids is None else (len(group), ids.shape)
                yield batch

    def _draw(self, batches: Iterator[Any], count: int) -> list[Any]:
        # A StreamingDataset may have a batch more than its loader's length: no epoch draws it.
        if self.limit is not None:
            count = min(count, self.limit - self.drawn)
        group = next_batches(batches, count)
        self.drawn += len(group)
        return group


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


class TrainLoader:
    """The train loader of a fit: puts a :class:`BagLoader` in its place where one is needed, and counts what is drawn.

    It stands there from the last moment before an epoch is drawn until its end, so that what somebody sets, wraps or
    looks at in between is the loader itself.

    Args:
        state: The Trainer's.
        schedule: The phases of the run, and its progress, where the counts are kept.
        fresh: Whether this Trainer has not drawn yet: a dataset's state from a checkpoint is still to be taken up.
        undo: Where to register what puts the train loader back.
    """

    def __init__(self, state: State, schedule: Schedule, fresh: bool, undo: ExitStack):
        self._state = state
        self._schedule = schedule
        self._progress = schedule.progress
        self._joins_rows = schedule.settings.expand == 'sequence'
        self._stand_in: BagLoader | None = None
        self._counted = 0  # of the samples that the stand-in has left out
        self._length: int | None = None
        self._cut_short = False
        time, given = state.timestamp, None
        if 'train' in state.dataset_resumption:
            given = samples_given(getattr(state.dataloader, 'dataset', None), time) if fresh else 0
        steps, read = int(time.batch_in_epoch), int(time.sample_in_epoch)
        samples, length = self._batch_samples(), self._batches()
        self._resumption = where_epoch_stands(steps, read, self._progress, given, samples, length)
        self._steps = steps or int(bool(given))  # of the epoch: whether there are any is what counts
        self._progress.drawn = self._resumption.drawn
        undo.callback(self._leave)

    def begin_epoch(self) -> None:
        """Stand in for the loader there is now, where a step draws several batches or an epoch is under way."""
        state, (drawn, steps, _) = self._state, self._resumption
        if self._schedule.draws > 1:
            self.check_length()
        elif drawn in (0, steps):
            return
        assert state.dataloader is not None
        limit = self._batches()
        loader = BagLoader(
            state.dataloader,
            self._joins_rows,
            limit,
            self._resumption,
            lambda: self._schedule.draws,
            takes(unwrapped(state.model)),
            self._let_end,
        )
        self._stand_in, self._counted = loader, 0
        state.set_dataloader(loader, state.dataloader_label, -1 if limit is None else limit)

    def _leave(self) -> None:
        """Put the train loader back. The epoch under way goes on with what it has begun to iterate."""
        state, loader = self._state, self._stand_in
        if loader is not None:
            loader.retired = True
            if state.dataloader is loader:
                limit = self._batches()
                state.set_dataloader(loader.__wrapped__, state.dataloader_label, -1 if limit is None else limit)

    def end_iteration(self) -> None:
        """Take note of an iteration in tokens that ends in the middle of an epoch: what follows begins another."""
        if self._steps:
            self._cut_short = True
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Nothing of the coming epoch is drawn."""
        self._progress.drawn, self._steps = 0, 0
        self._resumption = Resumption()
        self._leave()
        self._stand_in = None

    def _let_end(self) -> None:
        """Have Composer end the epoch whose last step is done.

        Once an iteration has ended in the middle of an epoch, it ends only those of as many steps as loader batches,
        and would look for a step in vain for ever.
        """
        state = self._state
        if self._cut_short and state.dataloader_len is not None:
            self._length = int(state.dataloader_len)
            state.dataloader_len = int(state.timestamp.batch_in_epoch)

    def check_length(self) -> None:
        """Refuse, with a ValueError, a loader whose epoch has fewer batches than a step draws."""
        batches, draws = self._batches(), self._schedule.draws
        if batches is not None and batches < draws:
            raise too_short(batches, draws)

    def take(self) -> None:
        """Take note that the trainer trains on the step drawn last.

        Raises:
            ValueError: If it may be another: the loader was replaced once the epoch was begun, or the trainer has not
                passed over the steps it has done.
        """
        loader, draws = self._stand_in, self._schedule.draws
        if loader is None:
            return
        loader.trained_on = True
        if loader.replaying:
            loader.replaying = False
            if not self._schedule.finished and loader.drawn != draws:
                raise ValueError(
                    f'The run is at step {int(self._state.timestamp.batch_in_epoch)} of the epoch but its data at step '
                    '0: set spin_dataloaders: true, or use a StreamingDataset, which resumes itself.'
                )
            return
        pending, loader.pending = loader.pending, []
        if pending != [draws]:
            raise ValueError(
                'The train loader was replaced or wrapped after the last callback of EPOCH_START, so that a step may '
                'have data that were not drawn for it: do that in a callback that the Trainer has before it fits.'
            )

    def count(self, steps: int) -> None:
        """Keep what was drawn, at the end of a step or, with no further step, of an epoch."""
        progress, loader = self._progress, self._stand_in
        progress.batch_samples = self._batch_samples()
        self._steps += steps
        if loader is None:
            progress.drawn = (progress.drawn or 0) + steps
            return
        progress.drawn = loader.drawn
        left_out, self._counted = loader.left_out - self._counted, loader.left_out
        if left_out and not progress.left_out:
            log.warning(
                f'{left_out} samples on this rank are left out, because they do not fill a step that reads '
                f'{self._schedule.draws} batches; superposition/samples_left_out counts them from here.'
            )
        progress.left_out += left_out * dist.get_world_size()

    def end_epoch(self) -> None:
        """Check the epoch that has ended.

        Raises:
            RuntimeError: If it was cut short.
            ValueError: If it made no step, so that training would never end.
        """
        state = self._state
        if self._length is not None:
            state.dataloader_len, self._length = self._length, None
        self.count(steps=0)
        drawn, batches = self._progress.drawn or 0, self._batches()
        if batches is not None and self._resumption.known:
            check_epoch_is_whole(state.dataloader, batches, drawn)
        if not self._schedule.finished and not self._steps:
            raise too_short(drawn, self._schedule.draws)
        self._begin_anew()

    def _batches(self) -> int | None:
        """Loader batches in an epoch, None if there is no end."""
        return None if self._state.dataloader_len is None else int(self._state.dataloader_len)

    def _batch_samples(self) -> int | None:
        """Samples of a loader batch, all ranks together, None if the loader does not say."""
        rows: int | None = getattr(self._state.dataloader, 'batch_size', None)
        return None if rows is None else rows * dist.get_world_size()

    def data(self, first: Any = None) -> Data:
        """What a loader batch holds: by the first batch that training draws, and before by what the loader tells."""
        loader, settings, ids = self._state.dataloader, self._schedule.settings, ids_of(first)
        rows, length, tokens = getattr(loader, 'batch_size', None), row_length_of(first), None
        if ids is not None and ids.ndim == 2 and len(ids):
            # Other algorithms may have reshaped what was drawn. If they have cut it, it is not known what a step reads.
            last = None if self._stand_in is None else self._stand_in.last
            draws, shape = last or (self._schedule.draws, ids.shape)
            rows = -(-shape[0] // draws)
            if length and math.prod(shape) == ids.numel():
                tokens = rows * shape[1] * dist.get_world_size()
        bags_rows = settings.expand != 'sequence' and settings.superpose != 'output'
        return Data(
            self._batches(),
            None if rows is None else rows * dist.get_world_size(),
            tokens,
            uses_tail=not getattr(loader, 'drop_last', False),
            joined_rows=rows if self._joins_rows else None,
            row_length=length if bags_rows else None,
        )


def row_length_of(batch: Any) -> int | None:
    """Tokens in a row of a batch, None if they cannot be told or some are padding."""
    ids = ids_of(batch)
    return None if ids is None or ids.ndim != 2 or not is_full(batch.get('attention_mask')) else ids.shape[1]
