"""The ends of epochs: resumption there, epochs of other rows than the sampler's, and epochs without a step."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common.trainers import VOCAB_SIZE, Rows, llama, logged, make_trainer, random_loader
from composer.core import DataSpec, Event, State
from composer.utils import dist
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader, IterableDataset

from composer_tst import TokenSuperposition

pytestmark = pytest.mark.streaming

LENGTH = 12
ROWS = 48  # 12 batches of 4


@pytest.fixture(scope='module')
def shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], str]:
    """A folder of MDS shards of some rows."""
    made: dict[tuple[int, int], str] = {}

    def make(rows: int, length: int = LENGTH) -> str:
        if (rows, length) not in made:
            folder = str(tmp_path_factory.mktemp('shards') / 'data')
            with MDSWriter(out=folder, columns={'tokens': f'ndarray:int64:{length}'}) as writer:
                for row in range(rows):
                    writer.write({'tokens': np.random.default_rng(row).integers(4, VOCAB_SIZE, length)})
            made[rows, length] = folder
        return made[rows, length]

    return make


class Text(StreamingDataset):
    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(super().__getitem__(index)['tokens'].copy())
        return {'input_ids': ids, 'labels': ids.clone()}


def own_folder(folder: str) -> str:
    """A copy: streaming wants a folder for each reader."""
    return str(shutil.copytree(folder, tempfile.mkdtemp(dir=Path(folder).parent), dirs_exist_ok=True))


def streaming(folder: str, workers: int = 0, drop_last: bool = True, **settings: Any) -> DataLoader:
    dataset = Text(local=own_folder(folder), batch_size=4, shuffle=True, shuffle_seed=5, **settings)
    return DataLoader(dataset, batch_size=4, drop_last=drop_last, num_workers=workers)


class Own(IterableDataset):
    """A dataset of one's own that resumes itself, as Composer has it: by its state, in an epoch it knows by itself."""

    def __init__(self, rows: int):
        self.rows, self.epoch, self.begin = Rows(rows, LENGTH), -1, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        begin, self.begin = self.begin, 0
        self.epoch += 1
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        yield from (self.rows[index] for index in order[begin:])

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int]:
        assert from_beginning
        return {'epoch': self.epoch, 'begin': num_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.begin = state['epoch'] - 1, state['begin']


LOADERS: dict[str, Callable[[Callable, int], DataLoader]] = {
    'streaming': lambda shards, rows: streaming(shards(rows)),
    'streaming, workers': lambda shards, rows: streaming(shards(rows), workers=2),
    'streaming, stratified': lambda shards, rows: streaming(shards(rows), batching_method='stratified'),
    'streaming, a tail': lambda shards, rows: streaming(shards(rows + 2), drop_last=False),
    'own': lambda shards, rows: DataLoader(Own(rows), batch_size=4, drop_last=True),
    'map-style': lambda shards, rows: DataLoader(
        Rows(rows, LENGTH), batch_size=4, drop_last=True, sampler=dist.get_sampler(Rows(rows, LENGTH), shuffle=True)
    ),
}


@pytest.mark.parametrize('kind', LOADERS)
@pytest.mark.parametrize(
    ('settings', 'max_duration', 'steps'),
    [
        # 12 batches an epoch: 4 steps of 3 or 12 of one.
        ({'bag_size': 3, 'duration': '8ba'}, '20ba', (4, 8)),
        ({'bag_size': 3, 'duration': '4ba'}, '18ba', (4, 16)),
        ({'bag_size': 3, 'duration': '2ba'}, '22ba', (8, 20)),
        ({'bag_size': 3, 'duration': '8ba', 'expand': 'batch'}, '10ba', (4, 8)),
        ({'bag_size': 3, 'duration': '12ba', 'expand': 'none'}, '26ba', (12, 24)),
        ({'phases': [{'bag_size': 4, 'until': '2ba'}, {'bag_size': 3, 'until': '1ep'}]}, '16ba', (3, 15)),
    ],
    ids=['superposed', 'ends there', 'in recovery', 'batch', 'none', 'phases'],
)
def test_a_run_resumed_at_the_end_of_an_epoch_is_the_run_that_did_not_stop(
    kind: str, settings: dict[str, Any], max_duration: str, steps: tuple[int, ...], shards: Callable, tmp_path: Path
):
    def run(**load: Any) -> tuple[list[float], list[float], Any]:
        trainer, logger = make_trainer(
            llama(), LOADERS[kind](shards, ROWS), TokenSuperposition(**settings), max_duration, **load
        )
        trainer.fit()
        state = trainer.state.algorithms[0].state_dict()
        trainer.close()
        return logged(logger, 'loss/train/total'), logged(logger, 'superposition/s_tokens'), state

    def at_steps(state: State, event: Event) -> bool:
        return event == Event.BATCH_CHECKPOINT and int(state.timestamp.batch) in steps

    losses, s_tokens, state = run(save_folder=str(tmp_path), save_interval=at_steps)
    for step in steps:
        (saved,) = tmp_path.glob(f'ep*-ba{step}-rank0.pt')
        assert run(load_path=str(saved)) == (losses[step:], s_tokens[step:], state)


class Documents(StreamingDataset):
    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.from_numpy(super().__getitem__(index)['tokens'].copy())


def packed(documents: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    rows = torch.cat(documents).view(-1, LENGTH)
    return {'input_ids': rows, 'labels': rows.clone()}


@pytest.mark.parametrize('superposed', [False, True])
def test_a_collator_makes_fewer_rows_than_it_is_given_samples(superposed: bool, shards: Callable):
    dataset = Documents(local=own_folder(shards(64, LENGTH // 2)), batch_size=8)
    loader = DataLoader(dataset, batch_size=8, collate_fn=packed)
    algorithm = TokenSuperposition(2, '2ba') if superposed else None
    trainer, logger = make_trainer(llama(), loader, algorithm, '2ep')
    trainer.fit()
    # 8 batches of 8 half rows an epoch; superposed, 2 steps of 2 of them.
    assert trainer.state.timestamp.batch == (14 if superposed else 16)
    if superposed:
        assert logged(logger, 'superposition/data_tokens')[-1] == 16 * 4 * LENGTH
        assert logged(logger, 'superposition/samples_left_out') == [0, 0]


def test_rows_that_cannot_be_joined_are_counted_at_each_step():
    """3 rows of each batch of 4: a step that reads 2 batches joins its 6 rows by 2, one that reads 4 its 12 by 4."""

    def first(count: int) -> Callable[[list], dict[str, torch.Tensor]]:
        return lambda rows: torch.utils.data.default_collate(rows[:count])

    loader = random_loader(rows=48, length=LENGTH, collate_fn=first(3))
    phases = [{'bag_size': 4, 'until': '1ba'}, {'bag_size': 2, 'until': '2ba'}]
    trainer, logger = make_trainer(llama(), loader, TokenSuperposition(phases=phases), '1ep')
    trainer.fit()
    assert logged(logger, 'superposition/bag_size') == [4, 2] + [1] * 6
    assert logged(logger, 'superposition/s_tokens')[:2] == [3 * LENGTH, 6 * LENGTH]
    assert logged(logger, 'superposition/samples_left_out') == [0]

    def uneven(rows: list) -> dict[str, torch.Tensor]:
        return first(3 if int(rows[0]['input_ids'].sum()) % 2 else 4)(rows)

    loader = random_loader(rows=48, length=LENGTH, collate_fn=uneven)
    rows = [len(batch['labels']) for batch in loader]
    trainer, logger = make_trainer(llama(), loader, TokenSuperposition(bag_size=2, duration='3ba'), '1ep')
    trainer.fit()
    joined = [(rows[at] + rows[at + 1]) // 2 for at in (0, 2, 4)]
    assert len({rows[at] + rows[at + 1] for at in (0, 2, 4)}) > 1
    assert logged(logger, 'superposition/s_tokens')[:3] == [LENGTH * sum(joined[:n]) for n in (1, 2, 3)]
    assert logged(logger, 'superposition/samples_left_out') == [sum(rows[:6]) - 2 * sum(joined)]


class Batches(IterableDataset):
    """Makes its own batches."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from random_loader(self.count * 4, length=LENGTH)


@pytest.mark.parametrize('expand', ['sequence', 'batch', 'none'])
def test_a_loader_without_a_batch_size(expand: str, tmp_path: Path):
    def run(**load: Any) -> list[float]:
        loader = DataLoader(Batches(12), batch_size=None)
        algorithm = TokenSuperposition(3, '5ba', expand=expand)
        trainer, logger = make_trainer(llama(), loader, algorithm, '12ba', device_train_microbatch_size=4, **load)
        trainer.fit()
        return logged(logger, 'loss/train/total')

    losses = run(save_folder=str(tmp_path), save_interval='1ba')
    assert len(losses) == 12
    for step in (2, 4, 7):
        (saved,) = tmp_path.glob(f'ep*-ba{step}-rank0.pt')
        assert run(load_path=str(saved)) == losses[step:]


def test_an_epoch_that_yields_no_step_ends_in_a_sentence():
    class Short:
        """Does not say how long it is, and 2 batches with drop_last make no step of 3."""

        drop_last, batch_size = True, 4

        def __iter__(self) -> Iterator[Any]:
            yield from random_loader(8, length=LENGTH)

    trainer, _ = make_trainer(llama(), Short(), TokenSuperposition(3, '2ba'), '8ba', device_train_microbatch_size=4)
    with pytest.raises(ValueError, match='The train loader has 2 batches but one superposed step reads 3'):
        trainer.fit()


def test_only_the_phases_to_come_need_a_long_epoch(tmp_path: Path):
    """In its last phase, and in recovery, a run resumes with a loader too short for the first."""
    phases = [{'bag_size': 6, 'until': '2ba'}, {'bag_size': 2, 'until': '5ba'}]

    def run(rows: int, **load: Any) -> list[float]:
        trainer, logger = make_trainer(
            llama(), random_loader(rows), TokenSuperposition(phases=phases), '8ba', spin_dataloaders=False, **load
        )
        trainer.fit()
        return logged(logger, 'superposition/bag_size')

    assert run(96, save_folder=str(tmp_path), save_interval='1ba') == [6, 6, 2, 2, 2, 1, 1, 1]
    assert run(12, load_path=str(tmp_path / 'ep0-ba2-rank0.pt')) == [2, 2, 2, 1, 1, 1]
    assert run(4, load_path=str(tmp_path / 'ep0-ba6-rank0.pt')) == [1, 1]
    with pytest.raises(ValueError, match='The train loader has 3 batches but one superposed step reads 6'):
        run(12, load_path=str(tmp_path / 'ep0-ba1-rank0.pt'))


def test_phases_in_epochs_that_leave_a_tail():
    """10 batches an epoch: a bag of 6 takes one step of an epoch, and leaves 4 batches."""
    trainer, logger = make_trainer(llama(), random_loader(40), TokenSuperposition(6, '5ep'), '8ba')
    trainer.fit()
    assert logged(logger, 'superposition/bag_size') == [6] * 5 + [1] * 3
    trainer, logger = make_trainer(llama(), random_loader(40), TokenSuperposition(6, '0.3dur'), '30ep')
    trainer.fit()
    sizes = logged(logger, 'superposition/bag_size')
    assert 0.25 < sizes.count(6) / len(sizes) < 0.35
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(ValueError, match='there would be no recovery phase'):
        make_trainer(llama(), random_loader(40), TokenSuperposition(6, '8ep'), '8ba')[0].fit()


@pytest.mark.parametrize('samples', ['rows', 'documents'])
def test_the_count_of_batches_does_not_hang_on_the_count_of_samples(samples: str, shards: Callable):
    """A DataSpec may count other samples than rows."""
    documents = Documents(local=own_folder(shards(64, LENGTH // 2)), batch_size=8)
    loader = DataLoader(documents, batch_size=8, collate_fn=packed)
    count = (lambda batch: 2 * len(batch['input_ids'])) if samples == 'documents' else None
    spec = DataSpec(loader, get_num_samples_in_batch=count)
    trainer, logger = make_trainer(
        llama(), spec, TokenSuperposition(2, '2ba'), '2ep', device_train_microbatch_size=4 if count is None else 2
    )
    trainer.fit()
    assert logged(logger, 'superposition/bag_size') == [2, 2] + [1] * 12
