"""Loaders that are wrapped or made: each step reads the rows of its bag size, and nothing else reads data."""

import itertools
import queue
import re
import threading
import time
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

    seconds = 0.0

    def __iter__(self) -> Any:
        batches: queue.Queue[Any] = queue.Queue(2)

        def feed() -> None:
            for batch in self.inner:
                time.sleep(self.seconds)
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


class Shorter(Wrapper):
    """Says that it has half of the batches."""

    def __len__(self) -> int:
        return len(self.inner) // 2


class Slow(Thread):
    """The same, of data that come slower than they are trained on."""

    seconds = 0.1


class Keeps(Wrapper):
    """Keeps the batches of its first epoch, and gives them again in the others."""

    kept: Any = None

    def __iter__(self) -> Any:
        if self.kept is None:
            self.kept = list(self.inner)
        yield from self.kept


class Shuffles(Wrapper):
    """One of three batches, whichever."""

    def __iter__(self) -> Any:
        generator, held = torch.Generator().manual_seed(0), []
        for batch in self.inner:
            held.append(batch)
            if len(held) == 3:
                yield held.pop(int(torch.randint(3, (), generator=generator)))
        yield from held


class NextEpoch(Wrapper):
    """Begins the next epoch as it ends one."""

    ready: Any = None

    def __iter__(self) -> Any:
        yield from self.ready or self.inner
        batches = iter(self.inner)
        self.ready = itertools.chain([next(batches)], batches)


class Halves(Wrapper):
    """Two batches of each."""

    def __iter__(self) -> Any:
        for batch in self.inner:
            yield {key: value[:2] for key, value in batch.items()}
            yield {key: value[2:] for key, value in batch.items()}


class Kept(Wrapper):
    """Gives the batches that it has read when it was made."""

    def __init__(self, loader: Any):
        super().__init__(loader)
        self.batches = list(loader)

    def __iter__(self):
        return iter(self.batches)


class Wraps(Callback):
    """Wraps the loader at an event, and notes the first row and the rows of each step."""

    def __init__(self, event: str, wrapper: Any = Wrapper):
        self.event, self.wrapper = event, wrapper
        self.steps: list[tuple[int, int]] = []

    def run_event(self, event: Any, state: Any, logger: Any) -> None:
        if event.value == self.event and not isinstance(state.dataloader, Wrapper):
            state.set_dataloader(self.wrapper(state.dataloader), 'train', -1)
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


@pytest.mark.parametrize('event', ['fit_start', 'epoch_start'])
def test_an_epoch_has_the_batches_that_the_wrapper_says(event: str):
    """7 of 15: 2 steps of 3 and one of a single batch, then 7 of these."""
    wraps = Wraps(event, Shorter)
    trainer, _ = make_trainer(llama(), numbered(60), TokenSuperposition(3, '2ba'), '6ba', callbacks=[wraps])
    trainer.fit()
    assert wraps.steps == [(0, 12), (12, 12), (24, 4), (0, 4), (4, 4), (8, 4)]


class Looks(Callback):
    """Reads the data at each of an event, the first batch or all of them."""

    def __init__(self, event: str, batches: int | None):
        self.event, self.batches = event, batches

    def run_event(self, event: Any, state: Any, logger: Any) -> None:
        if event.value == self.event:
            assert len(list(itertools.islice(state.dataloader, self.batches))) > 0


@pytest.mark.parametrize('batches', [1, None])
@pytest.mark.parametrize(
    'event',
    [
        *('fit_start', 'iteration_start', 'epoch_start', 'before_dataloader', 'after_dataloader', 'batch_start'),
        *('batch_end', 'epoch_end'),
    ],
)
def test_a_look_at_the_data_leaves_no_trace(event: str, batches: int | None, caplog: pytest.LogCaptureFixture):
    notes = Wraps('never')
    trainer, logger = make_trainer(
        llama(), numbered(32), TokenSuperposition(3, '3ba'), '14ba', callbacks=[Looks(event, batches), notes]
    )
    for duration in ('1ba', '4ba', '9ba'):
        trainer.fit(duration=duration)
    plain = [(row, 4) for row in range(0, 32, 4)]
    assert notes.steps == [(0, 12), (12, 12), (0, 12), *plain[3:], *plain[:6]]
    assert logged(logger, 'superposition/samples_left_out') == [8, 8]
    assert sum('8 samples on this rank are left out' in line for line in caplog.messages) == 1


