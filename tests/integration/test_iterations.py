"""Iterations in tokens, as llm-foundry's CurriculumLearning makes them: other data in the middle of an epoch."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common.trainers import llama, logged, make_trainer
from composer import Callback
from composer.core import State, Time
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

from composer_tst import TokenSuperposition

pytestmark = pytest.mark.streaming

LENGTH, ROWS, BATCH = 8, 80, 4
FIRST, SECOND = range(4, 4 + ROWS), range(104, 104 + ROWS)  # what the rows of each data set are filled with


class Filled(StreamingDataset):
    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(super().__getitem__(index)['ids'].copy())
        return {'input_ids': ids, 'labels': ids.clone()}


@pytest.fixture(scope='module')
def loader(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DataLoader]:
    """A loader of a data set, 20 batches of 4 rows an epoch."""

    def make(rows: range, batch_size: int = BATCH, shuffle: bool = False, drop_last: bool = False) -> DataLoader:
        folder = str(tmp_path_factory.mktemp('shards'))
        with MDSWriter(out=f'{folder}/data', columns={'ids': 'ndarray:int64'}) as writer:
            for row in rows:
                writer.write({'ids': np.full(LENGTH, row, np.int64)})
        dataset = Filled(
            local=f'{folder}/data',
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_algo='py1s',
            num_canonical_nodes=1,
        )
        return DataLoader(dataset, batch_size=batch_size, drop_last=drop_last)

    return make


class Reads(Callback):
    """Keeps the rows that steps read, in order."""

    def __init__(self):
        self.read: list[list[int]] = []

    def batch_start(self, state: State, logger: Any) -> None:
        self.read.append(state.batch['input_ids'][:, ::LENGTH].flatten().tolist())


class Curriculum(Reads):
    """Other data after 15 batches."""

    def __init__(self, second: DataLoader, mixes: int):
        super().__init__()
        self.second, self.mixes = second, mixes

    def iteration_start(self, state: State, logger: Any) -> None:
        if self.mixes:
            state.set_dataloader(self.second, 'train')
            state.train_dataloader = state.dataloader
        state._iteration_length = Time([15, 200][self.mixes] * BATCH * LENGTH, 'tok')

    def iteration_end(self, state: State, logger: Any) -> None:
        self.mixes += 1


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        # Of 20 batches 6 threes are drawn, and of the last two batches three pairs of rows and a pair too many.
        ({'bag_size': 3, 'duration': '18ba'}, [*FIRST[:60], *SECOND[:78], *SECOND[:78]]),
        # 10 steps of 3: the second epoch of the second data is begun superposed and ended plain.
        ({'bag_size': 3, 'duration': '14ba'}, [*FIRST[:60], *SECOND[:78], *SECOND]),
        ({'bag_size': 3, 'duration': '2ba'}, [*FIRST[:60], *SECOND, *SECOND]),
        ({'bag_size': 2, 'duration': '18ba', 'expand': 'none'}, [*FIRST[:60], *SECOND, *SECOND]),
    ],
    ids=['superposed', 'to plain', 'in recovery', 'none'],
)
def test_other_data_in_the_middle_of_an_epoch(
    settings: dict[str, Any], expected: list[int], loader: Callable, tmp_path: Path
):
    def run(mixes: int = 0, **load: Any) -> Curriculum:
        curriculum = Curriculum(loader(SECOND), mixes)
        trainer, _ = make_trainer(
            llama(),
            loader(SECOND if mixes else FIRST),
            TokenSuperposition(**settings),
            f'{62 * BATCH * LENGTH}tok',
            callbacks=[curriculum],
            **load,
        )
        trainer.fit()
        trainer.close()
        return curriculum

    whole = run(save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt').read
    read = [row for step in whole for row in step]
    assert read[: len(expected)] == expected
    assert len(read) >= 62 * BATCH
    rows = list(itertools.accumulate(map(len, whole)))
    second = next(step for step, count in enumerate(rows, 1) if count > 60)
    for step in (second, second + 8):
        assert run(mixes=1, load_path=str(tmp_path / f'ba{step}.pt')).read == whole[step:], step


@pytest.mark.parametrize(
    ('settings', 'batch_size', 'new'),
    [
        ({'bag_size': 3, 'duration': '5ba'}, 2, False),
        ({'bag_size': 3, 'duration': '5ba'}, 8, False),
        ({'bag_size': 3, 'duration': '9ba'}, 7, False),
        ({'bag_size': 3, 'duration': '9ba'}, 8, False),
        ({'bag_size': 2, 'duration': '30ba', 'expand': 'none'}, 2, False),
        ({'bag_size': 2, 'duration': '30ba', 'expand': 'none'}, 8, False),
        ({'bag_size': 3, 'duration': '9ba'}, 2, True),
        ({'bag_size': 3, 'duration': '9ba'}, 8, True),
    ],
)
def test_a_run_resumed_with_another_batch_size_reads_the_rest_of_the_epoch(
    settings: dict[str, Any], batch_size: int, new: bool, loader: Callable, tmp_path: Path
):
    """A StreamingDataset goes on at the sample where it was, also where superposition is new to the run."""

    def run(tst: TokenSuperposition | None, batch_size: int, **load: Any) -> list[list[int]]:
        reads = Reads()
        trainer, _ = make_trainer(llama(), loader(FIRST, batch_size), tst, '40ba', callbacks=[reads], **load)
        trainer.fit()
        trainer.close()
        return reads.read

    saved = {'save_folder': str(tmp_path), 'save_interval': '6ba', 'save_filename': 'ba{batch}.pt'}
    before = run(None if new else TokenSuperposition(**settings), BATCH, **saved)[:6]
    after = run(TokenSuperposition(**settings), batch_size, load_path=str(tmp_path / 'ba6.pt'))
    read = [row for step in (*before, *after) for row in step]
    # At the end of the epoch a superposed step leaves out what it cannot join.
    assert read[: ROWS - 2] == list(FIRST[: ROWS - 2])
    assert len(read) > ROWS, 'the epoch after was not begun'


def read_rows(
    tst: TokenSuperposition | None, train: DataLoader, max_duration: str, *callbacks: Callback, **settings: Any
) -> list[list[int]]:
    """The rows that each step of a run reads."""
    reads = Reads()
    trainer, _ = make_trainer(llama(), train, tst, max_duration, callbacks=[reads, *callbacks], **settings)
    trainer.fit()
    trainer.close()
    return reads.read


def saved_in(folder: Path, interval: str = '1ba') -> dict[str, Any]:
    return {'save_folder': str(folder), 'save_interval': interval, 'save_filename': 'ba{batch}.pt'}


RESET = {'load_ignore_keys': ['state/timestamp']}


@pytest.mark.parametrize(
    ('runs', 'first'),
    [
        # Each run: bag size, steps superposed, batch size, steps, how it is loaded.
        ([(1, 0, 4, 6, {}), (3, 3, 4, 30, RESET)], 24),
        ([(2, 2, 4, 3, {}), (3, 3, 4, 30, RESET)], 20),
        # The state counts from where the clock was set back.
        ([(2, 2, 4, 3, {}), (2, 2, 4, 3, RESET), (2, 2, 4, 30, {})], 20),
        ([(2, 2, 4, 7, {}), (2, 2, 32, 8, {}), (2, 2, 4, 40, {})], 68),
    ],
    ids=['superposition and clock new', 'clock new', 'clock new before', 'another batch size twice'],
)
def test_a_dataset_goes_on_where_its_state_says(
    runs: list[tuple[int, int, int, int, dict[str, Any]]], first: int, loader: Callable, tmp_path: Path
):
    """No row of its epoch is left out then, and none is missed."""
    load: dict[str, Any] = {}
    for at, (bag_size, until, batch_size, steps, how) in enumerate(runs):
        tst = TokenSuperposition(bag_size, f'{until}ba') if bag_size > 1 else None
        load |= how if load else {}
        read = read_rows(tst, loader(FIRST, batch_size), f'{steps}ba', **load, **saved_in(tmp_path / str(at)))
        last = max((tmp_path / str(at)).glob('ba*.pt'), key=lambda path: int(path.stem[2:]))
        load = {'load_path': str(last)}
    rows = [row for step in read for row in step]
    rest = FIRST[first:]
    # The last of a superposed step may not be joined.
    assert rows[: len(rest) - 2] == list(rest[: len(rest) - 2])
    assert FIRST[0] in rows, 'the epoch after was not begun'


@pytest.mark.parametrize('batch_size', [2, 8])
def test_a_checkpoint_of_before_loader_batches_were_sized(batch_size: int, loader: Callable, tmp_path: Path):
    tst = {'bag_size': 3, 'duration': '3ba'}
    read_rows(TokenSuperposition(**tst), loader(FIRST), '4ba', **saved_in(tmp_path))
    checkpoint = torch.load(tmp_path / 'ba4.pt', weights_only=False)
    for _, algorithm in checkpoint['state']['algorithms']:
        del algorithm['batch_samples']
    torch.save(checkpoint, tmp_path / 'older.pt')
    read = read_rows(TokenSuperposition(**tst), loader(FIRST, batch_size), '30ba', load_path=str(tmp_path / 'older.pt'))
    rows = [row for step in read for row in step]
    assert rows[: ROWS - 40] == list(FIRST[40:])


@pytest.mark.parametrize('duration', ['2ep', '14ba', '3ba'])
def test_a_checkpoint_of_an_epochs_end_goes_on_with_the_next(duration: str, loader: Callable, tmp_path: Path):
    """Though a StreamingDataset's state there is its last epoch."""
    tst = {'bag_size': 2, 'duration': duration}

    def run(**settings: Any) -> list[list[int]]:
        return read_rows(TokenSuperposition(**tst), loader(FIRST, shuffle=True), '4ep', **settings)

    whole = run(**saved_in(tmp_path, '1ep'))
    *steps, last = sorted(int(path.stem[2:]) for path in tmp_path.glob('ba*.pt'))
    assert (len(steps), last) == (3, len(whole))
    for step in steps:
        path = tmp_path / f'ba{step}.pt'
        assert run(load_path=str(path)) == whole[step:], step


