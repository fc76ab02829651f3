"""The data of a step: several loader batches as one, and how many batches of the epoch were drawn."""

import copy
import logging
import math
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import wrapt
from composer.core import State, Timestamp
from composer.utils import dist
from streaming import StreamingDataLoader, StreamingDataset
from torch.utils.data import DataLoader

from composer_tst.compatibility import takes, unwrapped
from composer_tst.ops.draw import ids_of, join_batches, merge_batches, next_batches
from composer_tst.ops.fold import is_full
from composer_tst.schedule import Data, Progress, Schedule, too_short

log = logging.getLogger(__name__)


class Resumption(NamedTuple):
    """Where in the epoch the loader's next ``iter()`` begins.

    Attributes:
        drawn: The loader batches of the epoch that are drawn already.
        steps: Steps that Composer replays on resume; 0 if the dataset resumes by itself, as a StreamingDataset does.
        known: False if a dataset that resumes by itself does not tell how much was drawn.
    """

    drawn: int = 0
    steps: int = 0
    known: bool = True


def where_epoch_stands(
    steps: int, read: int, kept: Progress, resumes_at: int | None, samples: int | None, length: int | None
) -> Resumption:
    """Where in an epoch the data of a run go on.

    Composer draws the steps of an epoch again and skips them. A dataset that resumes by itself goes on after the
    samples that its state in the checkpoint counts.

    Args:
        steps: The steps done in the epoch.
        read: The samples that they read.
        kept: What the checkpoint kept; nothing, if it was loaded without algorithms.
        resumes_at: The samples after which the dataset goes on by itself, None if Composer draws the steps again.
        samples: Samples of a loader batch, as the dataset counts them, None if the loader does not say.
        length: Loader batches in an epoch, None if there is no end.
    """
    if resumes_at is None:
        if not steps:
            return Resumption()
        unknown = max(steps, read // samples) if samples else steps
        return Resumption(unknown if kept.drawn is None else kept.drawn, steps)
    if not resumes_at:
        return Resumption()
    # If the checkpoint says that all batches were drawn, that counts. The dataset's own count lacks the tail.
    same_batches = kept.batch_samples == samples
    all_drawn = same_batches and kept.drawn is not None and length is not None and kept.drawn >= length
    if samples and not all_drawn:
        return Resumption(resumes_at // samples)
    return Resumption(steps if kept.drawn is None else kept.drawn, known=kept.drawn is not None)


def settle_dataset(dataset: Any, time: Timestamp) -> int:
    """The samples of the epoch after which a dataset that resumes by itself goes on.

    A StreamingDataset whose state was saved at the end of an epoch is moved to the next.
    """
    if not isinstance(dataset, StreamingDataset):
        return int(time.sample_in_epoch)
    saved = dataset.state_dict(0, from_beginning=False)
    resumes_at, epoch = int(saved['sample_in_epoch']), int(saved['epoch'])
    if resumes_at == int(time.batch_in_epoch) == 0 and epoch < int(time.epoch):
        # Saved at the end of epoch n, the state says: epoch n, sample 0.
        dist.barrier()  # the ranks of a node have one state
        dataset.load_state_dict({**saved, 'epoch': epoch + 1})
    return resumes_at


class BagLoader(wrapt.ObjectProxy):
    """A stand-in for a train loader in one epoch: joins the batches of each step, and counts what it draws.

    In all but iteration it is the loader itself: its type, length, dataset and sampler. Composer's resumption, sampler
    seeding and checkpoints see what they see without it. A copy is a copy of the loader. While the trainer iterates
    over the steps, whoever else does gets the loader's own batches, and changes no count.

    At the end of an epoch fewer batches than a step needs may be left. They make a smaller step, or none if the
    loader has ``drop_last``. Rows that do not fill a row of bags are left out. The samples left out are counted. They
    are not carried into the next step or epoch: a StreamingDataset's state counts samples within one epoch, so that a
    run resumed there could not draw them again.

    Args:
        loader: The train loader.
        joins_rows: Whether a step's rows are joined in groups of as many as it draws batches.
        limit: The batches to draw in an epoch, or None for all.
        resumption: Where the epoch begins.
        draws: Tells how many loader batches the coming step draws.
        takes: What the model's forward takes of a batch, None if it takes all.
        ended: What to call when the epoch has no further step.

    Attributes:
        drawn: The loader batches drawn in the epoch.
        left_out: The samples left out of it, on this rank.
        pending: For each step that was yielded and not trained on yet, the loader batches that it asked for.
        last: Of the step drawn last, the loader batches and the shape of the ids; None before it.
        retired: True once the epoch or superposition is over. An ``iter()`` then gives the loader's own batches.
        under_way: Gives the iterator over steps that somebody holds, None if nobody does.
        trained_on: True once the trainer has trained on a step. No other iterator over steps begins.
        replaying: True while the steps yielded are old ones, which Composer skips. Set it to False if the trainer
            trains on one of them: the epoch goes on from there.
    """

    # wrapt keeps an attribute on the stand-in if the class names it. All others are the loader's.
    joins_rows = retired = trained_on = replaying = False
    drawn = left_out = 0
    limit = resumption = draws = takes = ended = pending = last = under_way = cast(Any, None)

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
        self.under_way: Callable[[], Any] = lambda: None

    def __copy__(self) -> Any:
        return copy.copy(self.__wrapped__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__reduce_ex__(protocol)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the batches of the steps; beside such an iterator, over the loader's own batches."""
        if self.retired or self.trained_on or self.under_way() is not None:
            return iter(self.__wrapped__)
        steps = self._epoch()
        self.under_way = weakref.ref(steps)
        return steps

    def _epoch(self) -> Generator[Any]:
        drawn, steps, _ = self.resumption
        self.drawn, self.left_out, self.pending = 0 if steps else drawn, 0, []
        batches = iter(self.__wrapped__)
        if self.limit is not None and self.drawn >= self.limit:
            # Nothing is left of the epoch. A dataset takes up its state, and counts the epoch, at its first batch.
            next(batches, None)
        else:
            yield from self._replay(batches, drawn, steps)
            yield from self._steps(batches)
        self.ended()

    def _replay(self, batches: Iterator[Any], drawn: int, steps: int) -> Iterator[Any]:
        """Yield the ``steps`` that Composer skips, and draw the batches that they had, ``drawn`` in all.

        The first has the batches of the coming step: a trainer that skips none trains on it. The others share the rest,
        and yield one of theirs, for nobody reads it.
        """
        batch: Any = None
        self.replaying = True
        for left in range(steps, 0, -1):
            is_first = left == steps
            count = min(self.draws(), drawn) if is_first and left > 1 else (drawn - self.drawn) // left
            group = self._draw(batches, count)
            if group:
                batch = merge_batches(group, self.takes) if is_first and len(group) > 1 else group[0]
            elif count:  # the epoch is shorter than it was
                return
            yield batch
            if not self.replaying:
                return
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
    # A loader or a dataset that iterates in its own way may leave out what it likes.
    if type(loader).__iter__ not in (DataLoader.__iter__, StreamingDataLoader.__iter__):
        return
    if not isinstance(dataset, StreamingDataset) or type(dataset).__iter__ is not StreamingDataset.__iter__:
        return
    if dataset.batching_method != 'random':  # the others leave rows out
        return
    if drawn < length - max(1, getattr(loader, 'num_workers', 0)):
        raise RuntimeError(
            f'The epoch ended after {drawn} of {length} loader batches: if data could not be read, the reason is '
            'above; resume once it can be.'
        )


class TrainLoader:
    """The train loader of a fit: puts a :class:`BagLoader` in its place where one is needed, and counts what is drawn.

    It is put there just before an epoch is drawn, and taken away at the epoch's end. Whoever sets, wraps or reads the
    loader between epochs finds the user's own.

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
        self._length: int | None = None  # Composer's, while an epoch is cut short
        self._cut_short = False
        time, resumes_at = state.timestamp, None
        if 'train' in state.dataset_resumption:
            resumes_at = settle_dataset(getattr(state.dataloader, 'dataset', None), time) if fresh else 0
        steps, read = int(time.batch_in_epoch), int(time.sample_in_epoch)
        samples, length = self._batch_samples(), self._batches()
        self._resumption = where_epoch_stands(steps, read, self._progress, resumes_at, samples, length)
        self._has_steps = bool(steps or resumes_at)  # in this epoch
        self._progress.drawn = self._resumption.drawn
        undo.callback(self._put_loader_back)

    def begin_epoch(self) -> None:
        """Put a stand-in around the loader there is now, if a step draws several batches or an epoch is under way."""
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
            self._end_short_epoch,
        )
        self._stand_in, self._counted = loader, 0
        state.set_dataloader(loader, state.dataloader_label, -1 if limit is None else limit)

    def _put_loader_back(self) -> None:
        """Put the train loader back. The iterator under way goes on."""
        state, loader = self._state, self._stand_in
        if loader is not None:
            loader.retired = True
            if state.dataloader is loader:
                limit = self._batches()
                state.set_dataloader(loader.__wrapped__, state.dataloader_label, -1 if limit is None else limit)

    def end_iteration(self) -> None:
        """Note an iteration in tokens that ends in the middle of an epoch: another epoch follows."""
        if self._has_steps:
            self._cut_short = True
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Nothing of the coming epoch is drawn."""
        self._progress.drawn, self._has_steps = 0, False
        self._resumption = Resumption()
        self._put_loader_back()
        self._stand_in = None

    def _end_short_epoch(self) -> None:
        """Have Composer end the epoch whose last step is done.

        After an iteration has ended in the middle of an epoch, Composer ends an epoch only when ``batch_in_epoch`` is
        ``dataloader_len``. A superposed epoch has fewer steps. So the length is that of the steps done, until
        :meth:`end_epoch` puts it back.
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

    def confirm_step(self) -> None:
        """Note that the trainer trains on the step that was drawn last.

        Raises:
            ValueError: If it may be another: the loader was replaced once the epoch was begun, or the trainer has not
                skipped the steps it has done.
        """
        loader, draws, pending = self._stand_in, self._schedule.draws, [1]
        if loader is not None:
            loader.trained_on = True
            if loader.replaying:
                loader.replaying = False
                if not self._schedule.finished and loader.drawn != draws:
                    raise ValueError(
                        f'The run is at step {int(self._state.timestamp.batch_in_epoch)} of the epoch but its data at '
                        'step 0: set spin_dataloaders: true, or use a StreamingDataset, which resumes itself.'
                    )
                return
            pending, loader.pending = loader.pending, []
        if pending != [draws]:
            raise ValueError(
                'The train loader was replaced or wrapped after the last callback of EPOCH_START, so that a step may '
                'have data that were not drawn for it: do that in a callback that the Trainer has before it fits.'
            )

    def count(self, steps: int) -> None:
        """Keep what was drawn: after a step (``steps`` is 1), and after an epoch's tail (0)."""
        progress, loader = self._progress, self._stand_in
        progress.batch_samples = self._batch_samples()
        self._has_steps |= steps > 0
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
            check_epoch_is_whole(self._users_loader(), batches, drawn)
        if not self._schedule.finished and not self._has_steps:
            raise too_short(drawn, self._schedule.draws)
        self._begin_anew()

    def _users_loader(self) -> Any:
        """The train loader as the user gave it."""
        loader = self._state.dataloader
        return loader.__wrapped__ if type(loader) is BagLoader else loader

    def _batches(self) -> int | None:
        """Loader batches in an epoch, None if there is no end."""
        return None if self._state.dataloader_len is None else int(self._state.dataloader_len)

    def _batch_samples(self) -> int | None:
        """Rows of a loader batch that a dataset counts, all ranks together, None if the loader does not say."""
        loader = self._state.dataloader
        rows: int | None = getattr(loader, 'batch_size', None)
        # Ranks that read the same rows, as for tensor parallelism, count them once.
        replication = getattr(getattr(loader, 'dataset', None), 'replication', None) or 1
        return None if rows is None else rows * dist.get_world_size() // replication

    def data(self, first: Any = None) -> Data:
        """What a loader batch holds, by the first batch that training draws, or else by what the loader tells."""
        loader, settings, ids = self._state.dataloader, self._schedule.settings, ids_of(first)
        rows, length, tokens = getattr(loader, 'batch_size', None), row_length_of(first), None
        if ids is not None and ids.ndim == 2 and len(ids):
            # Other algorithms may have reshaped the batch. If they have cut it, it does not tell what a step reads.
            last = None if self._stand_in is None else self._stand_in.last
            draws, shape = last or (self._schedule.draws, ids.shape)
            # The last batch of an epoch may be smaller than the others.
            drawn = (self._progress.drawn or 0) + 1 if self._stand_in is None else self._stand_in.drawn
            least = rows or 0 if drawn == self._batches() else 0
            rows = max(least, -(-shape[0] // draws))
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
