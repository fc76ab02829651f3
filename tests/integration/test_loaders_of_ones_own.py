"""Loaders that are wrapped or made: each step reads the rows of its bag size, and nothing else reads data."""

import queue
import threading
from typing import Any

import pytest
import torch
from common.trainers import Rows, llama, logged, make_trainer, random_loader
from composer import Callback
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from composer_tst import TokenSuperposition


class Wrapper:
    """In all but iteration it is what it wraps."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__['inner'], name)

    def __iter__(self) -> Any:
        yield from self.inner


class Ahead(Wrapper):
    """One batch ahead."""

    def __iter__(self) -> Any:
        batches = iter(self.inner)
        ahead = next(batches, None)
        while ahead is not None:
            now, ahead = ahead, next(batches, None)
            yield now


class Thread(Wrapper):
    """Two batches ahead, in a thread of its own."""

    def __iter__(self) -> Any:
        batches: queue.Queue[Any] = queue.Queue(2)

        def feed() -> None:
            for batch in self.inner:
                batches.put(batch)
            batches.put(None)

        threading.Thread(target=feed, daemon=True).start()
        while (batch := batches.get()) is not None:
            yield batch


class Skips(Wrapper):
    """Every second batch."""

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.inner):
            if number % 2 == 0:
                yield batch


class Wraps(Callback):
    """Wraps the loader at an event, and notes the first row and the rows of each step."""

    def __init__(self, event: str, wrapper: Any, peeks: str = ''):
        self.event, self.wrapper, self.peeks = event, wrapper, peeks
        self.steps: list[tuple[int, int]] = []

    def run_event(self, event: Any, state: Any, logger: Any) -> None:
        if event.value == self.event and not isinstance(state.dataloader, Wrapper):
            state.set_dataloader(self.wrapper(state.dataloader), 'train', -1)
        if event.value == self.peeks and state.timestamp.batch == 1:
            next(iter(state.dataloader))
        if event.value == 'batch_start':
            ids = state.batch['input_ids']
            self.steps.append((int(ids[0, 0]), ids.numel() // 12))


def numbered(rows: int) -> DataLoader:
    """Rows that begin with their number."""
    data = Rows(rows, 12)
    data.ids[:, 0] = torch.arange(rows)
    return DataLoader(data, batch_size=4, drop_last=True)


RIGHT = [(0, 12), (12, 12), (24, 12), (36, 12), (48, 4), (52, 4), (56, 4), (60, 4)]


@pytest.mark.parametrize('event', ['init', 'fit_start', 'iteration_start', 'epoch_start'])
@pytest.mark.parametrize('wrapper', [Wrapper, Ahead, Thread])
def test_each_step_reads_the_rows_of_its_bag_size(wrapper: Any, event: str):
    wraps = Wraps(event, wrapper)
    trainer, _ = make_trainer(llama(), numbered(200), TokenSuperposition(3, '4ba'), '8ba', callbacks=[wraps])
    trainer.fit()
    assert wraps.steps == RIGHT


@pytest.mark.parametrize('wrapper', [Wrapper, Ahead])
def test_a_second_fit_goes_on_from_the_first(wrapper: Any):
    wraps = Wraps('epoch_start', wrapper)
    trainer, _ = make_trainer(llama(), numbered(20), TokenSuperposition(2, '3ba'), '10ba', callbacks=[wraps])
    for duration in ('2ba', '4ba'):
        trainer.fit(duration=duration)
    assert [rows for _, rows in wraps.steps] == [8, 8, 8, 4, 4, 4]


@pytest.mark.parametrize('event', ['batch_start', 'after_dataloader', 'batch_end'])
def test_a_look_at_the_data_leaves_no_trace(event: str):
    wraps = Wraps('never', Wrapper, event)
    trainer, _ = make_trainer(llama(), numbered(200), TokenSuperposition(3, '4ba'), '8ba', callbacks=[wraps])
    trainer.fit()
    assert wraps.steps == RIGHT


def test_reading_ahead_of_a_moment_that_shows_only_then_is_refused_at_the_first_step():
    wraps = Wraps('epoch_start', Ahead)
    trainer, _ = make_trainer(llama(), numbered(200), TokenSuperposition(3, '600tok'), '8ba', callbacks=[wraps])
    with pytest.raises(ValueError, match='Ahead reads ahead of the step, and a phase ends at 600tok'):
        trainer.fit()
    assert not wraps.steps


def test_a_loader_that_leaves_batches_out_of_an_epoch_of_one_bag_size_is_refused_at_its_end():
    trainer, _ = make_trainer(
        llama(), numbered(48), TokenSuperposition(3, '1ep'), '2ep', callbacks=[Wraps('epoch_start', Skips)]
    )
    with pytest.raises(ValueError, match='Skips has left out 2 batches of the epoch: have what wraps'):
        trainer.fit()


def test_a_loader_that_leaves_batches_out_is_refused():
    trainer, _ = make_trainer(
        llama(), numbered(200), TokenSuperposition(3, '4ba'), '8ba', callbacks=[Wraps('epoch_start', Skips)]
    )
    with pytest.raises(ValueError, match='Skips hands a step a batch'):
        trainer.fit()


class InWorker(Rows):
    """A data set that works in its worker alone."""

    def __getitem__(self, index: int) -> Any:
        assert get_worker_info() is not None, 'read in the parent process'
        return super().__getitem__(index)


class Keyed(Dataset):
    """A data set of pairs, without a length."""

    def __init__(self):
        self.rows = Rows(48, 12)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.rows[key[0]]


class Pairs(Sampler):
    def __init__(self):
        pass

    def __len__(self) -> int:
        return 48

    def __iter__(self) -> Any:
        return iter([(index, 0) for index in range(48)])


@pytest.mark.parametrize(
    'loader',
    [
        lambda: DataLoader(InWorker(48, 12), batch_size=4, drop_last=True, num_workers=1),
        lambda: DataLoader(Keyed(), batch_size=4, sampler=Pairs(), drop_last=True),
    ],
    ids=['in its worker', 'keyed by pairs'],
)
def test_nothing_but_the_loader_reads_the_data(loader: Any):
    trainer, logger = make_trainer(llama(), loader(), TokenSuperposition(2, '2ba'), '4ba')
    trainer.fit()
    assert logged(logger, 'superposition/data_tokens') == [96, 192, 240, 288]


def test_a_loader_that_writes_over_its_batches_trains_as_one_that_does_not():
    def refilled() -> Any:
        buffer = torch.zeros(4, 12, dtype=torch.long)
        for batch in random_loader():
            buffer.copy_(batch['input_ids'])
            yield {'input_ids': buffer, 'labels': buffer}

    class Refilled:
        batch_size = 4

        def __iter__(self) -> Any:
            return refilled()

    losses = []
    for loader in (random_loader(), Refilled()):
        trainer, logger = make_trainer(llama(), loader, TokenSuperposition(2, '2ba'), '4ba')
        trainer.fit()
        losses.append(logged(logger, 'loss/train/total'))
    assert losses[0] == losses[1]