def test_an_iteration_that_ended_in_an_epoch_leaves_nothing_drawn(loader: Callable, tmp_path: Path):
    class Iterations(Callback):
        def iteration_start(self, state: State, logger: Any) -> None:
            state._iteration_length = Time(15 * BATCH * LENGTH, 'tok')

    tst = {'bag_size': 3, 'duration': '30ba'}
    read_rows(TokenSuperposition(**tst), loader(FIRST), '40ba', Iterations(), **saved_in(tmp_path, '1iter'))
    read = read_rows(TokenSuperposition(**tst), loader(FIRST), '40ba', load_path=str(tmp_path / 'ba5.pt'), **RESET)
    rows = [row for step in read for row in step]
    assert rows[: ROWS - 2] == list(FIRST[: ROWS - 2])


def test_a_larger_batch_ends_an_epoch_that_has_no_further_step(loader: Callable, tmp_path: Path):
    """It is not too short for one: the step was taken before the batch was larger."""
    tst = {'bag_size': 3, 'duration': '4ba'}
    made = {'drop_last': True}
    read_rows(TokenSuperposition(**tst), loader(FIRST, 4, **made), '6ba', **saved_in(tmp_path))
    read = read_rows(TokenSuperposition(**tst), loader(FIRST, 26, **made), '6ba', load_path=str(tmp_path / 'ba1.pt'))
    assert len(read) == 5


def test_train_metrics_are_of_plain_steps_alone(loader: Callable):
    """Superposition that ends with an epoch leaves it without train metrics, not with ones of nothing."""
    for settings in ({'bag_size': 2, 'duration': '10ba'}, {'bag_size': 2, 'duration': '20ba', 'expand': 'none'}):
        trainer, logger = make_trainer(llama(), loader(FIRST), TokenSuperposition(**settings), '3ep')
        trainer.fit()
        values = logged(logger, 'metrics/train/LanguageCrossEntropy')
        steps = logged(logger, 'superposition/bag_size').count(1)
        assert len(values) == steps + 2  # and at the ends of two epochs
        assert np.isfinite(values).all()
