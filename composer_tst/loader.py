"""The data of a step: several loader batches as one, and what was drawn of the epoch."""

import copy
import itertools
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import wrapt
from composer.core import State, Timestamp, TimeUnit
from composer.utils import dist
from streaming import StreamingDataset

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


class Drawn(NamedTuple):
    """What was drawn for a step that the trainer has not trained on yet.

    Attributes:
        draws: The loader batches that the step asked for.
        shape: The rows of its batch and their length, None if they cannot be told.
        drawn: The loader batches drawn in the epoch, with it.
        left_out: The samples left out so far, with it.
    """

    draws: int
    shape: tuple[int, ...] | None
    drawn: int
    left_out: int


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
        draws_at: The loader batches that a step draws, by its number in the run. Somebody may read ahead of the step.
        clock: What the Trainer's clock shows.
        ended: What to call when an epoch has no further step.

    Attributes:
        drawn: The loader batches drawn in this epoch.
        left_out: The samples left out so far, on this rank.
        pending: What was drawn and not trained on yet, to be taken step by step. It travels beside the batches, which
            somebody else may wrap, copy or hold back.
        retired: Whether another stand-in, around this one, joins the batches: this one hands them on.
        trained_on: Whether a step of this epoch was trained on. Another ``iter()`` then only looks at the data, and
            counts nothing.
        replaying: Whether the steps drawn are ones that the trainer is to pass over. Set it to False where it trains on
            one of them: the epoch then goes on from there.
    """

    # What the class names, wrapt keeps on the stand-in; all else is the loader's.
    joins_rows = retired = trained_on = replaying = False
    drawn = left_out = 0
    limit = resumption = draws_at = clock = ended = pending = cast(Any, None)

    def __init__(
        self,
        loader: Iterable[Any],
        joins_rows: bool,
        limit: int | None,
        resumption: Resumption,
        draws_at: Callable[[int], int],
        clock: Callable[[], Timestamp] = Timestamp,
        ended: Callable[[], None] = lambda: None,
    ):
        super().__init__(loader)
        self.joins_rows, self.limit, self.resumption = joins_rows, limit, resumption
        self.draws_at, self.clock, self.ended = draws_at, clock, ended
        self.pending: deque[Drawn] = deque()

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
        if self.trained_on and int(self.clock().batch_in_epoch) > 0:
            a_look = (self.joins_rows, self.limit, Resumption(), self.draws_at, self.clock)
            yield from BagLoader(self.__wrapped__, *a_look)
            return
        self.trained_on = False
        self.pending.clear()
        drawn, steps, _ = self.resumption
        self.drawn = 0 if steps else drawn
        batches = iter(self.__wrapped__)
        if self.limit is not None and self.drawn >= self.limit:
            # All of the epoch was drawn before. But as it begins, a dataset counts its epochs and takes up its state.
            next(batches, None)
        else:
            yield from self._replay(batches, drawn, steps)
            yield from self._steps(batches)
        self.resumption, self.trained_on = Resumption(), False
        self.ended()

    def _replay(self, batches: Iterator[Any], drawn: int, steps: int) -> Iterator[Any]:
        """Draw as many steps as the trainer passes over, until ``drawn`` batches are drawn."""
        group: list[Any] = []
        self.replaying = steps > 0
        # A trainer that does not pass over them trains on the first.
        draws = max(1, min(self.draws_at(int(self.clock().batch)), drawn - steps + 1))
        for _ in range(steps):
            if self.drawn < drawn:
                group = self._draw(batches, draws)
            if not group:  # the epoch is shorter than it was
                return
            yield merge_batches(group) if len(group) > 1 else group[0]
            if not self.replaying:
                return
            draws = 1
        # The trainer has put back the random numbers of the coming step.
        with same_random_numbers():
            self._draw(batches, drawn - self.drawn)
        self.replaying = False

    def _steps(self, batches: Iterator[Any]) -> Iterator[Any]:
        for step in itertools.count(int(self.clock().batch)):
            draws = self.draws_at(max(step, int(self.clock().batch)))
            group = self._draw(batches, draws)
            if not group:
                return
            batch = group[0]
            if draws > 1:
                drops_tail = bool(getattr(self.__wrapped__, 'drop_last', False))
                batch, left_out = join_batches(group, draws, self.joins_rows, drops_tail)
                if left_out and not self.left_out:
                    log.warning(
                        f'{left_out} samples on this rank are left out, because they do not fill a step that reads '
                        f'{draws} batches; superposition/samples_left_out counts them from here.'
                    )
                self.left_out += left_out
            if batch is None:
                continue
            self.pending.append(Drawn(draws, shape_of(batch), self.drawn, self.left_out))
            yield batch

    def _draw(self, batches: Iterator[Any], count: int) -> list[Any]:
        # A StreamingDataset may have a batch more than its loader's length: no epoch draws it.
        if self.limit is not None:
            count = min(count, self.limit - self.drawn)
        group = next_batches(batches, count)
        self.drawn += len(group)
        return group


def shape_of(batch: Any) -> tuple[int, ...] | None:
    """The rows of a batch and their length, None if they cannot be told."""
    ids = ids_of(batch)
    return None if ids is None else tuple(ids.shape)


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
        self._undo = undo
        self._joins_rows = schedule.settings.expand == 'sequence'
        self._stand_in: BagLoader | None = None
        self._taken: Drawn | None = None
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

    def begin(self) -> None:
        """Stand in for the train loader, where a step draws several batches or an epoch is under way."""
        drawn, steps, _ = self._resumption
        if self._schedule.draws > 1 or (drawn > 0 and drawn != steps):
            self._install()

    def begin_epoch(self) -> None:
        """Draw from a loader that was set since the last epoch, as llm-foundry's CurriculumLearning does."""
        if self._state.dataloader is self._stand_in:
            return
        replaced, self._stand_in = self._stand_in, None
        if self._schedule.draws > 1:
            self.check_length()
            if replaced is not None:  # perhaps in what was set, around it
                replaced.retired = True
            self._install()

    def end_iteration(self) -> None:
        """Take note of an iteration in tokens that ends in the middle of an epoch: what follows begins another."""
        if self._steps:
            self._cut_short = True
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Nothing of the coming epoch is drawn."""
        self._progress.drawn, self._steps = 0, 0
        self._resumption = Resumption()
        if self._stand_in is not None:
            self._stand_in.resumption = Resumption()

    def _install(self) -> None:
        state, limit = self._state, self._batches()
        assert state.dataloader is not None
        loader = self._stand_in = BagLoader(
            state.dataloader,
            self._joins_rows,
            limit,
            self._resumption,
            self._schedule.draws_at,
            lambda: state.timestamp,
            self._let_end,
        )
        self._counted = 0
        state.set_dataloader(loader, state.dataloader_label, -1 if limit is None else limit)

        def restore() -> None:
            """The epoch under way goes on with what it has begun to iterate."""
            if state.dataloader is loader:
                limit = self._batches()
                state.set_dataloader(loader.__wrapped__, state.dataloader_label, -1 if limit is None else limit)
            else:  # perhaps in what stands around it
                loader.retired = True

        self._undo.callback(restore)

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

    def take(self, batch: Any) -> None:
        """Take what was drawn for the step that the trainer trains on ``batch``.

        Raises:
            ValueError: If that is not the data of the step: the loader was replaced, or reads ahead of a moment that
                shows only then, or the trainer has not passed over the steps it has done.
        """
        loader, self._taken = self._stand_in, None
        if loader is None:
            return
        superposed, draws = not self._schedule.finished, self._schedule.draws
        loader.trained_on = True
        loader.limit = self._batches()  # what wraps the loader may have another length
        if loader.replaying:
            loader.replaying = False
            if superposed and loader.drawn != draws:
                raise ValueError(
                    f'The run is at step {int(self._state.timestamp.batch_in_epoch)} of the epoch but its data at step '
                    '0: set spin_dataloaders: true, or use a StreamingDataset, which resumes itself.'
                )
            return
        if not loader.pending:
            if superposed:
                raise ValueError(
                    'The train loader was replaced after EPOCH_START or FIT_START, or what wraps it repeats batches. A '
                    'superposed step then has data that were not drawn for it: replace it at EPOCH_END or '
                    'ITERATION_START, and hand each batch on once.'
                )
            return
        name = type(self._state.dataloader).__name__
        taken = self._taken = loader.pending.popleft()
        unknown = [end for end in self._schedule.ends_to_come if end.unit in (TimeUnit.TOKEN, TimeUnit.SAMPLE)]
        if loader.pending and unknown:
            raise ValueError(
                f'{name} reads ahead of the step, and a phase ends at {unknown[0].to_timestring()}, which shows only '
                'then: give duration and until in ba, or do not read ahead of the train loader.'
            )
        shape = shape_of(batch)
        # Rows of another length are those of an algorithm that has cut or reshaped them.
        same_length = shape is not None and taken.shape is not None and shape[1:] == taken.shape[1:]
        wrapped = self._state.dataloader is not loader
        if taken.draws != draws or (superposed and wrapped and same_length and shape != taken.shape):
            raise ValueError(
                f'{name} hands a step a batch {shape}, and what was drawn next is {taken.shape} of {taken.draws} '
                f'loader batches, where the step needs {draws}: have what wraps the train loader hand each of its '
                'batches on, whole and in order.'
            )

    def count(self, steps: int) -> None:
        """Keep what was drawn, at the end of a step or, with no further step, of an epoch."""
        progress, loader = self._progress, self._stand_in
        progress.batch_samples = self._batch_samples()
        self._steps += steps
        if loader is None:
            progress.drawn = (progress.drawn or 0) + steps
        else:
            counts, self._taken = self._taken or loader, None
            progress.drawn = counts.drawn
            progress.left_out += (counts.left_out - self._counted) * dist.get_world_size()
            self._counted = counts.left_out

    def end_epoch(self) -> None:
        """Check the epoch that has ended.

        Raises:
            RuntimeError: If it was cut short.
            ValueError: If it made no step, so that training would never end, or what wraps the loader left some out.
        """
        state = self._state
        if self._length is not None:
            state.dataloader_len, self._length = self._length, None
        self.count(steps=0)
        if self._stand_in is not None and self._stand_in.pending:
            raise ValueError(
                f'{type(state.dataloader).__name__} has left out {len(self._stand_in.pending)} batches of the epoch: '
                'have what wraps the train loader hand each of its batches on, whole and in order.'
            )
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
        loader, settings, taken, ids = self._state.dataloader, self._schedule.settings, self._taken, ids_of(first)
        rows, length, tokens = getattr(loader, 'batch_size', None), row_length_of(first), None
        if ids is not None and ids.ndim == 2 and len(ids):
            draws = self._schedule.draws if taken is None else taken.drawn - (self._progress.drawn or 0)
            # Other algorithms may have reshaped what was drawn. If they have cut it, it is not known what a step reads.
            shape = (taken and taken.shape) or tuple(ids.shape)
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