@pytest.mark.parametrize('event', ['before_dataloader', 'after_dataloader', 'batch_start', 'batch_end'])
def test_what_is_kept_of_the_loader_during_an_epoch_is_its_batches(event: str):
    wraps = Wraps(event, Kept)
    trainer, _ = make_trainer(llama(), numbered(48), TokenSuperposition(3, '6ba'), '9ba', callbacks=[wraps])
    trainer.fit()
    epoch = [(0, 12), (12, 12), (24, 12), (36, 12)]
    assert wraps.steps == [*epoch, *epoch[:2], (24, 4), (28, 4), (32, 4)]


class Adds(Callback):
    """Adds superposition at an event."""

    def __init__(self, event: str):
        self.event = event

    def run_event(self, event: Any, state: Any, logger: Any) -> None:
        if event.value == self.event and not state.algorithms:
            state.algorithms.append(TokenSuperposition(3, '4ba'))


def test_superposition_that_is_added_in_a_fit_is_refused():
    for event in ('fit_start', 'epoch_start', 'batch_end'):
        trainer, _ = make_trainer(llama(), numbered(48), None, '8ba', callbacks=[Adds(event)])
        with pytest.raises(ValueError, match='was added after FIT_START'):
            trainer.fit()


def test_a_run_that_resumes_at_a_tail_expects_whole_batches(
    tmp_path: Any, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    data = Rows(57, 12)
    said = []
    for load in ({}, {'load_path': f'{tmp_path}/b14.pt'}):
        trainer, _ = make_trainer(
            llama(),
            DataLoader(data, batch_size=4),
            TokenSuperposition(2, '800tok', expand='none'),
            '20ba',
            save_folder=str(tmp_path),
            save_interval='14ba',
            save_filename='b{batch}.pt',
            save_overwrite=True,
            **load,
        )
        trainer.fit()
        # In the log, if an earlier test has turned that on.
        said.append(re.findall('Superposition until .*', capsys.readouterr().err + caplog.text)[-1])
    assert said[0] == said[1]


@pytest.mark.parametrize('wrapper', [Skips, Keeps, Shuffles, NextEpoch, Halves])
@pytest.mark.parametrize('until', ['7ba', '1ep'])
def test_what_wraps_the_loader_as_an_epoch_starts_may_do_what_it_may_around_it(wrapper: Any, until: str):
    steps = []
    for loader in (wrapper(numbered(60)), numbered(60)):
        wraps = Wraps('epoch_start', wrapper)
        trainer, _ = make_trainer(llama(), loader, TokenSuperposition(3, until), '12ba', callbacks=[wraps])
        trainer.fit()
        steps.append(wraps.steps)
    assert steps[0] == steps[1]
    assert {rows for _, rows in steps[0]} == ({6, 2} if wrapper is Halves else {12, 4})


@pytest.mark.parametrize('wrapper', [Ahead, Thread, Slow])
def test_what_reads_ahead_does_so_of_a_moment_that_shows_only_then(wrapper: Any):
    wraps = Wraps('epoch_start', wrapper)
    trainer, _ = make_trainer(llama(), numbered(200), TokenSuperposition(3, '576tok'), '8ba', callbacks=[wraps])
    trainer.fit()
    assert wraps.steps == RIGHT


@pytest.mark.parametrize('wrapper', [Ahead, Skips])
def test_what_wraps_the_loader_after_all_callbacks_and_does_not_hand_each_step_on_is_refused(wrapper: Any):
    class Adds(Callback):
        def fit_start(self, state: Any, logger: Any) -> None:
            state.callbacks.append(Wraps('epoch_start', wrapper))

    trainer, _ = make_trainer(llama(), numbered(200), TokenSuperposition(3, '4ba'), '8ba', callbacks=[Adds()])
    with pytest.raises(ValueError, match='replaced or wrapped after the last callback of EPOCH_START'):
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
